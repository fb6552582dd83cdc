"""Decoding steps on a CPU, compiled ahead of time: a library of C++ that is kept on disk and called without Python.

`torch.export` traces a step as one graph, in seconds; AOTInductor makes a library of it, in up to a minute, once: the
library is found again by the graph itself, by whatever process traces the same one. It holds no weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export

ANY = Dim.DYNAMIC
OPTIONS = {"aot_inductor.package_constants_in_so": False}


class _Step(nn.Module):
    """A function of a model and tensors, as a module."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.model, *arguments)


def trace(model: nn.Module, function: Callable[..., Any], arguments: tuple[Any, ...], sizes: Any) -> ExportedProgram:
    """The graph of `function(model, *arguments)`.

    Args:
        arguments: tensors, and lists and tuples of them.
        sizes: for each tensor, in the same lists and tuples, the dimensions of `ANY` size.
    """
    with torch.inference_mode(False), torch.no_grad():
        like = torch.utils._pytree.tree_map(torch.empty_like, arguments)  # inference tensors may not be traced
        how: dict[str, Any] = {"args": like, "dynamic_shapes": (sizes,)}
        try:
            return export(_Step(model, function), **how, strict=False)
        except UserError:  # it took a size for a number; to read the code, not run it, takes twice as long
            return export(_Step(model, function), **how, strict=True)


def library(program: ExportedProgram) -> Callable[[list[Tensor]], list[Tensor]]:
    """What a graph compiles to, from disk if it ever was: a function of its flat list of inputs, to that of outputs."""
    path = _place(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.pt2")
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(unfinished), inductor_configs=dict(OPTIONS)
            )
            unfinished.rename(path)
        runner = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    weights = _weights(program)
    runner.load_constants(
        {name: weights[name] for name in runner.get_constant_fqns()}, check_full_update=True, user_managed=True
    )

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return runner.loader.run(inputs)

    run.weights = weights  # type: ignore[attr-defined]  # the library reads them where they are
    return run


def _weights(program: ExportedProgram) -> dict[str, Tensor]:
    """The parameters and buffers that a graph reads, by name."""
    return {name: tensor.detach() for name, tensor in {**program.constants, **program.state_dict}.items()}


def _place(program: ExportedProgram) -> Path:
    """Where the library of a graph is kept: named after all that it depends on."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    strides = [(name, tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in _weights(program).items()]
    code = [line for line in str(program).splitlines() if not line.lstrip().startswith("#")]  # they name folders
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    depends = *machine, OPTIONS, strides, code
    return Path(cache_dir()) / "parse" / f"{sha256(repr(depends).encode()).hexdigest()[:32]}.pt2"
