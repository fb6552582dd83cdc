"""Metrics, each defined once.

Accuracy is the share of requests whose finished answer the task calls right. Speed-up is the seconds
of target-alone over the method's, summed over the same requests. Acceptance counts the target's
tokens: `accepted_fraction` is accepted draft tokens over all draft tokens, `full_accept_rate` the
share of requests that the target wrote nothing of. False accepts and rejects count verdicts on the
cuts of each draft up to and including its first wrong one. A request's latency is the time from its start in the engine
to its end, beside whatever else runs there; `_p95` is what one request in twenty exceeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from eval.judges import Checked
from eval.methods import Outcome
from eval.tasks import Task

RESAMPLES = 2000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(values: Sequence[Sequence[float]], statistic: Any, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over resampled requests (rows of `values`)."""
    rows = np.asarray(values, dtype=float)  # [n, columns]
    rng = np.random.default_rng(seed)
    draws = [statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def speedup(rows: np.ndarray) -> float:
    """Seconds of target-alone (column 0) over the method's (column 1), summed."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def paired(target: Sequence[bool], method: Sequence[bool]) -> dict[str, Any]:
    """The method's accuracy less the target's on the same requests: interval and McNemar's exact test."""
    pairs = [(float(a), float(b)) for a, b in zip(target, method, strict=True)]
    lost = sum(a > b for a, b in pairs)
    won = sum(b > a for a, b in pairs)
    return {
        "accuracy_difference": (won - lost) / len(pairs),
        "accuracy_difference_ci95": bootstrap(pairs, lambda r: float((r[:, 1] - r[:, 0]).mean())),
        "mcnemar_p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    }


def verdicts(outcome: Outcome, task: Task, opened: bool = False) -> Iterator[tuple[float, bool, bool]]:
    """(confidence, accepted, right) for every judged cut up to and including each draft's first wrong one.

    None where the task cannot tell right sentences from wrong ones; the verifier's own report can.
    """
    if task.first_wrong is None:
        return
    checked = Checked(task, opened)
    kept = ""
    segments = outcome.generation.segments
    index = 0
    while index < len(segments):
        if segments[index].source == "target" or segments[index].confidence is None:
            kept += segments[index].text
            index += 1
            continue
        prefix, wrong = kept, False
        while index < len(segments) and segments[index].source == "draft":
            segment = segments[index]
            prefix += segment.text
            right = checked.first_wrong(outcome.prompt, prefix) is None
            if not wrong and segment.confidence is not None:
                yield segment.confidence, segment.accepted, right
            wrong = wrong or not right
            kept += segment.text if segment.accepted else ""
            index += 1


def _p95(values: Sequence[float]) -> float:
    """The value that one in twenty exceeds."""
    return float(np.percentile(values, 95))


def summarize(
    name: str, outcomes: Sequence[Outcome], target: Sequence[Outcome], task: Task, opened: bool = False
) -> dict[str, Any]:
    """One row of the evaluation: the keys of the public JSON, and the paired difference.

    Args:
        opened: whether prompts begin the thinking, see `parse.prompts.opens_thinking`.
    """
    n = len(outcomes)
    right = [outcome.right for outcome in outcomes]
    seconds = np.array([outcome.seconds for outcome in outcomes])
    baseline = np.array([outcome.seconds for outcome in target])
    stats = [outcome.generation.stats for outcome in outcomes]
    tokens = sum(len(outcome.generation.token_ids) for outcome in outcomes)
    both = np.stack([baseline, seconds], axis=1)  # [n, 2]
    turns = np.array([outcome.turn for outcome in outcomes])  # [n]
    timed = np.stack([both[turns == turn].sum(0) for turn in np.unique(turns)])  # [turns, 2], measured by themselves
    drafted = sum(s.draft_tokens for s in stats)
    judged = [verdict for outcome in outcomes for verdict in verdicts(outcome, task, opened)]
    wrong = [accepted for _, accepted, ok in judged if not ok]
    fine = [accepted for _, accepted, ok in judged if ok]
    spent = {key: sum(s.seconds[key] for s in stats) for key in stats[0].seconds}
    return {
        "name": name,
        "n": n,
        "accuracy": sum(right) / n,
        "accuracy_ci95": wilson(sum(right), n),
        **paired([outcome.right for outcome in target], right),
        "speedup": speedup(both),
        "speedup_ci95": bootstrap(timed.tolist(), speedup),
        "seconds_per_request": float(seconds.mean()),
        "tokens_per_second": tokens / float(seconds.sum()),
        "first_token_seconds": float(np.mean([s.first_token_seconds for s in stats])),
        "first_token_seconds_p95": _p95([s.first_token_seconds for s in stats]),
        "latency_seconds_p95": _p95([sum(s.seconds.values()) for s in stats]),
        "full_accept_rate": sum(s.draft_tokens > 0 and s.target_tokens == 0 for s in stats) / n,
        "accepted_fraction": sum(s.accepted_tokens for s in stats) / drafted if drafted else None,
        "false_accept_rate": sum(wrong) / len(wrong) if wrong else None,
        "false_reject_rate": sum(not a for a in fine) / len(fine) if fine else None,
        "model_time_fraction": 1 - spent["other"] / sum(spent.values()),
        "rounds": sum(s.rounds for s in stats) / n,
        "tokens_per_answer": tokens / n,
        "tokens_from_draft": sum(s.accepted_tokens for s in stats) / n,
        "tokens_from_target": sum(s.target_tokens for s in stats) / n,
        "seconds": {key: value / n for key, value in spent.items()},
    }
