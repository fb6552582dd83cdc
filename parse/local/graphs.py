"""Passes on a GPU: a model's layers compiled once for all that do the same, and decoding steps replayed as CUDA graphs.

A step of a large model is bound by the memory that its weights come from, if nothing else takes time: neither Python
and the start of kernels, which a CUDA graph does away with, nor the many small kernels between the matrix products,
which the compiler fuses. A whole model would take the compiler as many times longer as it has layers, and again for
each bucket of shapes; one layer is compiled for any number of texts, tokens and keys, and the others find it compiled.
What is left to do for a bucket is to record its CUDA graph.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parse.local.cache import BufferLayer
from parse.local.loading import FLEX, SDPA, softcap_of

GROUPED = "grouped_sdpa"  # our attention, in `transformers`' list of them
PLAIN = (SDPA, FLEX)  # those that it stands for
RECORDING = "transformers.utils.output_capturing"
RECOMPILE_LIMIT = 64  # forms of a layer's pass: kinds of layers, one text or many, a row or many
Recorded = Callable[[Tensor], Sequence[Tensor]]
SIZED = {2: (0, 1), 3: (0, 1), 4: (0, 2, 3)}  # dimensions of a layer's inputs that differ from pass to pass


class CompiledLayers:
    """A model's layers, compiled by `torch.compile` when they first run in some form."""

    def __init__(self, model: PreTrainedModel, backend: Any) -> None:
        kinds = set(model._no_split_modules or ())  # the names of its layers' classes
        self.model, self.compiling = model, True
        self.layers = [module for module in model.modules() if type(module).__name__ in kinds]
        self._within = [[module for module in layer.modules() if module is not layer] for layer in self.layers]
        self._run = {wide: compiled(_forward, backend, _takes_note) for wide in (False, True)}

    @property
    def are_all(self) -> bool:
        """Whether these are the model's layers, each with its class's forward pass, which no library has wrapped."""
        plain = all("forward" not in vars(layer) for layer in self.layers)
        return plain and len(self.layers) == self.model.config.num_hidden_layers

    @contextmanager
    def running(self, wide: bool) -> Iterator[None]:
        """Within, the model's forward pass over a cache of `BufferLayer`s runs its compiled layers."""
        layers = self.layers if self.compiling else []
        for index, layer in enumerate(layers):
            layer.forward = partial(self._through, wide, index)
        try:
            with attending(self.model), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                yield
        finally:
            for layer in layers:
                del layer.forward

    def _through(self, wide: bool, index: int, *arguments: Any, **named: Any) -> Any:
        """A layer's pass: what differs in size from pass to pass is marked, and the cache is this layer's own."""
        mine = partial(_as_input, index)
        arguments, named = tuple(map(mine, arguments)), {name: mine(value) for name, value in named.items()}
        with _unrecorded(self._within[index]):  # only now: a pass hooks them when it begins
            return self._run[wide](self.layers[index], *arguments, **named)


