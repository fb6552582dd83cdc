"""Key-value caches that commit a prefix and drop the rest at no cost.

Keys and values of many texts live in one buffer per layer, one row per text; a text's length is a number. Reading
appends after that length, and rolling back lowers it: nothing is copied, and what was verified stays as the
packed pass wrote it. Works with every `transformers` model whose layers call `Cache.update`, because it is a
`transformers.Cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_GROWTH = 256  # tokens; buffers hold a multiple of it


@dataclass
class Window:
    """Where the forward pass that is going on reads and writes, for all layers."""

    rows: int  # of the buffers
    chosen: slice | list[int]  # rows that take part, B of them
    starts: list[int]  # B: the cached tokens of each
    multiple: int = 1  # so many keys at a time are read

    @property
    def start(self) -> int:
        """The cached tokens of the longest text."""
        return max(self.starts, default=0)


class PrefixLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: keys and values [rows, heads, capacity, D]."""

    is_croppable = True
    is_sliding = False

    def __init__(self, window: Window, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape and type from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = [
            new.new_zeros((self.window.rows, new.shape[1], 0, new.shape[-1])) for new in (key_states, value_states)
        ]
        self.buffers = empty[0], empty[1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T positions to each chosen text; return their keys and values so far, [B, heads, P, D] each.

        P is the length of the longest, or more: after the end of a text stands what its queries must not see.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, length = self.window, key_states.shape[2]
        stop = window.start + length
        read = -(-stop // window.multiple) * window.multiple
        self.grow(window.rows, read)
        ragged = min(window.starts) < window.start
        adjacent = isinstance(window.chosen, slice)
        rows = None if adjacent and not ragged else torch.arange(window.rows, device=self.device)[window.chosen]  # [B]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if ragged:
                starts = torch.tensor(window.starts, device=self.device)  # [B]
                key_index = starts[:, None] + torch.arange(length, device=self.device)  # [B, T]
                buffer[cast(Tensor, rows)[:, None], :, key_index] = states.transpose(1, 2)  # [B, T, heads, D]
            else:
                buffer[window.chosen, :, window.start : stop] = states
        keys, values = (
            buffer[window.chosen, :, :read] if adjacent else buffer[:, :, :read].index_select(0, cast(Tensor, rows))
            for buffer in self.buffers  # index_select copies whole runs, several times faster than an index
        )
        return keys, values

    def grow(self, rows: int, tokens: int) -> None:
        """Make room for so many texts and tokens each; zeros after what is held, for what is unseen is a number."""
        held_rows, _, held, _ = self.buffers[0].shape
        if rows <= held_rows and tokens <= held:
            return
        capacity = held if tokens <= held else -(-max(tokens, 2 * held) // _GROWTH) * _GROWTH
        larger = [old.new_zeros((max(rows, held_rows), old.shape[1], capacity, old.shape[3])) for old in self.buffers]
        for old, new in zip(self.buffers, larger, strict=True):
            new[:held_rows, :, :held] = old
        self.buffers = larger[0], larger[1]

    def get_seq_length(self) -> int:
        """Cached positions of the text that is being read."""
        return self.window.start

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass of `query_length` queries sees, and the first one's position."""
        return self.window.start + query_length, 0


class PrefixCache(Cache):
    """A model's cache over texts of any lengths, a row each."""

    def __init__(self, rows: int = 1) -> None:
        self.window = Window(rows, slice(0, 1), [0])
        self.lengths = [0] * rows
        self._buffers: list[tuple[Tensor, Tensor]] = []  # what `buffers` gave last
        self.recorded: dict[Any, Any] = {}  # CUDA graphs over the buffers, for as long as those stay where they are
        make = partial(PrefixLayer, self.window)
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], make))

    @contextmanager
    def reading(self, rows: list[int]) -> Iterator[None]:
        """A forward pass over some rows, each after its own length."""
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        self.window.chosen = slice(rows[0], rows[0] + len(rows)) if adjacent else rows  # a view where it can be
        self.window.starts = [self.lengths[row] for row in rows]
        yield

    def extend(self, rows: Sequence[int], widths: Sequence[int]) -> None:
        """Each row holds so many tokens more."""
        for row, width in zip(rows, widths, strict=True):
            self.lengths[row] += width

    def truncate(self, length: int, row: int = 0) -> None:
        """Keep the first `length` tokens of a text and forget the rest.

        Raises:
            ValueError: if fewer than `length` tokens are cached.
        """
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot keep {length} of {self.lengths[row]} cached tokens")
        self.lengths[row] = length

    def add_row(self) -> int:
        """Room for one text more: its row."""
        self.lengths.append(0)
        self.window.rows = len(self.lengths)
        return len(self.lengths) - 1

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Forget a text, and leave nothing behind that is not a number."""
        self.lengths[row] = 0
        for layer in self._prefix_layers:
            if layer.is_initialized:
                for buffer in layer.buffers:
                    buffer[row : row + 1] = 0

    def buffers(self, rows: int = 0, tokens: int = 0) -> list[tuple[Tensor, Tensor]]:
        """All keys and values, one pair per layer, [rows, heads, capacity, D], grown to so many rows and tokens."""
        layers, held = self._prefix_layers, self._buffers
        rows = max(rows, self.window.rows)
        if not held or held[-1] is not layers[-1].buffers or rows > held[0][0].shape[0] or tokens > held[0][0].shape[2]:
            for layer in layers:
                layer.grow(rows, tokens)
            self._buffers = [layer.buffers for layer in layers]
            self.recorded.clear()
        return self._buffers

    def states(self, row: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a text [heads, length, D], one pair per layer."""
        length = self.lengths[row]
        return [(keys[row, :, :length], values[row, :, :length]) for keys, values in self.buffers()]

    @property
    def _prefix_layers(self) -> list[PrefixLayer]:
        return cast(list[PrefixLayer], self.layers)


class BufferLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer for a compiled pass: a `PrefixLayer`'s buffers, written where a tensor says."""

    is_croppable = False
    is_sliding = False

    def __init__(self, buffers: tuple[Tensor, Tensor], rows: Tensor | None, key_index: Tensor, key: Tensor) -> None:
        """Set up.

        Args:
            buffers: keys and values [rows, heads, capacity, D].
            rows: int64 [B], each text's row; None: the first B.
            key_index: int64 [B, T], the position in its row that each new token takes.
            key: int64 [P], 0 to P - 1: how many to read.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers, self.rows, self.key_index, self.key, self.is_initialized = buffers, rows, key_index, key, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write T positions; return the texts' keys and values [B, heads, P, D]."""
        rows = torch.arange(self.key_index.shape[0], device=self.key_index.device) if self.rows is None else self.rows
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows[:, None], :, self.key_index] = states.transpose(1, 2)  # [B, T, heads, D]
        # in no nested scope: there a compiler takes sizes for numbers
        texts, stop = self.key_index.shape[0], self.key.shape[0]
        if self.rows is None:
            return self.buffers[0][:texts, :, :stop], self.buffers[1][:texts, :, :stop]
        return self.buffers[0][:, :, :stop][rows], self.buffers[1][:, :, :stop][rows]

    def get_seq_length(self) -> int:
        """None are known before the pass: positions and masks are always given."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that are read, and the first one's position."""
        return self.key.shape[0], 0
