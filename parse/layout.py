"""The packed verification pass: which tokens go in, at which positions, and who sees whom.

One pass judges every prefix of a draft. After the draft's N tokens stand K copies of the verdict
suffix, S tokens each; copy k sits at the positions that follow prefix k, sees the prompt, the draft
up to its own end, and itself. With L=3 cached prompt tokens, N=6, ends (2, 4, 6) and S=2:

    position          0 1 2 | 3 4 5 6 7 8 | 5 6 | 7 8 | 9 10
    query y_6         # # # | # # # # # # |     |     |
    query s (k=1)     # # # | # #         | # . |     |
                      # # # | # #         | # # |     |
    query s (k=2)     # # # | # # # #     |     | # . |

Visibility needs two numbers a query: `limit`, how many of the leading keys (prompt and draft) it
sees, and `block_start`, the first key of its own block. The dense mask is written from those two alone.
Shape letters: B batch, L prompt, N draft, K cuts, S suffix, T = N + K*S packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One packed row: a draft and the K suffix copies after it, over `past` cached tokens."""

    ids: list[int]  # T tokens
    positions: list[int]  # T
    limit: list[int]  # T: keys [0, limit) are visible
    block_start: list[int]  # T: keys [block_start, past + its own index] are visible
    past: int  # L
    draft_length: int  # N
    suffix_length: int  # S

    @property
    def last_suffix(self) -> list[int]:
        """Index in the pass of each suffix copy's last token, K of them; none where there are no suffixes."""
        s = self.suffix_length
        return list(range(self.draft_length + s - 1, len(self.ids), s)) if s else []

    @property
    def is_causal(self) -> bool:
        """Whether there are no suffixes, so that who sees whom is as everywhere."""
        return len(self.ids) == self.draft_length

    def suffixes(self, after: int) -> Layout:
        """The suffixes alone, for a pass after the text itself was read into a cache.

        Args:
            after: how many keys that cache holds, the text's and any padding after them.
        """
        n, skipped = self.draft_length, after - self.draft_length - self.past
        parts = (
            self.ids[n:],
            self.positions[n:],
            self.limit[n:],
            [block_start + skipped for block_start in self.block_start[n:]],
        )
        return Layout(*parts, past=after, draft_length=0, suffix_length=self.suffix_length)

    def mask(self, window: int | None = None) -> Tensor:
        """Who sees whom: bool [T, L + T], True where the query may attend; see `visible`."""
        keys = self.past + len(self.ids)
        key_index = range(self.past, keys)
        rows = (integers(row)[None] for row in (self.limit, self.block_start, key_index, self.positions))  # [1, T] each
        return visible(*rows, keys=keys, window=window)[0]


MaskMod = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # FlexAttention's mask_mod: text, head, query, key


def mask_mod(
    limit: Tensor, block_start: Tensor, key_index: Tensor, positions: Tensor, keys: int, window: int | None = None
) -> MaskMod:
    """Who sees whom in B texts of T queries and P keys: whether a query may attend to a key, from their indices.

    Args:
        limit, block_start, positions: int64 [B, T], as in `Layout`.
        key_index: int64 [B, T], the index among the keys of each query's own.
        keys: P.
        window: a sliding window in tokens: keys whose position lies so far back or farther are not seen.
    """
    key = torch.arange(keys, device=key_index.device)  # [P]
    past = key_index[:, :1]  # [B, 1]
    new = (key - past).clamp(0, key_index.shape[1] - 1)  # [B, P] index of each key among the new ones
    position = torch.where(key < past, key, positions.gather(1, new))  # [B, P]

    def seen(text: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        leading = key < limit[text, query]
        block = (key >= block_start[text, query]) & (key <= key_index[text, query])
        return leading | block

    if window is None:
        return seen
    reach: int = window

    def seen_within(text: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return seen(text, head, query, key) & (positions[text, query] - position[text, key] < reach)

    return seen_within


def visible(
    limit: Tensor, block_start: Tensor, key_index: Tensor, positions: Tensor, *, keys: int, window: int | None = None
) -> Tensor:
    """The same as a dense mask: bool [B, T, P], True where the query may attend."""
    texts, queries = (torch.arange(size, device=key_index.device) for size in key_index.shape)
    key = torch.arange(keys, device=key_index.device)
    return mask_mod(limit, block_start, key_index, positions, keys, window)(
        texts[:, None, None], None, queries[:, None], key
    )


def pack(draft_ids: Sequence[int], ends: Sequence[int], suffix_ids: Sequence[int], past: int = 0) -> Layout:
    """Lay out `draft | suffix | suffix | ...`, one suffix copy for each prefix end.

    Args:
        draft_ids: the draft's N tokens, in the target's vocabulary.
        ends: prefix ends, strictly increasing, each in 1..N.
        suffix_ids: the verdict suffix, S tokens; empty for verifiers that read the draft itself.
        past: L, the number of prompt tokens that the target's cache holds already.

    Raises:
        ValueError: if the ends are not strictly increasing or fall outside the draft.
    """
    n, s = len(draft_ids), len(suffix_ids)
    if any(a >= b for a, b in pairwise([0, *ends])) or max(ends, default=0) > n:
        raise ValueError(f"prefix ends must be increasing and within 1..{n}; got {list(ends)}")
    positions, limit = list(range(past, past + n)), list(range(past + 1, past + n + 1))
    ids, block_start = list(draft_ids), list(positions)
    for k, end in enumerate(ends if s else ()):
        ids += suffix_ids
        positions += range(past + end, past + end + s)
        limit += [past + end] * s
        block_start += [past + n + k * s] * s
    return Layout(ids, positions, limit, block_start, past, draft_length=n, suffix_length=s)


def integers(numbers: Sequence[int]) -> Tensor:
    """int64 [n]; through numpy, which takes a tenth of the time that `torch.tensor` does."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def row_numbers(ids: Sequence[int], layout: Layout | None, start: int, width: int) -> list[int]:
    """Ids, positions, limit, block_start and key_index of a row's tokens, 5 * T in a row; see `mask_mod`.

    Right-padded to T: a padding token sees only itself, so that no row of a mask is empty.

    Args:
        ids: the tokens; where there is a layout, its own.
        layout: of a packed row; None for tokens as they follow.
        start: the index among the keys of the row's first token.
        width: T.
    """
    key_index, used = list(range(start, start + width)), len(ids)
    if layout is None:
        positions = block_start = key_index[:used]
        limit = [position + 1 for position in positions]
    else:
        positions, limit, block_start = layout.positions, layout.limit, layout.block_start
    padding = [0] * (width - used)
    return [*ids, *padding, *positions, *padding, *limit, *padding, *block_start, *key_index[used:], *key_index]


def stack(rows: Sequence[list[int]]) -> Tensor:
    """The `row_numbers` of B rows as int64 [5, B, T]."""
    width = len(rows[0]) // 5
    flat: list[int] = []
    for field in range(0, 5 * width, width):
        for row in rows:
            flat += row[field : field + width]
    return integers(flat).view(5, len(rows), width)


def stack_layouts(layouts: Sequence[Layout]) -> Tensor:
    """Packed rows without a cache as one batch, as training runs them: int64 [5, B, T], see `row_numbers`."""
    if any(row.past for row in layouts):
        raise ValueError("only rows without a cache can be stacked")
    width = max(len(row.ids) for row in layouts)
    return stack([row_numbers(row.ids, row, 0, width) for row in layouts])
