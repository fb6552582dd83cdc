"""Compiled forward passes over the cache's own buffers.

Where a model is small or the hardware fast, most of a decoding step is Python and the start of kernels, not
arithmetic. A compiled step has neither, but costs seconds to minutes to make: it is kept on disk (in torch's own
folder, TORCHINDUCTOR_CACHE_DIR), and made only once such steps have taken `patience` seconds without. Where it pays:

    on a CPU   models up to `LARGEST` bytes: larger ones are bound by memory and take the same time. Decoding
               steps, a bucket a count of texts, and wide passes, of any size in one graph. Wide passes of models of
               `DEEP` layers or more are made layer by layer, half a minute: a quarter to two fifths less time. Those
               of fewer layers are made whole, as quickly: a short pass of two layers takes a fifth of its time. Their
               steps compute attention in loops, see `_attention_in_loops`.
    on a GPU   always, see `parse.local.graphs`: decoding steps, as a CUDA graph a bucket, which is a count of texts and
               keys; and wide passes (prompts, packed passes).
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parse.layout import integers, sight, visible
from parse.local.ahead import ANY, Run, layered, library, trace
from parse.local.cache import BufferLayer, PrefixCache
from parse.local.graphs import CompiledLayers, Recorder
from parse.local.linear import few_rows, linears
from parse.local.loading import FLEX, SLIDING, attention_types, is_distributed
from parse.local.locks import others_idle

Shape = tuple[int, int]  # texts B and keys P of a decoding step; 0: any number of them
Buffers = list[tuple[Tensor, Tensor]]
Backend = Literal["inductor"] | Callable[..., Any]  # a function of the graph and its inputs, as of `torch.compile`

PATIENCE = 20.0  # seconds
LARGEST = 200 * 2**20  # bytes of weights
DEEP = 8  # layers: of so many the same code is better run again and again than made into one piece
WIDE: Shape = (0, 0)  # a pass of more than one token a text
STEP: Shape = (1, 0)
_KEYS = 64  # keys are a multiple of it, and on a GPU four times a power of two of it


class Read(NamedTuple):
    """What a forward pass gives B texts."""

    logits: Tensor  # [B, M, V]
    states: tuple[Tensor, ...] = ()  # hidden states [B, T, D] behind 0, 1, ... layers, where asked for
    following: Tensor | None = None  # behind a step: int64 [5, B, 1], the numbers of the one that reads its likeliest


class Compiled:
    """A model's compiled passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        patience: float = PATIENCE,
        backend: Backend = "inductor",
        width: int | None = None,
    ) -> None:
        """Set up; nothing is compiled yet.

        Args:
            patience: seconds that a step may take, over all its passes, before it is compiled.
            backend: what compiles the graph.
            width: only the first so many logits are kept; None keeps all.
        """
        self.model, self.patience, self.device = model, patience, model.device
        self._forward = partial(forward, width=width)
        self.graph = self.device.type == "cuda"
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # its layers are moved to by hooks
        split = is_distributed(model)  # each of its processes would compile at a moment of its own
        small = self.device.type == "cpu" and weights <= LARGEST
        self._layers = CompiledLayers(model, backend)
        pays = not spread and not split and ((self.graph and self._layers.are_all) or small)
        self._deep = model.config.num_hidden_layers >= DEEP
        # FlexAttention compiles a kernel of its own for wide passes; steps take dense masks all the same
        by_blocks = self.graph and model.config._attn_implementation == FLEX
        self.pays = {"steps": pays, "wide": pays and not by_blocks}
        self.kept: dict[tuple[Any, ...], Callable[..., Read]] = {}  # compiled, by all that a graph is made for
        self._waited: dict[Shape, float] = defaultdict(float)
        self._recorder = Recorder(self.device)
        self._said: set[tuple[Any, ...]] = set()  # what was compiled with a word
        self._key = torch.arange(0)  # [P], or longer: of the longest text so far
        self._linears = linears(model)
        self._backend = backend

    def _compile(self, arguments: tuple[Any, ...], first: bool) -> Callable[..., Read]:
        """A graph for passes like this one: it is looked up by all that it is made for.

        Args:
            first: there is no other of its kind.
        """
        numbers, _, _, buffers, keep, with_states = arguments
        if self.graph:
            return self._wide_by_layers if keep is not None else self._record(arguments, first)
        if keep is None:
            return self._compile_step(numbers.shape[1], buffers, with_states)
        return self._compile_wide(buffers)

    def _wide_by_layers(self, *arguments: Any) -> Read:
        """A wide pass on a GPU."""
        with self._layers.running(wide=True):
            return self._forward(self.model, *arguments)

    def _record(self, arguments: tuple[Any, ...], first: bool) -> Callable[..., Read]:
        """A step on a GPU, replayed for as long as the buffers stay where they are."""

        def run(numbers: Tensor) -> list[Tensor]:
            with self._layers.running(wide=False):
                logits, states, following = self._forward(self.model, numbers, *arguments[1:])
            return [cast(Tensor, following), logits, *states]

        replay = self._recorder.record(run, arguments[0], first)

        def step(numbers: Tensor, *_: Any) -> Read:
            following, logits, *states = replay(numbers)
            return Read(logits, tuple(states), following)

        return step

    def _compile_step(self, texts: int, buffers: Buffers, with_states: bool) -> Callable[..., Read]:
        """Steps on a CPU as one library, for any number of keys and rows."""

        def flat(model: PreTrainedModel, numbers: Tensor, key: Tensor, *held: Tensor) -> tuple[Tensor | None, ...]:
            logits, states, following = self._forward(model, numbers, None, key, _pairs(held), None, with_states)
            return following, logits, *states

        room = self._room(buffers, texts + 1)
        examples = torch.zeros(5, texts, 1, dtype=torch.long), torch.arange(128), *room
        run = self._make(trace(self.model, flat, examples, ({}, {0: ANY}, *[{0: ANY, 2: ANY}] * len(room))))

        def step(numbers: Tensor, _: None, key: Tensor, buffers: Buffers, *__: Any) -> Read:
            following, logits, *states = run([numbers, key, *chain.from_iterable(buffers)])
            return Read(logits, tuple(states), following)

        return step

    def _compile_wide(self, buffers: Buffers) -> Callable[..., Read]:
        """Wide passes on a CPU, for any number of texts, tokens, keys, rows and logits, and for states."""

        def flat(
            model: PreTrainedModel, numbers: Tensor, rows: Tensor, key: Tensor, keep: Tensor, *held: Tensor
        ) -> tuple[Tensor, ...]:
            logits, states, _ = self._forward(model, numbers, rows, key, _pairs(held), keep, True)
            return logits, *states

        texts = 2 if torch.get_num_threads() == 3 else 3  # as many as threads would seem parallel enough
        room = self._room(buffers, texts + 1)
        numbers = torch.zeros(5, texts, 24, dtype=torch.long)  # [5, B, T]
        examples = numbers, torch.arange(texts), torch.arange(128), torch.arange(5), *room
        sizes = {1: ANY, 2: ANY}, {0: ANY}, {0: ANY}, {0: ANY}, *[{0: ANY, 2: ANY}] * len(room)
        program = trace(self.model, flat, examples, sizes)
        if self._deep:
            run = layered(program, self.model._no_split_modules or (), self._make)
        else:
            whole = self._make(program)
            run = lambda inputs, wanted: whole(inputs)[:wanted]

        def read(numbers: Tensor, rows: Tensor, key: Tensor, buffers: Buffers, keep: Tensor, with_states: bool) -> Read:
            logits, *states = run([numbers, rows, key, keep, *chain.from_iterable(buffers)], None if with_states else 1)
            return Read(logits, tuple(states))

        return read

    def _room(self, buffers: Buffers, rows: int) -> list[Tensor]:
        """Buffers of other sizes, for a trace: keys and values [rows, heads, 160, D] of each layer."""
        shapes = [buffer.shape for buffer in chain.from_iterable(buffers)]
        return [torch.empty(rows, heads, 160, size, dtype=self.model.dtype) for _, heads, _, size in shapes]

    def _make(self, program: ExportedProgram) -> Run:
        """What runs a graph on a CPU."""
        if self._backend == "inductor":
            return library(program)
        graph = self._backend(program.module(check_guards=False), program.example_inputs)
        return lambda inputs: graph(*inputs)

    def shape(self, rows: int, width: int, longest: int) -> Shape | None:
        """The bucket of a pass, or None where it does not pay to compile it.

        Args:
            rows: texts, from the cache's first row on.
            width: tokens of the widest.
            longest: keys of the longest text after the pass.
        """
        if not self.pays["wide" if width > 1 else "steps"]:
            return None
        if width > 1:
            return WIDE
        bits = (rows - 1).bit_length()
        if self.graph:
            return 1 << bits, max(4 * _KEYS, 1 << (longest - 1).bit_length())
        return 1 << bits + bits % 2, 0  # a power of four: a few idle texts more cost less than a compilation

    def is_due(self, shape: Shape) -> bool:
        """Whether passes of this shape are compiled, or have waited long enough to be."""
        return self._waited[self._kind(shape)] >= self.patience

    def waited(self, shape: Shape, seconds: float) -> None:
        """Count the time that passes of this shape have taken without."""
        self._waited[self._kind(shape)] += seconds

    def _kind(self, shape: Shape) -> Shape:
        """The shapes that are compiled together: on a GPU all steps."""
        return STEP if self.graph and shape != WIDE else shape

    def __call__(
        self,
        shape: Shape,
        numbers: Tensor,
        rows: list[int] | None,
        longest: int,
        cache: PrefixCache,
        kept: Sequence[int],
        with_states: bool,
    ) -> Read | None:
        """Run a pass; the rows' lengths do not change. None, and a warning, if it cannot be compiled.

        Args:
            numbers: int64 [5, B, T], see `forward`.
            rows: the B rows of the texts; None: the first B.
            longest: keys of the longest text after the pass.
            kept: M indices of the tokens whose logits are needed.
        """
        key, buffers = self._held(shape, longest, cache)
        keep = None if shape != WIDE else integers(kept).to(self.device)  # [M]
        if self.graph and rows == list(range(len(rows or ()))):  # a view of the buffers, and no copy
            rows = None
        places = None if rows is None else integers(rows).to(self.device)  # [B]
        arguments = numbers.to(self.device), places, key, buffers, keep, with_states
        graphs, made = self._graphs_of(shape, cache), self._made(shape, arguments)
        if (graph := graphs.get(made)) is not None:
            return self.run(graph, arguments)
        graph, output = self._first(arguments, first=not graphs)
        if graph is not None:
            graphs[made] = graph
        return output

    def _graphs_of(self, shape: Shape, cache: PrefixCache) -> dict[Any, Callable[..., Read]]:
        """The graphs that there are; those of steps on a GPU hold the places of a cache's buffers."""
        return cache.recorded if self.graph and shape != WIDE else self.kept

    def follow(
        self, numbers: Tensor, rows: Sequence[int], cache: PrefixCache, take: Callable[[Sequence[int]], bool]
    ) -> Read | None:
        """Go on behind a step, each step reading the likeliest token behind the one before it, as far as its keys go.

        Args:
            numbers: int64 [5, B, 1], what followed.
            rows: the texts that write; their lengths do not change.
            take: is given a token for each of them; whether they are to be read.

        Returns:
            what the last step gave; None where there was none, or the next bucket is not compiled yet.
        """
        read, longest = None, max(cache.lengths) + 1
        shape = self.shape(max(rows) + 1, 1, longest)
        assert shape is not None
        key, buffers = self._held(shape, longest, cache)  # [P], a pair a layer
        graph = self._graphs_of(shape, cache).get(self._made(shape, (numbers, None, key, buffers, None, False)))
        if graph is None:
            return None
        for _ in range(len(key) - max(cache.lengths[row] for row in rows)):
            likeliest = numbers.tolist()[0]  # [B][1]; faster than to choose first
            if not take([likeliest[row][0] for row in rows]):
                break
            read = self.run(graph, (numbers, None, key, buffers, None, False))
            assert read.following is not None
            numbers = read.following  # [5, B, 1]
        return read

    def _held(self, shape: Shape, longest: int, cache: PrefixCache) -> tuple[Tensor, Buffers]:
        """The key numbers and the buffers of a pass, see `forward`."""
        keys = shape[1] or -(-longest // _KEYS) * _KEYS
        if self._key.shape[0] < keys:
            self._key = torch.arange(2 * keys, device=self.device)
        fixed = self.graph and shape != WIDE  # else never read buffers to their very end, which is a graph of its own
        return self._key[:keys], cache.buffers(shape[0], keys if fixed else keys + 1)

    def _made(self, shape: Shape, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that a graph is made for."""
        with_states = arguments[5]
        if not self.graph:
            return shape, with_states and shape != WIDE, torch.get_num_threads()
        if shape != WIDE:
            return shape, with_states
        return self._form(arguments)

    def _form(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What layers are compiled for: sizes of one, or any other."""
        numbers, places, _, buffers, keep, _ = arguments
        return keep is None, places is None, numbers.shape[1] == 1, buffers[0][0].shape[0] == 1

    def _first(self, arguments: tuple[Any, ...], first: bool) -> tuple[Callable[..., Read] | None, Read | None]:
        """A pass that has to be compiled, and its output; None, for now, while another thread uses a model."""
        with others_idle() as idle:
            return self._compile_first(arguments, first) if idle else (None, None)

    def _compile_first(self, arguments: tuple[Any, ...], first: bool) -> tuple[Callable[..., Read] | None, Read | None]:
        """Compile a pass, and say what takes so long."""
        numbers, _, _, _, keep, _ = arguments
        name = self.model.config.name_or_path or self.model.config.model_type
        texts = "one text" if numbers.shape[1] == 1 else f"{numbers.shape[1]} texts"
        what = f"{'wide passes' if keep is not None else f'decoding steps of {texts}'} of {name}"
        quick = self.graph and self._form(arguments) in self._said
        started = perf_counter()
        if not quick:
            advice = f"{'seconds' if self.graph else 'a minute or more'}, once: it is kept on disk"
            print(f"compiling {what} ({advice}) ...", file=sys.stderr, flush=True)
        step = keep is None
        in_loops = step and not self.graph and not self._deep
        attention = _attention_in_loops() if in_loops else nullcontext()
        try:
            with few_rows([] if self.graph or not step else self._linears), attention:
                graph = self._compile(arguments, first)
                output = self.run(graph, arguments)
        except Exception as error:  # whatever a compiler may raise
            again = self.graph and step and self._layers.compiling
            self.pays["steps" if step else "wide"] = again
            self._layers.compiling = False
            how = "its steps are recorded as they are" if again else "it runs without"
            reason = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(f"{name} cannot be compiled here: {how}: {type(error).__name__}: {reason}", stacklevel=2)
            return self._compile_first(arguments, first=True) if again else (None, None)
        if not quick:
            print(f"... compiled {what} in {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            self._said.add(self._form(arguments))
        return graph, output

    def run(self, graph: Callable[..., Read], arguments: tuple[Any, ...]) -> Read:
        """One pass; the arguments are `forward`'s, but for the model."""
        return graph(*arguments)


@contextmanager
def _attention_in_loops() -> Iterator[None]:
    """Within, `transformers`' SDPA attends with one query by sums of products, as `parse.local.linear` does one row.

    The compiler makes loops of them, fused with all that stands around: a whole step runs as one kernel. With many
    layers that takes longer than SDPA: the code of a single kernel is too long for the caches.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _by_loops
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-untyped-call]


def _by_loops(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention, [B, T, heads, D]; query [B, heads, T, D], key and value [B, key heads, P, D], mask [B, 1, T, P]."""
    special = any(others.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if query.shape[2] > 1 or attention_mask is None or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (repeat_kv(key, groups) * (query * scale)).sum(-1)  # [B, heads, P]
    weights = scores.masked_fill(~attention_mask[:, :, 0], -torch.inf).softmax(-1)  # [B, heads, P]
    return (weights[..., None] * repeat_kv(value, groups)).sum(-2)[:, None], None


def _pairs(held: Sequence[Tensor]) -> Buffers:
    """Keys and values that follow each other, as pairs."""
    return list(zip(held[::2], held[1::2], strict=True))


def forward(
    model: PreTrainedModel,
    numbers: Tensor,
    rows: Tensor | None,
    key: Tensor,
    buffers: Buffers,
    keep: Tensor | None,
    with_states: bool,
    width: int | None = None,
) -> Read:
    """One pass as a graph: everything that changes from pass to pass is in a tensor.

    Args:
        numbers: int64 [5, B, T]: token ids, positions, and `limit`, `own`, `at` of `parse.layout.sight`.
        rows: int64 [B], each text's row in the buffers; None: the first B.
        key: int64 [P], 0 to P - 1: how many keys to read.
        buffers: a pair a layer, [rows, heads, capacity, D] with P positions at least; the new keys and values are
            written into them.
        keep: int64 [M], indices of the tokens whose logits are needed; None: the last one, of a decoding step.
        width: only the first so many logits are kept; None keeps all.
    """
    ids, positions, limit, own, at = numbers.unbind(0)  # [B, T] each
    for buffer in chain.from_iterable(buffers):
        torch._check(buffer.shape[2] == buffers[0][0].shape[2])  # type: ignore[no-untyped-call]  # one unknown, not L
    output = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=masks(model, limit, own, at, positions, keys=key.shape[0]),
        past_key_values=Cache(layers=[BufferLayer(pair, rows, at, key) for pair in buffers]),
        use_cache=True,
        output_hidden_states=with_states,
        logits_to_keep=1 if keep is None else keep,
    )
    logits = output.logits if width is None else output.logits[..., :width]  # [B, M, V]
    following = None
    if keep is None:
        likeliest = logits.argmax(-1)  # [B, 1]
        following = torch.cat([likeliest[None], numbers[1:] + (limit > 0)])  # [5, B, 1]; the idle stay where they are
    return Read(logits, output.hidden_states or (), following)


def masks(model: PreTrainedModel, *rows: Tensor, keys: int) -> Any:
    """The masks as the model takes them, [B, 1, T, P]: one, or a dict with one for each kind of its layers.

    By the model's attention: for "flex_attention" FlexAttention's block masks; for "eager", its own, numbers to be
    added to the scores, 0 or the lowest; else boolean.

    Args:
        rows: limit, own, at and positions, int64 [B, T] each; see `parse.layout.sight`.
        keys: P.
    """
    limit, own, at, positions = rows
    made: dict[str, Any] = {}
    for kind in sorted(attention_types(model.config)):
        window: int | None = model.config.sliding_window if kind == SLIDING else None
        if model.config._attn_implementation == FLEX:
            sees = sight(limit, own, at, positions, keys, window)
            made[kind] = create_block_mask(sees, at.shape[0], None, at.shape[1], keys, device=at.device)
            continue
        mask = visible(limit, own, at, positions, keys=keys, window=window)[:, None]  # [B, 1, T, P]
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
        made[kind] = mask
    return made if len(made) > 1 else made.popitem()[1]