@contextmanager
def _unrecorded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these modules lack the hooks that `transformers` leaves in them once a pass was asked for its states.

    They record what is within a layer, which nobody asks for, and no compiler can read them. Those of the layers
    themselves, which record the states, stay.
    """
    hooked = [(module, module._forward_hooks) for module in modules if module._forward_hooks]
    for module, hooks in hooked:
        others = {key: hook for key, hook in hooks.items() if hook.__module__ != RECORDING}
        module._forward_hooks = OrderedDict(others)
    try:
        yield
    finally:
        for module, hooks in hooked:
            module._forward_hooks = hooks


def compiled(function: Callable[..., Any], backend: Any, guarded: Callable[[str], bool]) -> Callable[..., Any]:
    """A function, to be compiled in one piece when it is first called, with sizes as they are but for those marked.

    Args:
        guarded: whether a graph is made anew where what has this name, as of the function's arguments, is another.
    """
    code = function.__code__.replace()  # one of its own, lest another model's graphs count towards this one's limit
    return torch.compile(
        FunctionType(code, function.__globals__),
        fullgraph=True,
        dynamic=False,
        backend=backend,
        options={"guard_filter_fn": lambda guards: [guarded(guard.name) for guard in guards]},
    )


def _takes_note(name: str) -> bool:
    """Layers that differ in nothing but their number are one graph, which holds no number: `_OneLayer` needs none."""
    return not name.endswith(".layer_idx")


def _forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(layer).forward(layer, *arguments, **named)


def _as_input(index: int, value: Any) -> Any:
    if isinstance(value, Cache):
        return _OneLayer(cast(BufferLayer, value.layers[index]))
    if isinstance(value, tuple):
        return tuple(_as_input(index, part) for part in value)
    return of_any_size(value, *SIZED.get(value.dim(), ())) if isinstance(value, Tensor) else value


def of_any_size(tensor: Tensor, *dimensions: int) -> Tensor:
    """The tensor, seen so that a graph takes any size of these dimensions; a size of one is special, and stays."""
    view = tensor.view_as(tensor)  # the mark is for this pass alone
    for dimension in dimensions:
        if view.shape[dimension] > 1:
            torch._dynamo.maybe_mark_dynamic(view, dimension)
    return view


class _OneLayer(Cache):
    """The cache of the layer that is running, whatever its number."""

    def __init__(self, layer: BufferLayer) -> None:
        buffers = of_any_size(layer.buffers[0], 0, 2), of_any_size(layer.buffers[1], 0, 2)
        rows = None if layer.rows is None else of_any_size(layer.rows, 0)
        super().__init__(
            layers=[BufferLayer(buffers, rows, of_any_size(layer.key_index, 0, 1), of_any_size(layer.key, 0))]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `BufferLayer`."""
        return cast(BufferLayer, self.layers[0]).update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None are known before the pass."""
        return 0


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """Within, a model that attends plainly does so without copies of the keys that several heads share."""
    config = model.config
    before = config._attn_implementation
    if before not in PLAIN or softcap_of(model) or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention, [B, T, heads, D], of queries [B, heads, T, D] to keys and values [B, key heads, P, D].

    The heads that share keys become the queries of one head, one after the other. Where there is a mask,
    `transformers` copies the keys for each of them instead.
    """
    groups, special = query.shape[1] // key.shape[1], others.get("position_bias") is not None
    if attention_mask is None or groups == 1 or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    # [B, key heads, groups * T, D]
    folded = query.reshape(query.shape[0], key.shape[1], groups * query.shape[2], query.shape[3])
    mask = attention_mask.repeat(1, 1, groups, 1)  # [B, 1, groups * T, P]
    attended = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(*query.shape[:3], value.shape[-1]).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)


class Recorder:
    """Records passes as CUDA graphs, which all compute in the same memory, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def record(self, run: Callable[[Tensor], Sequence[Tensor]], numbers: Tensor, first: bool) -> Recorded:
        """A pass as a CUDA graph, which is replayed over other numbers; elsewhere than on a GPU the pass itself.

        Args:
            run: reads and writes, beside its argument, nothing but tensors that stay where they are, and waits for
                none.
            numbers: of a first pass, which is run to compile what is not compiled yet.
            first: no other graph is left, so that the memory of those before is gone.

        Returns:
            the replay; its outputs are copies, for the next replay writes over what it gives.
        """
        if self.device.type != "cuda":
            return run
        if first or self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        held, stream = numbers.clone(), _stream(self.device)
        gc.collect()  # lest an old graph is taken down within
        with torch.cuda.device(self.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(held)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                outputs = run(held)

        def replay(numbers: Tensor) -> list[Tensor]:
            held.copy_(numbers)
            graph.replay()
            return [output.clone() for output in outputs]

        return replay


@cache
def _stream(device: torch.device) -> Any:
    """The stream of a device on which graphs are recorded, after a first run there.

    cuBLAS takes memory of its own for each stream when it first runs on it, and keeps it. Were that within a recording,
    it would be the graphs' memory, and outlive them, which PyTorch does not allow.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def attention_kernels(device: torch.device) -> Iterator[None]:
    """Within, PyTorch's attention on a GPU is not cuDNN's, which makes a plan for each new shape."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
