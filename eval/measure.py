"""Metrics, each defined once.

Accuracy is the share of requests whose finished answer the task calls right. Speed-up is the seconds of target-alone
over the method's, summed over the same requests. Acceptance counts the target's tokens: `accepted_fraction` is accepted
draft tokens over all draft tokens, `accepted_per_verification` accepted draft tokens over packed passes (the token that
the target writes after them, which others count as a bonus, is not one of them). `lookahead_accepted_fraction` and
`lookahead_accepted_per_pass` are the same of tokens that the draft proposed a few at a time while the target wrote: all
there is of lossless speculation, and the repairs of PARSE with lookahead. `full_accept_rate` is the share of requests
that the target wrote nothing of. `wholly_rejected_slowdown` is the method's latency over that of target-alone
on the requests of which no draft token was kept. `failures` are requests that failed or could not be checked, by their
number among the prompts; they count as wrong, and seconds and latencies leave them out. False accepts and rejects count
verdicts on the cuts of each draft up to and including its first wrong one; a draft after text that is wrong already has
no right cut, and is left out. A request's latency is the time from its start in the engine to its end, beside whatever
else runs there, and `token_seconds` what follows its first token over the tokens that follow; of these `_p95` is what
one request in twenty exceeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from eval.judges import Checked
from eval.methods import Outcome
from eval.tasks import Task

RESAMPLES = 2000
PERCENTILES = (50, 95, 99)
PLACES = 10  # equal parts of an answer, by which it is counted where verdicts err

Interval = tuple[float, float]
Columns = Sequence[Sequence[float]]  # of as many numbers each
Statistic = Callable[..., Any]  # arrays [..., n], one a column, and the axis to [...]


class Judgement(NamedTuple):
    """The verifier's verdict on one cut, beside the truth."""

    confidence: float
    accepted: bool
    right: bool
    place: float  # of the cut in the finished answer, 1 is its end


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% interval of a proportion."""
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(columns: Columns, statistic: Statistic) -> Interval:
    """The 95% percentile interval of a statistic over resampled rows; of a single row its value, twice."""
    arrays = tuple(np.asarray(column, dtype=float) for column in columns)  # [n] each
    if len(arrays[0]) == 1:
        value = float(statistic(*arrays, axis=-1))
        return value, value
    options: Any = {"paired": True, "n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
    found = stats.bootstrap(arrays, statistic, **options).confidence_interval
    return float(found.low), float(found.high)


def speedup(target: Any, method: Any, axis: int = -1) -> Any:
    """Seconds of target-alone over the method's, summed."""
    return target.sum(axis) / method.sum(axis)


def paired(target: Sequence[bool], method: Sequence[bool], max_accuracy_loss: float = 0.01) -> dict[str, Any]:
    """The method's accuracy against the target's on the same requests.

    Returns:
        `accuracy_difference`, the method's less the target's, with its interval (see `difference_interval`);
        `mcnemar_p`, of McNemar's exact test; `non_inferiority`, "shown" where the whole interval loses at most the
        promised share, "refuted" where all of it loses more, else "open"; `detectable_loss`, see there.
    """
    n = len(target)
    lost = sum(a and not b for a, b in zip(target, method, strict=True))
    won = sum(b and not a for a, b in zip(target, method, strict=True))
    low, high = difference_interval(lost, won, n)
    shown, refuted = low >= -max_accuracy_loss, high < -max_accuracy_loss
    return {
        "accuracy_difference": (won - lost) / n,
        "accuracy_difference_ci95": (low, high),
        "mcnemar_p": mcnemar(lost, won),
        "non_inferiority": "shown" if shown else "refuted" if refuted else "open",
        "detectable_loss": detectable_loss(won, n),
    }


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: how likely so uneven a split is where each of the two is as likely to be right alone."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def detectable_loss(won: int, n: int) -> float | None:
    """The smallest loss whose interval would not reach 0, with as many prompts won; None where none would do."""
    for lost in range(won + 1, n - won + 1):
        if difference_interval(lost, won, n)[1] < 0:
            return (lost - won) / n
    return None


