"""The sentences at the top of an evaluation's page: what happened, and what a reader must know with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

VERDICTS = {
    "shown": "not worse by more than the promised {points}",
    "refuted": "worse by more than the promised {points}",
    "open": "{n} prompts cannot tell whether it loses more than the promised {points}",
}
ALGORITHM = (
    "PARSE lets a small draft model write a whole answer; the large target judges every prefix of it in one pass, "
    "keeps the longest one that is right, and continues from there."
)
SMALL = 100e6  # parameters: smaller targets are for demonstration
CLEARLY = 1.05  # times as fast


def opening(summary: dict[str, Any]) -> list[str]:
    """All sentences in their order; those that do not apply are empty.

    Args:
        summary: what `eval/summary.json` holds.
    """
    tables = tables_of(summary)
    told = [sentence(summary), _models(summary), _faster(tables), _waiting(tables)]
    return [*told, _sample(summary["methods"], list(tables))]


def sentence(summary: Mapping[str, Any]) -> str:
    """What happened, in plain words; empty where PARSE was not among the methods.

    Args:
        summary: what `eval/summary.json` holds.
    """
    rows, most = summary["methods"], summary["max_accuracy_loss"]
    parse, target = row_of(rows, "parse"), row_of(rows, "target")
    if not parse or not target:
        return ""
    promised = f"{100 * most:g} point{'s' if most != 0.01 else ''}"
    verdict = VERDICTS[parse["non_inferiority"]].format(points=promised, n=parse["n"])
    loads = {one["at_once"]: row_of(one["methods"], "parse") for one in summary["concurrency"]}
    more = ", ".join(f"{row['speedup']:.1f} times with {requests(n)}" for n, row in loads.items() if row)
    return (
        f"PARSE answered {parse['speedup']:.1f} times as fast as the target alone{f' ({more})' if more else ''}; "
        f"{_rights(parse['accuracy'], target['accuracy'], summary.get('judge'))}: {verdict} "
        f"(95% interval of the difference: {points(parse['accuracy_difference_ci95'])} points)."
    )


def _rights(parse: float, target: float, judge: Mapping[str, Any] | None) -> str:
    """How many answers were right, or, where somebody compares them with the target's own, how many say the same."""
    if not judge:
        return f"{parse:.1%} of its answers were right, and {target:.1%} of the target's"
    missed, confused = judge["same_called_different"], judge["different_called_same"]
    errors = ""
    if missed is not None and confused is not None:
        errors = f", who calls {missed:.0%} of equal answers different and {confused:.0%} of different ones the same"
    return (
        f"{parse:.1%} of its answers say the same as the target's own, as {judge['by']} judges{errors}; "
        f"{target:.1%} of the target's came to an end"
    )


def _models(summary: Mapping[str, Any]) -> str:
    """What was asked, and of which models."""
    sizes = [
        f"{'the target ' if role == 'target' else 'the draft '}{one['name']}{_parameters(one)}"
        for role, one in summary.get("models", {}).items()
    ]
    if not sizes:
        return ""
    task = summary["task"]
    about = f" ({task['about']})" if task["about"] else ""
    text = f"{ALGORITHM} The task is {task['name']}{about}; {' and '.join(sizes)} answered."
    if (summary["models"]["target"]["parameters"] or SMALL) < SMALL:
        text += " Models so small show that the method works. They do not show how fast it is with larger ones."
    return text


def _parameters(size: Mapping[str, Any]) -> str:
    """A model's size in brackets; empty where it is not known."""
    if size["parameters"] is None:
        return ""
    count, word = (
        (size["parameters"] / 1e9, "billion") if size["parameters"] >= 1e9 else (size["parameters"] / 1e6, "million")
    )
    return f" ({count:.3g} {word} parameters in {size['layers']} layers)"


def _faster(tables: Mapping[int, Sequence[dict[str, Any]]]) -> str:
    """The fastest methods, where they were as often right as PARSE and clearly faster."""
    faster = []
    for at_once, rows in tables.items():
        parse = row_of(rows, "parse")
        able = [row for row in rows if parse and row["accuracy"] >= parse["accuracy"] and row["name"] != "target"]
        best = max(able, key=lambda row: float(row["speedup"]), default=None)
        if parse and best and best["speedup"] >= CLEARLY * parse["speedup"]:
            faster.append(
                f"{best['name']} with {requests(at_once)} ({best['speedup']:.1f} times as fast as the target)"
            )
    return f"No less accurate than PARSE, and faster: {', '.join(faster)}." if faster else ""


def _waiting(tables: Mapping[int, Sequence[dict[str, Any]]]) -> str:
    """How long a reader waits for the first word, where that is longer than with the target alone."""
    waits = []
    for at_once, rows in tables.items():
        parse, target = row_of(rows, "parse"), row_of(rows, "target")
        if parse and target and (parse["first_token_seconds"] or 0) > (target["first_token_seconds"] or 0):
            seconds = f"{parse['first_token_seconds']:.2f} s instead of {target['first_token_seconds']:.2f} s"
            waits.append(f"{seconds} with {requests(at_once)}")
    if not waits:
        return ""
    return f"PARSE shows nothing before it is judged, so its first word came after {', '.join(waits)}."


def _sample(rows: Sequence[dict[str, Any]], loads: Sequence[int]) -> str:
    """How it was measured, and what a test of this size could have found."""
    parse = row_of(rows, "parse")
    text = (
        f"Every method answered the same {rows[0]['n']} test prompts in turn, {', then '.join(map(requests, loads))}."
    )
    if parse and (loss := parse["detectable_loss"]) is not None:
        text += f" So many prompts cannot tell a loss under {100 * loss:.1f} points from none."
    return text


def requests(at_once: int) -> str:
    """How many requests run, in words."""
    return "one request at a time" if at_once == 1 else f"{at_once} requests at once"


def tables_of(summary: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The methods' rows by the number of requests at once, the first one first."""
    first = {summary["at_once"]: summary["methods"]}
    return first | {other["at_once"]: other["methods"] for other in summary["concurrency"]}


def row_of(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """A method's row, or None."""
    return next((row for row in rows if row["name"] == name), None)


def interval(ends: Sequence[float], form: str) -> str:
    """Both ends, in a format."""
    return " to ".join(format(end, form) for end in ends)


def points(shares: Sequence[float]) -> str:
    """An interval of a difference in points."""
    return interval([100 * share for share in shares], "+.1f")
