"""Log-probabilities of a text's tokens, the target's own: for clients that rate texts rather than ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from parse.model import Model


@dataclass(frozen=True)
class Scores:
    """Of the tokens of a text."""

    ids: list[int]
    logprobs: list[float | None]  # of each after those before it; None for the first
    likeliest: list[dict[int, float] | None]  # the likeliest tokens at each place, and the text's own


async def scored(target: Model, ids: Sequence[int], count: int) -> Scores:
    """The target's log-probabilities of a text in one pass.

    Args:
        count: of likeliest tokens at each place.
    """
    logits: Tensor = await target.logits(ids, first=0)  # type: ignore[attr-defined]  # [N, V]
    after = logits[:-1].float().log_softmax(-1)  # [N - 1, V]
    values, places = after.topk(max(count, 1), dim=-1)  # [N - 1, count] each
    logprobs: list[float | None] = [None]
    likeliest: list[dict[int, float] | None] = [None]
    for i, token in enumerate(ids[1:]):
        own = float(after[i, token])
        best = dict(zip(places[i].tolist(), values[i].tolist(), strict=True)) if count else {}
        logprobs.append(own)
        likeliest.append({**best, token: own})
    return Scores(list(ids), logprobs, likeliest)
