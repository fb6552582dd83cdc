"""Compiled forward passes over the cache's own buffers.

Where a model is small or the hardware fast, most of a decoding step is Python and the start of kernels, not arithmetic.
Compiling takes seconds to a minute: it happens in `warm_up`, never while a request is being answered, and what is not
compiled then runs as it is. Where it pays:

    on a CPU   decoding steps of models up to `LARGEST` bytes, whole: larger ones are bound by memory and take the same
               time. Layer by layer nothing is gained, for each call of a compiled function takes time.
    on a GPU   always: a model's layers, once for all that do the same, and decoding steps are replayed as CUDA graphs,
               see `parse.local.graphs`
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from time import perf_counter, sleep
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Cache, PreTrainedModel

from parse.layout import integers, mask_mod, visible
from parse.local.cache import BufferLayer, PrefixCache
from parse.local.graphs import CompiledLayers, Recorder, attending, compiled, of_any_size
from parse.local.loading import FLEX, SLIDING, attention_types, is_distributed
from parse.local.locks import others_idle, warming_up

Shape = tuple[int, int]  # texts B and keys P of a decoding step; 0: any number of them
Buffers = list[tuple[Tensor, Tensor]]
Arguments = tuple[Tensor, Tensor | None, Tensor, Buffers, Tensor | None, bool]  # of `forward`, after the model
Form = tuple[int, ...]  # what differs between graphs of a layer
Backend = Literal["inductor"] | Callable[..., Any]  # a function of the graph and its inputs, as of `torch.compile`

LARGEST = 200 * 2**20  # bytes of weights
WIDE: Shape = (0, 0)  # a pass of more than one token per text
_KEYS = 64  # keys are a multiple of it, and on a GPU four times a power of two of it


class Read(NamedTuple):
    """What a forward pass gives B texts."""

    logits: Tensor  # [B, M, V]
    states: tuple[Tensor, ...] = ()  # hidden states [B, T, D] after 0, 1, ... layers, where asked for
    following: Tensor | None = None  # after a step: int64 [5, B, 1], the numbers of the one that reads its likeliest


class Compiled:
    """A model's compiled passes."""

    def __init__(self, model: PreTrainedModel, backend: Backend = "inductor", width: int | None = None) -> None:
        """Set up; nothing is compiled yet.

        Args:
            backend: what compiles the graphs.
            width: only the first so many logits are kept; None keeps all.
        """
        self.model, self.device = model, model.device
        self._forward = partial(forward, width=width)
        self.graph = self.device.type == "cuda"
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # its layers are moved to by hooks
        split = is_distributed(model)  # each of its processes would compile at a moment of its own
        small = self.device.type == "cpu" and weights <= LARGEST
        self.layers = CompiledLayers(model, backend)
        # the model, and the functions that it calls, stay as they are
        self._step = compiled(_step, backend, guarded=lambda name: not name.startswith(("model", "G[")))
        self._width = width
        pays = not spread and not split and (small or (self.graph and self.layers.are_all))
        # FlexAttention compiles a kernel of its own for wide passes; steps take dense masks all the same
        self.pays = {"steps": pays, "wide": pays and self.graph and model.config._attn_implementation != FLEX}
        self.forms: set[Form] = set()  # what the layers are compiled for
        self._recorder = Recorder(self.device)
        self._warming: int | None = None  # the thread that warms it up
        self._said = False  # that it compiles
        self._key = torch.arange(0)  # [P], or longer: of the longest text so far

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Within, what passes of this thread need is compiled, and it is said what takes so long."""
        with warming_up:
            self._warming, self._said, started = get_ident(), False, perf_counter()
            try:
                yield
            finally:
                self._warming = None
                if self._said:
                    took = f"{perf_counter() - started:.0f} s"
                    print(f"... compiled {self._name} in {took}", file=sys.stderr, flush=True)

    @property
    def _name(self) -> str:
        return str(self.model.config.name_or_path or self.model.config.model_type)

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
        if self.graph:
            return 1 << (rows - 1).bit_length(), max(4 * _KEYS, 1 << (longest - 1).bit_length())
        return rows, 0

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
        """Run a pass; the rows' lengths do not change. None where it is not compiled.

        Args:
            numbers: int64 [5, B, T], see `forward`.
            rows: the B rows of the texts; None: the first B.
            longest: keys of the longest text after the pass.
            kept: M indices of the tokens whose logits are needed.
        """
        if with_states and not self.graph:
            return None
        key, buffers = self._held(shape, longest, cache)
        keep = None if shape != WIDE else integers(kept).to(self.device)  # [M]
        if rows == list(range(len(rows or ()))):  # a view of the buffers, and no copy
            rows = None
        places = None if rows is None else integers(rows).to(self.device)  # [B]
        arguments = numbers.to(self.device), places, key, buffers, keep, with_states
        form, warming = self._form(arguments), self._warming == get_ident()
        if form not in self.forms:
            return self._first(form, shape, arguments, cache, wait=True) if warming else None
        if self._is_recorded(shape, with_states, cache):
            return self.run(shape, arguments, cache)
        return self._first(form, shape, arguments, cache, wait=warming)

    def _form(self, arguments: Arguments) -> Form:
        """What layers are compiled for: sizes of one, or any other; and on a CPU a number of threads."""
        numbers, places, _, buffers, keep, _ = arguments
        threads = 0 if self.graph else torch.get_num_threads()
        return keep is None, places is None, numbers.shape[1] == 1, buffers[0][0].shape[0] == 1, threads

    def _is_recorded(self, shape: Shape, with_states: bool, cache: PrefixCache) -> bool:
        """Whether a pass can be run at once: a step on a GPU is recorded first, for each bucket of shapes."""
        return not self.graph or shape == WIDE or (shape, with_states) in cache.recorded

    def run(self, shape: Shape, arguments: Arguments, cache: PrefixCache) -> Read:
        """One pass: compiled whole on a CPU; on a GPU by compiled layers or, for steps, by a recorded graph."""
        if not self.graph:
            numbers, _, key, buffers, _, _ = arguments
            if self._warming:  # the sizes of what is compiled now are marked, and found marked in its graph
                numbers, key = of_any_size(numbers, 1), of_any_size(key, 0)
                buffers = [(of_any_size(keys, 0, 2), of_any_size(values, 0, 2)) for keys, values in buffers]
            with attending(self.model):
                step = self._step(self.model, numbers, key, buffers, self._width)
            return Read(step[0], following=step[1])
        if shape == WIDE:
            with self.layers.running(wide=True):
                return self._forward(self.model, *arguments)
        bucket = shape, arguments[5]
        if bucket not in cache.recorded:
            cache.recorded[bucket] = self._record(arguments, first=not cache.recorded)
        following, logits, *states = cache.recorded[bucket](arguments[0])
        return Read(logits, tuple(states), following)

    def _record(self, arguments: Arguments, first: bool) -> Callable[[Tensor], Sequence[Tensor]]:
        """A step on a GPU, to be replayed for as long as the buffers stay where they are."""

        def run(numbers: Tensor) -> list[Tensor]:
            with self.layers.running(wide=False):
                logits, states, following = self._forward(self.model, numbers, *arguments[1:])
            return [cast(Tensor, following), logits, *states]

        return self._recorder.record(run, arguments[0], first)

    def _first(self, form: Form, shape: Shape, arguments: Arguments, cache: PrefixCache, wait: bool) -> Read | None:
        """The first pass of a form, which compiles it, or of a bucket, which records it.

        Args:
            wait: for other threads' passes, for a compiler changes what all models share.

        Returns:
            None, with a warning, where it fails; None for now where other threads use models.
        """
        while True:
            with others_idle() as idle:
                if idle:
                    return self._made(form, shape, arguments, cache)
            if not wait:
                return None
            sleep(0.01)

    def _made(self, form: Form, shape: Shape, arguments: Arguments, cache: PrefixCache) -> Read | None:
        if self._warming and not self._said:
            self._said = True
            print(f"compiling {self._name} (a minute or so, once: it is kept on disk) ...", file=sys.stderr, flush=True)
        try:
            output = self.run(shape, arguments, cache)
        except Exception as error:  # whatever a compiler may raise
            return self._without(form, shape, arguments, cache, error)
        self.forms.add(form)
        return output

    def _without(
        self, form: Form, shape: Shape, arguments: Arguments, cache: PrefixCache, error: Exception
    ) -> Read | None:
        """Go on without the compiler: steps on a GPU are recorded as they are, all else runs eagerly."""
        again = self.graph and shape != WIDE and self.layers.compiling
        self.pays["wide" if shape == WIDE else "steps"] = again
        self.layers.compiling = False
        self._recorder = Recorder(self.device)  # with memory of its own: the last one's may hold half a graph
        how = "its steps are recorded as they are" if again else "it runs without"
        reason = " ".join(str(error).split("\n\n")[0].split())
        warnings.warn(f"{self._name} cannot be compiled here: {how}: {type(error).__name__}: {reason}", stacklevel=2)
        return self._made(form, shape, arguments, cache) if again else None

    def follow(
        self, numbers: Tensor, rows: Sequence[int], cache: PrefixCache, take: Callable[[Sequence[int]], bool]
    ) -> Read | None:
        """Go on after a step, each step reading the likeliest token after the one before it, as far as its keys go.

        Args:
            numbers: int64 [5, B, 1], what followed.
            rows: the texts that write; their lengths do not change.
            take: is given a token for each of them; whether they are to be read.

        Returns:
            what the last step gave; None where there was none.
        """
        read, longest = None, max(cache.lengths) + 1
        shape = self.shape(max(rows) + 1, 1, longest)
        assert shape is not None
        key, buffers = self._held(shape, longest, cache)  # [P], one pair per layer
        if not self._is_recorded(shape, False, cache):
            return None
        for _ in range(len(key) - max(cache.lengths[row] for row in rows)):
            likeliest = numbers.tolist()[0]  # [B][1]; faster than to choose first
            if not take([likeliest[row][0] for row in rows]):
                break
            read = self.run(shape, (numbers, None, key, buffers, None, False), cache)
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
        numbers: int64 [5, B, T]: token ids, positions, and limit, block_start, key_index; see `parse.layout.mask_mod`.
        rows: int64 [B], each text's row in the buffers; None: the first B.
        key: int64 [P], 0 to P - 1: how many keys to read.
        buffers: one pair per layer, [rows, heads, capacity, D] with P positions at least; the new keys and values are
            written into them.
        keep: int64 [M], indices of the tokens whose logits are needed; None: the last one, of a decoding step.
        width: only the first so many logits are kept; None keeps all.
    """
    ids, positions, limit, block_start, key_index = numbers.unbind(0)  # [B, T] each
    output = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=masks(model, limit, block_start, key_index, positions, keys=key.shape[0]),
        past_key_values=Cache(layers=[BufferLayer(pair, rows, key_index, key) for pair in buffers]),
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