def difference_interval(lost: int, won: int, n: int) -> Interval:
    """The 95% interval of a paired difference in accuracy, by its score test (Tango, Stat. Med. 17:891, 1998).

    A bootstrap of few prompts that differ, or of none, makes its interval too narrow; this one stays honest there.

    Args:
        lost: requests that the target has right and the method wrong.
        won: the other way round.
        n: all requests.
    """

    def score(difference: float) -> float:
        """How far what was seen is above such a difference, in standard errors."""
        a, b = 2 * n, -lost - won + (2 * n - won + lost) * difference
        root = sqrt(max(b * b + 4 * a * lost * difference * (1 - difference), 0.0))
        share = (root - b) / (2 * a)  # of requests lost, most likely then
        variance = n * (2 * share + difference * (1 - difference))
        return (won - lost - n * difference) / sqrt(variance) if variance > 0 else 0.0

    z, seen, edge = float(stats.norm.ppf(0.975)), (won - lost) / n, 1 - 1e-9
    low = brentq(lambda difference: score(difference) - z, -edge, seen) if seen > -1 else -1.0
    high = brentq(lambda difference: score(difference) + z, seen, edge) if seen < 1 else 1.0
    return float(low), float(high)


def judgements_of(outcome: Outcome, task: Task, opened: bool = False) -> Iterator[Judgement]:
    """Every judged cut up to and including each draft's first wrong one.

    None where the task cannot tell right sentences from wrong ones; the verifier's own report can.
    """
    if task.first_wrong is None:
        return
    checked = Checked(task, opened)
    kept = ""
    segments = outcome.generation.segments
    length = max(sum(len(segment.text) for segment in segments if segment.accepted), 1)
    index = 0
    while index < len(segments):
        if segments[index].source == "target" or segments[index].confidence is None:
            kept += segments[index].text
            index += 1
            continue
        end = next((i for i in range(index, len(segments)) if segments[i].source != "draft"), len(segments))
        draft, prefix = segments[index:end], kept
        wrong = checked.first_wrong(outcome.prompt, kept) is not None
        for segment in draft:
            prefix += segment.text
            right = not wrong and checked.first_wrong(outcome.prompt, prefix) is None
            if not wrong and segment.confidence is not None:
                yield Judgement(segment.confidence, segment.accepted, right, min(len(prefix) / length, 1.0))
            wrong = wrong or not right
            kept += segment.text if segment.accepted else ""
        index = end


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """A mean and percentiles as entries of a row: `name`, `name_p50`, `name_p95`, `name_p99`; None of no values."""
    names = [name, *(f"{name}_p{percent}" for percent in PERCENTILES)]
    if not values:
        return dict.fromkeys(names)
    return dict(zip(names, [float(np.mean(values)), *np.percentile(values, PERCENTILES).tolist()], strict=True))


def summarize(
    name: str,
    outcomes: Sequence[Outcome],
    target: Sequence[Outcome],
    task: Task,
    opened: bool = False,
    max_accuracy_loss: float = 0.01,
) -> dict[str, Any]:
    """One row of the evaluation: the keys of the public JSON, and the paired difference.

    Args:
        opened: whether the chat template begins the thinking, see `parse.prompts.opens_thinking`.
        max_accuracy_loss: the promised one.
    """
    n = len(outcomes)
    right = [outcome.right for outcome in outcomes]
    runs = [outcome.generation.stats for outcome in outcomes]
    drafted, accepted, passes = (
        sum(getattr(s, key) for s in runs) for key in ("draft_tokens", "accepted_tokens", "verify_passes")
    )
    ahead = {key: sum(getattr(s, f"lookahead_{key}") for s in runs) for key in ("tokens", "accepted_tokens", "passes")}
    spent = {key: sum(s.seconds[key] for s in runs) for key in runs[0].seconds}
    return {
        "name": name,
        "n": n,
        "failures": [{"prompt": i, "error": one.error} for i, one in enumerate(outcomes) if one.error],
        "accuracy": sum(right) / n,
        "accuracy_ci95": wilson(sum(right), n),
        **paired([outcome.right for outcome in target], right, max_accuracy_loss),
        **_times(outcomes, target),
        "full_accept_rate": sum(s.draft_tokens > 0 and s.target_tokens == 0 for s in runs) / n,
        "accepted_fraction": accepted / drafted if drafted else None,
        "accepted_per_verification": accepted / passes if passes else None,
        "lookahead_accepted_fraction": ahead["accepted_tokens"] / ahead["tokens"] if ahead["tokens"] else None,
        "lookahead_accepted_per_pass": ahead["accepted_tokens"] / ahead["passes"] if ahead["passes"] else None,
        **_verdicts([one for outcome in outcomes for one in judgements_of(outcome, task, opened)]),
        "model_time_fraction": 1 - spent["other"] / max(sum(spent.values()), 1e-9),
        "gpu_memory_gib": max((o.gpu_memory_gib for o in outcomes if o.gpu_memory_gib is not None), default=None),
        "rounds": sum(s.rounds for s in runs) / n,
        "tokens_per_answer": sum(len(outcome.generation.token_ids) for outcome in outcomes) / n,
        "tokens_from_draft": accepted / n,
        "tokens_from_target": sum(s.target_tokens for s in runs) / n,
        "seconds": {key: value / n for key, value in spent.items()},
    }


