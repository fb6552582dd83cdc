"""Log-probabilities of a text's tokens, the target's own: for clients that rate texts rather than ask for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from parse.local.model import LocalModel


@dataclass(frozen=True)
class Scores:
    """Of the tokens of a text."""

    ids: list[int]
    logprobs: list[float | None]  # of each after those before it; None for the first
    likeliest: list[dict[int, float] | None]  # the likeliest tokens at each place, and the text's own


async def scored(target: LocalModel, ids: Sequence[int], count: int, ends: Collection[int] = ()) -> Scores:
    """The target's log-probabilities of a text in one pass.

    Args:
        count: of likeliest tokens at each place.
        ends: the text ended there, with the likeliest of these tokens, which then counts as its last one.
    """
    logits = await target.logits(ids, first=0)  # [N, V]
    own = [*ids[1:], *([max(ends, key=lambda token: float(logits[-1, token]))] if ends else [])]  # M
    after = logits[: len(own)].float().log_softmax(-1)  # [M, V]
    values = after.gather(1, torch.tensor(own, device=after.device)[:, None])[:, 0].tolist()  # M
    best = after.topk(max(count, 1), dim=-1)  # [M, count] each
    places, logprobs = best.indices[:, :count].tolist(), best.values[:, :count].tolist()
    likeliest = [
        {**dict(zip(some, theirs, strict=True)), token: value}
        for some, theirs, token, value in zip(places, logprobs, own, values, strict=True)
    ]
    return Scores([ids[0], *own], [None, *values], [None, *likeliest])
