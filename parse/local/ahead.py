"""Passes on a CPU, compiled ahead of time: a library of C++ that is kept on disk and called without Python.

`torch.export` traces a pass as one graph, in seconds. AOTInductor makes a library of it, once: the library is found
again by the graph itself, by whatever process traces the same one. It holds no weights.

    library   the whole graph: fastest to run, up to a minute to make, longer with each layer
    layered   one library for all layers that do the same, seconds to make; the rest of the graph runs as it is.
              A call a layer: nothing beside a wide pass, a tenth of a small decoding step
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export

ANY = Dim.DYNAMIC
OPTIONS = {"aot_inductor.package_constants_in_so": False}
Run = Callable[[list[Tensor]], list[Tensor]]  # a graph's inputs to its outputs, in flat lists


class _Step(nn.Module):
    """A function of a model and tensors, as a module."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.model, *arguments)


def trace(
    model: nn.Module, function: Callable[..., Any], examples: tuple[Tensor, ...], sizes: tuple[dict[int, Any], ...]
) -> ExportedProgram:
    """The graph of `function(model, *examples)`.

    Args:
        examples: no size that may differ is one, which is special.
        sizes: for each of them the dimensions of `ANY` size.
    """
    with torch.inference_mode(False), torch.no_grad():  # inference tensors may not be traced
        like = tuple(_like(example) for example in examples)
        how: dict[str, Any] = {"args": like, "dynamic_shapes": (sizes,)}
        try:
            return export(_Step(model, function), **how, strict=False)
        except UserError:  # it took a size for a number; to read the code, not run it, takes twice as long
            return export(_Step(model, function), **how, strict=True)


def library(program: ExportedProgram) -> Run:
    """What a graph compiles to, from disk if it ever was."""
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


@dataclass(frozen=True)
class _Part:
    """Nodes of a graph that follow each other, as a graph of their own."""

    graph: fx.GraphModule
    inputs: list[str]  # names in the whole graph
    outputs: list[str]

    def signature(self) -> str:
        """The same for parts that compile to the same: nodes and sizes are named by their order."""
        nodes, sizes = {node: f"%{i}" for i, node in enumerate(self.graph.graph.nodes)}, dict[str, str]()
        lines = []
        for node in nodes:
            value = node.meta.get("val") if node.op == "placeholder" else None
            kind = f"{value.dtype} {value.shape} {value.stride()}" if isinstance(value, Tensor) else ""
            kind = re.sub(r"\b[su]\d+\b", lambda size: sizes.setdefault(size[0], f"s{len(sizes)}"), kind)
            target = node.op if node.op in ("placeholder", "output") else node.target
            arguments = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
            lines.append(f"{target} {arguments} {kind}")
        return "\n".join(lines)

    def exported(self) -> ExportedProgram:
        """The part as a program of its own, of which weights are inputs too."""
        values = [node.meta["val"] for node in self.graph.graph.nodes if node.op == "placeholder"]
        sizes = tuple({i: ANY for i, size in enumerate(value.shape) if isinstance(size, SymInt)} for value in values)
        examples = tuple(
            torch.empty([int(size) for size in value.shape], dtype=value.dtype) if larger else value
            for value, larger in zip(values, sizes, strict=True)
        )
        return trace(self.graph, lambda graph, *inputs: graph(*inputs), examples, sizes)