def _step(model: PreTrainedModel, numbers: Tensor, key: Tensor, buffers: Buffers, width: int | None) -> Any:
    """A decoding step's logits and `following`, see `Read`."""
    read = forward(model, numbers, None, key, buffers, None, False, width)
    return read.logits, read.following


def masks(model: PreTrainedModel, *rows: Tensor, keys: int) -> Any:
    """The masks as the model takes them, [B, 1, T, P]: one, or a dict with one for each kind of its layers.

    By the model's attention: for "flex_attention" FlexAttention's block masks; for "eager", its own, numbers to be
    added to the scores, 0 or the lowest; else boolean.

    Args:
        rows: limit, block_start, key_index and positions, int64 [B, T] each; see `parse.layout.mask_mod`.
        keys: P.
    """
    limit, block_start, key_index, positions = rows
    made: dict[str, Any] = {}
    for kind in sorted(attention_types(model.config)):
        window: int | None = model.config.sliding_window if kind == SLIDING else None
        if model.config._attn_implementation == FLEX:
            sees = mask_mod(limit, block_start, key_index, positions, keys, window)
            made[kind] = create_block_mask(
                sees, key_index.shape[0], None, key_index.shape[1], keys, device=key_index.device
            )
            continue
        mask = visible(limit, block_start, key_index, positions, keys=keys, window=window)[:, None]  # [B, 1, T, P]
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
        made[kind] = mask
    return made if len(made) > 1 else made.popitem()[1]