def _times(outcomes: Sequence[Outcome], target: Sequence[Outcome]) -> dict[str, Any]:
    """What requests took, beside target-alone: of those of which neither failed."""
    pairs = [(one, alone) for one, alone in zip(outcomes, target, strict=True) if not (one.error or alone.error)]
    seconds, baseline = (np.array([pair[i].seconds for pair in pairs]) for i in (0, 1))  # [answered] each
    turns = np.array([one.turn for one, _ in pairs])  # [answered]
    timed = [[one[turns == turn].sum() for turn in np.unique(turns)] for one in (baseline, seconds)]  # [2, turns]
    total = float(seconds.sum())
    lengths = [len(one.generation.token_ids) for one, _ in pairs]
    latencies = [latency(one) for one, _ in pairs]
    first = [one.generation.stats.first_token_seconds for one, _ in pairs]
    rejected = [pair for pair in pairs if _wholly_rejected(pair[0])]
    mine, theirs = (sum(latency(pair[i]) for pair in rejected) for i in (0, 1))
    return {
        "speedup": float(speedup(baseline, seconds)) if pairs else 0.0,
        "speedup_ci95": bootstrap(timed, speedup) if pairs else (0.0, 0.0),
        "seconds_per_request": total / len(pairs) if pairs else None,
        "requests_per_second": len(pairs) / total if pairs else 0.0,
        "tokens_per_second": sum(lengths) / total if pairs else 0.0,
        **percentiles("first_token_seconds", first),
        **percentiles("latency_seconds", latencies),
        **percentiles("token_seconds", list(_after_first(latencies, first, lengths))),
        "wholly_rejected_rate": len(rejected) / len(outcomes),
        "wholly_rejected_slowdown": mine / theirs if theirs else None,
    }


def latency(outcome: Outcome) -> float:
    """Seconds from the request's start in the engine to its end."""
    return sum(outcome.generation.stats.seconds.values())


def _wholly_rejected(outcome: Outcome) -> bool:
    stats = outcome.generation.stats
    return stats.draft_tokens > 0 and not stats.accepted_tokens


def _after_first(latencies: Iterable[float], first: Iterable[float], lengths: Iterable[int]) -> Iterator[float]:
    """Seconds per token after the first one, of each request that has more than one."""
    for latency, start, length in zip(latencies, first, lengths, strict=True):
        if length > 1:
            yield max(latency - start, 0.0) / (length - 1)


def _verdicts(judged: Sequence[Judgement]) -> dict[str, Any]:
    """How often verdicts err, and in which tenth of the answer; None and no places where no cut was judged."""
    wrong = [one for one in judged if not one.right]
    right = [one for one in judged if one.right]
    falsely = {"accept": [one for one in wrong if one.accepted], "reject": [one for one in right if not one.accepted]}
    counts = {f"false_{what}_places": _places(some) for what, some in falsely.items()}
    rates = [(falsely["accept"], wrong), (falsely["reject"], right)]
    accept, reject = (len(some) / len(all_of) if all_of else None for some, all_of in rates)
    return {"false_accept_rate": accept, "false_reject_rate": reject, **(counts if judged else {})}


def _places(judged: Iterable[Judgement]) -> list[int]:
    """How many cuts stand in each tenth of the answers."""
    counts = [0] * PLACES
    for one in judged:
        counts[max(ceil(one.place * PLACES) - 1, 0)] += 1
    return counts
