"""The threshold, from the labels alone: conformal risk control.

The loss of a prompt is 1 where a verifier that is let loose on its drafts keeps any of them up to an invalid cut. With
n prompts the smallest threshold with (losses + 1) / (n + 1) <= max_accuracy_loss bounds the expected loss of a fresh
prompt by it (Angelopoulos et al., arXiv 2208.02814, for losses in [0, 1] that never rise with the threshold). So does
any higher one, and one is taken that costs next to nothing: a verifier that tells right from wrong would else be let
down to where it loses as much as is allowed, for no right token more.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch

from eval.verifier_metrics import Scored, keeps, loses, valid_cuts

NEVER = 1.01  # a threshold that no confidence reaches: accept nothing
FREE = 0.002  # of the rightly accepted tokens that a safer threshold may cost


def calibrate(scored: Sequence[Scored], max_accuracy_loss: float, policy: str = "first_fail") -> float:
    """A threshold whose expected accuracy loss is bounded: the smallest, or a higher one as good as free.

    Args:
        scored: the drafts of n prompts.
        max_accuracy_loss: the accuracy that may be lost, a fraction.

    Returns:
        the threshold, or `NEVER` where the data cannot support the promise.
    """
    return _raised(scored, smallest(scored, max_accuracy_loss, policy), policy)


def smallest(scored: Sequence[Scored], max_accuracy_loss: float, policy: str = "first_fail") -> float:
    """The smallest threshold whose expected accuracy loss is bounded, or `NEVER`."""
    n = len({one.draft.number for one in scored})
    return _threshold(scored, math.floor(max_accuracy_loss * (n + 1) + 1e-9) - 1, policy)


def empirical(scored: Sequence[Scored], max_accuracy_loss: float) -> float:
    """The smallest threshold that loses at most so much of these very prompts; no promise for others."""
    n = len({one.draft.number for one in scored})
    return _threshold(scored, math.floor(max_accuracy_loss * n + 1e-9), "first_fail")


def thresholds(scored: Sequence[Scored], max_accuracy_loss: float, handback: str) -> dict[str, float]:
    """The calibrated threshold of each acceptance policy, on the drafts that it meets.

    "whole" judges the last cut of the first draft alone. With handback "never" there is one draft per prompt.
    """
    firsts = [one for one in scored if one.draft.round == 0]
    met = scored if handback == "segment" else firsts
    rounds = {policy: calibrate(met, max_accuracy_loss, policy) for policy in ("first_fail", "longest")}
    return {**rounds, "whole": calibrate(firsts, max_accuracy_loss, "whole")}


def prompts_needed(max_accuracy_loss: float) -> int:
    """The prompts below which no verifier can support the promise."""
    return math.ceil(1 / max_accuracy_loss - 1e-9) - 1


def _raised(scored: Sequence[Scored], threshold: float, policy: str) -> float:
    """The highest threshold that still keeps all but `FREE` of the valid tokens that this one keeps."""

    def kept(at: float) -> int:
        cuts = [min(keeps(one, at, policy), valid_cuts(one.draft.valid)) for one in scored]
        return sum([0, *one.draft.ends][cut] for one, cut in zip(scored, cuts, strict=True))

    enough = (1 - FREE) * kept(threshold)
    if enough == 0:
        return threshold
    candidates = [threshold, *sorted({c for one in scored for c in one.confidences if c > threshold})]
    return candidates[bisect_right(candidates, -enough, key=lambda at: -kept(at)) - 1]


def _threshold(scored: Sequence[Scored], allowed: int, policy: str) -> float:
    """The smallest threshold at which at most so many prompts are lost."""
    if allowed < 0:
        return NEVER
    fatal: dict[int, float] = {}  # the highest threshold at which each prompt would still be lost
    for one in scored:
        for threshold in one.confidences:
            if loses(one.draft, keeps(one, threshold, policy)):
                fatal[one.draft.number] = max(fatal.get(one.draft.number, 0.0), threshold)
    highest = sorted(fatal.values(), reverse=True)
    if len(highest) <= allowed:
        return 0.0
    above = float(torch.nextafter(torch.tensor(highest[allowed]), torch.tensor(2.0)))
    return above if above <= 1 else NEVER
