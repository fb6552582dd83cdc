"""Key-value caches that commit a prefix and drop the rest at no cost.

Keys and values live in buffers that grow by doubling; the cache's length is a number. Reading
appends behind that length, and rolling back lowers it: nothing is copied, and what was verified
stays as the packed pass wrote it. Works with every `transformers` model whose layers call
`Cache.update`, because it is a `transformers.Cache`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_GROWTH = 256  # tokens; buffers hold a multiple of it


class PrefixLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: keys and values [B, heads, capacity, D], of which `length` positions count."""

    is_croppable = True
    is_sliding = False

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape and type from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self._values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T positions; return all keys and values so far, [B, heads, length, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.length, self.length + key_states.shape[2]
        if stop > self._keys.shape[2]:
            self._keys = _grown(self._keys, start, stop)
            self._values = _grown(self._values, start, stop)
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self.length = stop
        self.keys, self.values = self._keys[:, :, :stop], self._values[:, :, :stop]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers' sign convention)."""
        self.truncate(self.length + tokens_to_remove)

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.length = length
        if self.is_initialized:
            self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def get_seq_length(self) -> int:
        """Cached positions."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass of `query_length` queries sees, and the first one's position."""
        return self.length + query_length, 0


class PrefixCache(Cache):
    """A model's cache over one text, or over a batch of texts of equal length."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PrefixLayer)

    @property
    def length(self) -> int:
        """Cached positions."""
        return cast(PrefixLayer, self.layers[0]).length if self.layers else 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions and forget the rest.

        Raises:
            ValueError: if fewer than `length` positions are cached.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} of {self.length} cached tokens")
        for layer in self.layers:
            cast(PrefixLayer, layer).truncate(length)


def _grown(buffer: Tensor, used: int, needed: int) -> Tensor:
    """A larger buffer with the first `used` positions copied."""
    capacity = max(needed, 2 * buffer.shape[2])
    capacity = -(-capacity // _GROWTH) * _GROWTH
    larger = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
    larger[:, :, :used] = buffer[:, :, :used]
    return larger
