"""Key-value caches that commit a prefix and drop the rest at no cost.

Keys and values of many texts live in one buffer a layer, a row a text; a text's length is a number. Reading
appends behind that length, and rolling back lowers it: nothing is copied, and what was verified stays as the
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
        self._keys, self._values = (
            new.new_zeros((self.window.rows, new.shape[1], 0, new.shape[-1])) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T positions to each chosen text; return their keys and values so far, [B, heads, P, D] each.

        P is the length of the longest: behind the end of a shorter text stands what its queries must not see.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window, length = self.window, key_states.shape[2]
        stop = window.start + length
        if stop > self._keys.shape[2]:
            self._keys, self._values = _grown(self._keys, stop), _grown(self._values, stop)
        if min(window.starts) == window.start:
            self._keys[window.chosen, :, window.start : stop] = key_states
            self._values[window.chosen, :, window.start : stop] = value_states
        else:
            rows = torch.arange(self._keys.shape[0], device=self.device)[window.chosen][:, None]  # [B, 1]
            starts = torch.tensor(window.starts, device=self.device)  # [B]
            at = starts[:, None] + torch.arange(length, device=self.device)  # [B, T]
            self._keys[rows, :, at] = key_states.transpose(1, 2)  # [B, T, heads, D]
            self._values[rows, :, at] = value_states.transpose(1, 2)
        return self._keys[window.chosen, :, :stop], self._values[window.chosen, :, :stop]

    def states(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a text's first `length` tokens, [heads, length, D] each."""
        return self._keys[row, :, :length], self._values[row, :, :length]

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
        make = partial(PrefixLayer, self.window)
        super().__init__(layer_class_to_replicate=cast(type[CacheLayerMixin], make))

    @contextmanager
    def reading(self, rows: list[int], widths: Sequence[int]) -> Iterator[None]:
        """A forward pass over some rows, that makes each longer by its width."""
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        self.window.chosen = slice(rows[0], rows[0] + len(rows)) if adjacent else rows  # a view where it can be
        self.window.starts = [self.lengths[row] for row in rows]
        yield
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

    def states(self, row: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a text [heads, length, D], a pair a layer."""
        return [cast(PrefixLayer, layer).states(row, self.lengths[row]) for layer in self.layers]


def _grown(buffer: Tensor, needed: int) -> Tensor:
    """A larger buffer with the same content; zeros behind it, for what is not seen must be a number."""
    used = buffer.shape[2]
    capacity = -(-max(needed, 2 * used) // _GROWTH) * _GROWTH
    larger = buffer.new_zeros((*buffer.shape[:2], capacity, buffer.shape[3]))
    larger[:, :, :used] = buffer
    return larger
