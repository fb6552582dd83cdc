"""The packed verification pass: which tokens go in, at which positions, and who sees whom.

One pass judges every prefix of a draft. Behind the draft's N tokens stand K copies of the verdict
suffix, S tokens each; copy k sits at the positions that follow prefix k, sees the prompt, the draft
up to its own end, and itself. With L=3 cached prompt tokens, N=6, ends (2, 4, 6) and S=2:

    position          0 1 2 | 3 4 5 6 7 8 | 5 6 | 7 8 | 9 10
    query y_6         # # # | # # # # # # |     |     |
    query s (k=1)     # # # | # #         | # . |     |
                      # # # | # #         | # # |     |
    query s (k=2)     # # # | # # # #     |     | # . |

Visibility needs two numbers a query: `limit`, how many of the leading keys (prompt and draft) it
sees, and `own`, the first key of its own block. The dense mask is written from those two alone.
Shape letters: B batch, L prompt, N draft, K cuts, S suffix, T = N + K*S packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """One packed row: a draft and the K suffix copies behind it, over `past` cached tokens."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    limit: Tensor  # [T] int64: keys [0, limit) are visible
    own: Tensor  # [T] int64: keys [own, past + own index] are visible
    past: int  # L
    draft_length: int  # N
    suffix_length: int  # S

    @property
    def last_suffix(self) -> Tensor:
        """Index in the pass of each suffix copy's last token: int64 [K]."""
        length = len(self.input_ids)
        return torch.arange(self.draft_length, length, max(self.suffix_length, 1)) + max(self.suffix_length - 1, 0)

    @property
    def is_causal(self) -> bool:
        """Whether there are no suffixes, so that who sees whom is as everywhere."""
        return len(self.input_ids) == self.draft_length

    @property
    def ids(self) -> list[int]:
        """The tokens, as a list of T."""
        return self.input_ids.tolist()

    def mask(self, window: int | None = None) -> Tensor:
        """Who sees whom: bool [T, L + T], True where the query may attend; see `visible`."""
        at = self.past + torch.arange(len(self.input_ids))  # [T]
        rows = (row[None] for row in (self.limit, self.own, at, self.position_ids))  # [1, T] each
        return visible(*rows, keys=self.past + len(at), window=window)[0]


Sight = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # FlexAttention's mask_mod: text, head, query, key


def sight(limit: Tensor, own: Tensor, at: Tensor, positions: Tensor, keys: int, window: int | None = None) -> Sight:
    """Who sees whom in B texts of T queries and P keys: whether a query may attend to a key, from their indices.

    Args:
        limit, own, positions: int64 [B, T], as in `Layout`.
        at: int64 [B, T], the index among the keys of each query's own.
        keys: P.
        window: a sliding window in tokens: keys whose position lies so far back or farther are not seen.
    """
    key = torch.arange(keys, device=at.device)  # [P]
    past = at[:, :1]  # [B, 1]
    new = (key - past).clamp(0, at.shape[1] - 1)  # [B, P] index of each key among the new ones
    position = torch.where(key < past, key, positions.gather(1, new))  # [B, P]

    def seen(text: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        leading = key < limit[text, query]
        block = (key >= own[text, query]) & (key <= at[text, query])
        return leading | block

    if window is None:
        return seen
    reach: int = window

    def seen_within(text: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return seen(text, head, query, key) & (positions[text, query] - position[text, key] < reach)

    return seen_within


def visible(
    limit: Tensor, own: Tensor, at: Tensor, positions: Tensor, *, keys: int, window: int | None = None
) -> Tensor:
    """The same as a dense mask: bool [B, T, P], True where the query may attend."""
    texts, queries = (torch.arange(size, device=at.device) for size in at.shape)
    key = torch.arange(keys, device=at.device)
    return sight(limit, own, at, positions, keys, window)(texts[:, None, None], None, queries[:, None], key)


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
    draft = torch.arange(n)  # [N]
    end = torch.tensor(list(ends) if s else [], dtype=torch.long)  # [K]
    step = torch.arange(s)  # [S]
    first = n + torch.arange(len(end)) * s  # [K] index of each copy's first token
    spread = end[:, None] + step  # [K, S]
    return Layout(
        input_ids=torch.tensor([*draft_ids, *(list(suffix_ids) * len(end))], dtype=torch.long),
        position_ids=past + torch.cat([draft, spread.flatten()]),
        limit=past + torch.cat([draft + 1, end.repeat_interleave(s)]),
        own=past + torch.cat([draft, first.repeat_interleave(s)]),
        past=past,
        draft_length=n,
        suffix_length=s,
    )


def row_numbers(ids: Sequence[int], layout: Layout | None, start: int, width: int) -> list[int]:
    """Ids, positions, limit, own and at of a row's tokens, 5 * T in a row; see `sight`.

    Right-padded to T: a padding token sees only itself, so that no row of a mask is empty.

    Args:
        ids: the tokens; where there is a layout, its own.
        layout: of a packed row; None for tokens as they follow.
        start: the index among the keys of the row's first token.
        width: T.
    """
    at, used = list(range(start, start + width)), len(ids)
    if layout is None:
        positions = own = at[:used]
        limit = [position + 1 for position in positions]
    else:
        positions, limit, own = (row.tolist() for row in (layout.position_ids, layout.limit, layout.own))
    padding = [0] * (width - used)
    return [*ids, *padding, *positions, *padding, *limit, *padding, *own, *at[used:], *at]


def stack(rows: Sequence[list[int]]) -> Tensor:
    """The `row_numbers` of B rows as int64 [5, B, T]."""
    width = len(rows[0]) // 5
    flat = [n for field in range(0, 5 * width, width) for row in rows for n in row[field : field + width]]
    return torch.tensor(flat).view(5, len(rows), width)  # much faster than from nested lists


def stack_layouts(layouts: Sequence[Layout]) -> Tensor:
    """Packed rows without a cache as one batch, as training runs them: int64 [5, B, T], see `row_numbers`."""
    if any(row.past for row in layouts):
        raise ValueError("only rows without a cache can be stacked")
    width = max(len(row.input_ids) for row in layouts)
    return stack([row_numbers(row.ids, row, 0, width) for row in layouts])