def layered(
    program: ExportedProgram, layers: Collection[str], compile: Callable[[ExportedProgram], Run]
) -> Callable[[list[Tensor], int | None], list[Tensor]]:
    """A graph of which the layers are compiled, those that do the same once.

    Args:
        layers: the names of the layers' classes.
        compile: `library`.

    Returns:
        runs it: takes how many of its outputs are wanted as well, None for all.
    """
    parts = _split(program, layers)
    signatures = [part.signature() for part in parts]
    repeated = [signature for signature in dict.fromkeys(signatures) if signatures.count(signature) > 1]
    made = {signature: compile(parts[signatures.index(signature)].exported()) for signature in repeated}
    fixed = _lifted(program)
    given = [node.name for node in program.graph.nodes if node.op == "placeholder" and node.name not in fixed]
    results = [node.name for node in _results(program)]
    last = {name: i for i, part in enumerate(parts) for name in part.inputs}  # who reads it last
    done = [[name for name in part.inputs if last[name] == i] for i, part in enumerate(parts)]

    def run(inputs: list[Tensor], wanted: int | None) -> list[Tensor]:
        values = {**fixed, **dict(zip(given, inputs, strict=True))}
        returned = results[:wanted]
        for part, signature, names in zip(parts, signatures, done, strict=True):
            read = [values[name] for name in part.inputs]
            outputs = made[signature](read) if signature in made else part.graph(*read)
            for name, output in zip(part.outputs, outputs, strict=True):
                values[name] = output.contiguous()  # as the parts' programs have them
            for name in names:
                if name not in returned:
                    del values[name]
        return [values[name] for name in returned]

    return run


def _split(program: ExportedProgram, layers: Collection[str]) -> list[_Part]:
    """The graph in the order that it runs in: what comes before the first layer, each layer, and what comes behind."""
    groups: list[list[fx.Node]] = [[]]
    inside: str | None = None
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_free(node):
            modules = node.meta.get("nn_module_stack", {}).values()
            layer = next((path for path, kind in modules if str(kind).rpartition(".")[2] in layers), None)
            if node.target is getitem:  # of several outputs: where they are
                layer = inside
            if layer != inside:
                groups.append([])
            groups[-1].append(node)
            inside = layer
    reads = []
    for own in groups:
        mine = set(own)
        read = [source for node in own for source in _sources(node) if source not in mine]
        reads.append(list(dict.fromkeys(read)))
    wanted = {*chain.from_iterable(reads), *_results(program)}
    return [
        _part(program, inputs, own, [node for node in own if node in wanted])
        for inputs, own in zip(reads, groups, strict=True)
    ]


def _part(program: ExportedProgram, inputs: list[fx.Node], own: list[fx.Node], outputs: list[fx.Node]) -> _Part:
    """Nodes of a graph as one of their own; what is free is copied."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in own:
        copy(node)
    graph.output(tuple(copies[node] for node in outputs))
    module = fx.GraphModule(program.graph_module, graph)
    return _Part(module, [node.name for node in inputs], [node.name for node in outputs])


def _is_free(node: fx.Node) -> bool:
    """Whether a node costs nothing, a size or what is done with sizes: it is found again wherever it is needed."""
    return node.op == "get_attr" or isinstance(node.meta.get("val"), SymInt | torch.SymBool | torch.SymFloat | int)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads, or what the sizes that it reads are those of."""
    for source in node.all_input_nodes:
        if source.op != "placeholder" and _is_free(source):
            yield from _sources(source)
        else:
            yield source


def _results(program: ExportedProgram) -> list[fx.Node]:
    """The nodes that a graph returns."""
    return list(program.graph.output_node().args[0])


def _lifted(program: ExportedProgram) -> dict[str, Tensor]:
    """The weights, buffers and constants among the graph's inputs."""
    signature, tensors = program.graph_signature, _weights(program)
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {name: tensors[weight] for name, weight in lifted.items()}


def _like(tensor: Tensor) -> Tensor:
    """Another one, in the same places of memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _weights(program: ExportedProgram) -> dict[str, Tensor]:
    """The parameters and buffers that a graph reads, by name."""
    return {name: tensor.detach() for name, tensor in {**program.constants, **program.state_dict}.items()}


def _place(program: ExportedProgram) -> Path:
    """Where the library of a graph is kept: named after all that it depends on."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]  # weights among them
    inputs = [(value.dtype, value.shape, value.stride()) for value in values]
    code = [line for line in str(program).splitlines() if not line.lstrip().startswith("#")]  # they name folders
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    depends = *machine, OPTIONS, inputs, code
    return Path(cache_dir()) / "parse" / f"{sha256(repr(depends).encode()).hexdigest()[:32]}.pt2"
