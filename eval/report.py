"""The report: a console table, and one self-contained HTML page (`templates/page.html`) with plots and transcripts."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval import plots
from eval.measure import PERCENTILES, latency
from eval.methods import WHAT, Outcome
from eval.page import Part, page
from eval.plots import Picture
from eval.verifier_report import verifier_parts
from parse.prompts import as_messages

SHOWN = 12  # transcripts of each kind
CHOICE = f"PARSE's answers: of each kind that can be chosen here the first {SHOWN} prompts, and the {SHOWN} slowest."
KINDS = {
    "all": "all that are shown",
    "false-accept": "wrong, where the target is right",
    "rejected": "with rejected drafts",
    "wrong": "wrong answers",
    "slow": "the slowest",
}
VERDICTS = {
    "shown": "not worse by more than the promised {points}",
    "refuted": "worse by more than the promised {points}",
    "open": "{n} prompts cannot tell whether it loses more than the promised {points}",
}
PAIR_TERMS = {
    "foreign prefix": "a right beginning of an answer in words that the target would not have chosen",
    "best free rule": "the best of the rules on likelihoods that a pass of the target gives anyway",
    "AUC": "how often a valid cut gets a higher confidence than an invalid one: 1 is always, 0.5 is chance",
    "oracle, lossless": (
        "what a faultless verifier would keep of one draft, while PARSE drafts again after a repair; what is kept "
        "where each token must be the target's"
    ),
}
ALGORITHM = (
    "PARSE lets a small draft model write a whole answer; the large target judges every prefix of it in one pass, "
    "keeps the longest one that is right, and goes on from there."
)
SMALL = 100e6  # parameters: smaller targets are for demonstration
CLEARLY = 1.05  # times as fast
COUNTED = (
    "Accepted tokens per pass are the draft's alone: the token that the target writes after them, elsewhere called a "
    "bonus, is not counted."
)
Column = tuple[str, Callable[[Mapping[str, Any]], str]]  # a title, and how a row shows it
METHODS: tuple[Column, ...] = (
    ("method", lambda row: row["name"]),
    ("speed-up (95%)", lambda row: f"{row['speedup']:.2f}x ({_interval(row['speedup_ci95'], '.2f')})"),
    ("right (95%)", lambda row: f"{row['accuracy']:.1%} ({_interval(row['accuracy_ci95'], '.1%')})"),
    ("against target, points (95%)", lambda row: _difference(row)),
    ("s/request", lambda row: _number(row["seconds_per_request"], 3)),
    ("first token, s", lambda row: _number(row["first_token_seconds"], 3)),
    ("tokens from draft, target", lambda row: f"{row['tokens_from_draft']:.0f}, {row['tokens_from_target']:.0f}"),
)
DETAILS: tuple[Column, ...] = (
    ("method", lambda row: row["name"]),
    ("McNemar's p", lambda row: "-" if row["name"] == "target" else f"{row['mcnemar_p']:.2f}"),
    ("latency p50, p95, p99, s", lambda row: _percentiles(row, "latency_seconds")),
    ("first token p50, p95, p99, s", lambda row: _percentiles(row, "first_token_seconds")),
    ("each next token p50, p95, p99, ms", lambda row: _percentiles(row, "token_seconds", 1000)),
    ("requests/s", lambda row: f"{row['requests_per_second']:.2f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:.0f}"),
    ("rounds", lambda row: f"{row['rounds']:.2f}"),
    ("accepted", lambda row: _percent(row["accepted_fraction"])),
    ("accepted tokens per pass", lambda row: _number(row["accepted_per_verification"])),
    ("lookahead: accepted, tokens per pass", lambda row: _lookahead(row)),
    ("all accepted", lambda row: _percent(row["full_accept_rate"])),
    ("all rejected", lambda row: _percent(row["wholly_rejected_rate"])),
    ("time over target's, when all is rejected", lambda row: _number(row["wholly_rejected_slowdown"])),
    ("false accepts", lambda row: _percent(row["false_accept_rate"])),
    ("false rejects", lambda row: _percent(row["false_reject_rate"])),
    ("failed", lambda row: str(len(row["failures"]))),
    ("GPU memory, GiB", lambda row: _number(row["gpu_memory_gib"])),
    ("time in models", lambda row: f"{row['model_time_fraction']:.1%}"),
)


def console_table(rows: Sequence[dict[str, Any]]) -> str:
    """The methods as text, one a line."""
    lines = [
        f"{'method':16s}{'accuracy':>9s} {'95% interval':>15s}{'speed-up':>10s} {'95% interval':>14s}"
        f"{'s/request':>11s}{'first token':>13s}{'accepted':>10s}{'lookahead':>11s}{'vs target':>11s}"
    ]
    for row in rows:
        low, high = row["accuracy_ci95"]
        slow, fast = row["speedup_ci95"]
        lines.append(
            f"{row['name']:16s}{row['accuracy']:9.1%} {f'{low:.1%}-{high:.1%}':>15s}{row['speedup']:9.2f}x "
            f"{f'{slow:.2f}-{fast:.2f}':>14s}{_number(row['seconds_per_request'], 3):>11s}"
            f"{_number(row['first_token_seconds'], 3):>12s}s"
            f"{_percent(row['accepted_fraction']):>10s}{_percent(row['lookahead_accepted_fraction']):>11s}"
            f"{row['accuracy_difference'] * 100:+9.1f}pt"
        )
    return "\n".join(lines)


def requests(at_once: int) -> str:
    """How many requests run, in words."""
    return "one request at a time" if at_once == 1 else f"{at_once} requests at once"


def pair_table(pair: dict[str, Any]) -> str:
    """The properties of the pair as text."""
    return "\n".join(f"  {name:38s}{value}" for name, value in pair_rows(pair))


def pair_rows(pair: dict[str, Any]) -> list[tuple[str, str]]:
    """The properties of the pair: names and values."""
    tokens, auc = pair["answer_tokens"], pair["auc"]
    free = {name: value for name, value in auc.items() if name.startswith("likelihood")}
    return [
        ("answer tokens", f"{tokens['least']}-{tokens['most']}, mean {tokens['mean']:.0f}"),
        ("target right", f"{pair['target_accuracy']:.1%}"),
        ("target right after a foreign prefix", _percent(pair["target_accuracy_after_foreign_prefix"])),
        ("draft right alone", f"{pair['draft_accuracy']:.1%}"),
        ("of these drafts judged", f"{pair['judged']}"),
        ("AUC of the best free rule", f"{max(free.values()):.3f}"),
        ("AUC of the prompt verdict", f"{auc['prompt']:.3f}" if "prompt" in auc else "-"),
        (
            "draft tokens kept: oracle, lossless",
            f"{pair['oracle_tokens']:.0f}, {pair['lossless_tokens']:.0f} a draft",
        ),
        ("layers of target and draft", f"{pair['target_layers']}, {pair['draft_layers']}"),
        ("target's time a token over draft's", f"{pair['cost_ratio']:.1f}"),
        ("generate's time over our target's", f"{pair['generate_over_target_loop']:.2f}"),
    ]


def sentence(summary: Mapping[str, Any]) -> str:
    """What happened, in plain words; empty where PARSE was not among the methods.

    Args:
        summary: what `eval/summary.json` holds.
    """
    rows, most = summary["methods"], summary["max_accuracy_loss"]
    parse, target = row_of(rows, "parse"), row_of(rows, "target")
    if not parse or not target:
        return ""
    points = f"{100 * most:g} point{'s' if most != 0.01 else ''}"
    verdict = VERDICTS[parse["non_inferiority"]].format(points=points, n=parse["n"])
    loads = {one["at_once"]: row_of(one["methods"], "parse") for one in summary["concurrency"]}
    more = ", ".join(f"{row['speedup']:.1f} times with {requests(n)}" for n, row in loads.items() if row)
    return (
        f"PARSE answered {parse['speedup']:.1f} times as fast as the target alone{f' ({more})' if more else ''}; "
        f"{_rights(parse['accuracy'], target['accuracy'], summary.get('judge'))}: {verdict} "
        f"(95% interval of the difference: {_points(parse['accuracy_difference_ci95'])} points)."
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


def failures(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Method, prompt (the first is 1) and reason of the requests that failed."""
    return [[row["name"], str(one["prompt"] + 1), one["error"]] for row in rows for one in row.get("failures", ())]


def csv_table(summary: dict[str, Any]) -> str:
    """The methods' rows as CSV, one per method and number of requests at once; intervals and phases in columns."""
    rows = [{"at_once": at_once} | dict(_cells(row)) for at_once, table in tables_of(summary).items() for row in table]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}_{name}", one) for name, one in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str):
            names = ("low", "high") if key.endswith("ci95") else map(str, range(len(value)))
            yield from ((f"{key}_{name}", one) for name, one in zip(names, value, strict=True))
        else:
            yield key, value


def html_report(
    summary: dict[str, Any],
    outcomes: Mapping[str, Sequence[Outcome]],
    verifier: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
) -> str:
    """The whole report as one HTML document.

    Args:
        summary: what `eval/summary.json` holds.
        outcomes: by method; those of PARSE are shown as transcripts.
        verifier: what the verifier's `report.json` holds.
        origin: how it was made, see `page`.
    """
    tables = tables_of(summary)
    sentences = [sentence(summary), _models(summary), _faster(tables), _waiting(tables)]
    sentences.append(_sample(summary["methods"], list(tables)))
    shown, filters = transcripts(outcomes)
    parts = report_parts(summary, verifier)
    return page(f"PARSE: {summary['name']}", sentences, parts, shown, filters, origin, CHOICE)


def report_parts(summary: dict[str, Any], verifier: dict[str, Any] | None) -> list[Part]:
    """All tables and plots of an evaluation; its arguments are those of `html_report`."""
    of_pair = [*_pair_part(summary["pair"]), _parity_part(summary["parity"])]
    return [*_method_parts(summary), *verifier_parts(verifier), *of_pair]


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
        text += " Models so small show that the method works; how fast it is with larger ones, they cannot show."
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
    found = []
    for at_once, rows in tables.items():
        parse = row_of(rows, "parse")
        able = [row for row in rows if parse and row["accuracy"] >= parse["accuracy"] and row["name"] != "target"]
        best = max(able, key=lambda row: float(row["speedup"]), default=None)
        if parse and best and best["speedup"] >= CLEARLY * parse["speedup"]:
            found.append(f"{best['name']} with {requests(at_once)} ({best['speedup']:.1f} times as fast as the target)")
    return f"No less accurate than PARSE, and faster: {', '.join(found)}." if found else ""


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


def tables_of(summary: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The methods' rows by the number of requests at once, the first one first."""
    first = {summary["at_once"]: summary["methods"]}
    return first | {other["at_once"]: other["methods"] for other in summary["concurrency"]}


def _method_parts(summary: dict[str, Any]) -> list[Part]:
    """Two tables for each number of requests at once; the plots stand after the first."""
    parts = []
    for at_once, rows in tables_of(summary).items():
        title = requests(at_once)[0].upper() + requests(at_once)[1:]
        pictures = _method_pictures(summary) if at_once == summary["at_once"] else []
        more = [[show(row) for _, show in DETAILS] for row in rows]
        parts.append(_methods_part(summary, at_once, title)._replace(pictures=pictures))
        parts.append(Part(f"{title}: details", [name for name, _ in DETAILS], more, COUNTED, "parse", folded=True))
        if failed := failures(rows):
            text = f"They count as wrong; the first {SHOWN} of {len(failed)}."
            parts.append(Part(f"{title}: requests that failed", ["method", "prompt", "why"], failed[:SHOWN], text))
    return parts


def _methods_part(summary: dict[str, Any], at_once: int, title: str) -> Part:
    """The methods with so many requests at once."""
    rows = tables_of(summary)[at_once]
    text = f"{rows[0]['n']} prompts on {summary['hardware']}, {requests(at_once)}. "
    if at_once == 1:
        text += "Seconds are end to end."
    else:
        text += (
            "Seconds per request are those of all together, divided by their number: how long one takes beside the "
            "others is its latency, among the details."
        )
    if lookahead := summary.get("lookahead"):
        text += f" While the target writes within PARSE, the draft proposes {lookahead} tokens at a time (lookahead)."
    if row_of(rows, "speculation") or row_of(rows, "assisted"):
        text += " What a draft proposes in lossless speculation or as an assistant counts as the target's own words."
    if at_once != summary["at_once"] and row_of(summary["methods"], "assisted") and not row_of(rows, "assisted"):
        text += " Assisted generation takes one request at a time, and so stands in the first table alone."
    terms = {row["name"]: WHAT[row["name"]] for row in rows}
    body = [[show(row) for _, show in METHODS] for row in rows]
    return Part(title, [name for name, _ in METHODS], body, text, "parse", terms)


def _method_pictures(summary: dict[str, Any]) -> list[Picture]:
    """Speed against accuracy, where the time goes, where verdicts err, and throughput against load where measured."""
    tables, rows = tables_of(summary), summary["methods"]
    pictures = [plots.speed_and_accuracy(rows, summary["sweep"], summary["threshold"]), plots.seconds_by_phase(rows)]
    if len(tables) > 1:
        pictures.append(plots.throughput(tables))
    parse = row_of(rows, "parse")
    if parse and any(parse.get("false_accept_places", []) + parse.get("false_reject_places", [])):
        pictures.append(plots.error_places(parse))
    return pictures


def _pair_part(pair: dict[str, Any] | None) -> list[Part]:
    if not pair:
        return []
    text = (
        "These figures say whether the task needs a semantic verifier at all. They are of whole answers that the draft "
        f"wrote alone; AUC and kept tokens are of {pair['judged']} of them with all their cuts. So they need not agree "
        "with the verifiers' table, whose drafts are others, nor with the seconds of the methods' table."
    )
    return [Part("The pair of models", ["what", "value"], pair_rows(pair), text, terms=PAIR_TERMS)]


def _parity_part(parity: dict[str, str]) -> Part:
    text = "What training saw of the first prompts and answers, against what the engine feeds, token by token."
    return Part("Parity of training and serving", ["what", "outcome"], list(parity.items()), text)


def transcripts(outcomes: Mapping[str, Sequence[Outcome]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Some of PARSE's answers of each kind, in the prompts' order, and the filters that show them: both as in `page`.

    Args:
        outcomes: by method.
    """
    parse, target = outcomes.get("parse", []), outcomes.get("target", [])
    right_alone = {i for i, outcome in enumerate(target) if outcome.right}
    members = {
        "all": [*range(len(parse))],
        "false-accept": [i for i, one in enumerate(parse) if not one.right and _drafted(one) and i in right_alone],
        "rejected": [i for i, one in enumerate(parse) if any(not s.accepted for s in one.generation.segments)],
        "wrong": [i for i, one in enumerate(parse) if not one.right],
        "slow": sorted(range(len(parse)), key=lambda i: -latency(parse[i]))[:SHOWN],
    }
    shown = sorted({i for indices in members.values() for i in indices[:SHOWN]})
    filters = {}
    for kind, indices in members.items():
        if count := len({*indices} & {*shown}):
            filters[kind] = f"{KINDS[kind]} ({count} of {len(indices)})"
    kinds = {i: [kind for kind, indices in members.items() if i in indices] for i in shown}
    return [_transcript(i + 1, parse[i], kinds[i]) for i in shown], filters


def _transcript(number: int, outcome: Outcome, kinds: Sequence[str]) -> dict[str, Any]:
    """An answer as the page shows it."""
    pieces = [
        {
            "style": "written" if segment.source == "target" else "kept" if segment.accepted else "cut",
            "text": segment.text,
            "confidence": segment.confidence,
        }
        for segment in outcome.generation.segments
    ]
    title = f"Prompt {number}: {'right' if outcome.right else 'wrong'}, {latency(outcome):.2f} s"
    if outcome.error:
        title += f"; {outcome.error}"
    words = "\n\n".join(
        turn["content"] if turn["role"] == "user" else f"{turn['role']}: {turn['content']}"
        for turn in as_messages(outcome.prompt)
    )
    return {"kinds": kinds, "title": title, "prompt": words, "pieces": pieces}


def _drafted(outcome: Outcome) -> bool:
    return any(segment.source == "draft" and segment.accepted for segment in outcome.generation.segments)


def row_of(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """A method's row, or None."""
    return next((row for row in rows if row["name"] == name), None)


def _interval(ends: Sequence[float], form: str) -> str:
    return " to ".join(format(end, form) for end in ends)


def _points(shares: Sequence[float]) -> str:
    """An interval of a difference in points."""
    return _interval([100 * share for share in shares], "+.1f")


def _difference(row: Mapping[str, Any]) -> str:
    if row["name"] == "target":
        return "-"
    return f"{100 * row['accuracy_difference']:+.1f} ({_points(row['accuracy_difference_ci95'])})"


def _percentiles(row: Mapping[str, Any], key: str, scale: float = 1) -> str:
    values = [row[f"{key}_p{percent}"] for percent in PERCENTILES]
    return "-" if None in values else ", ".join(f"{scale * value:.3g}" for value in values)


def _lookahead(row: Mapping[str, Any]) -> str:
    if row["lookahead_accepted_fraction"] is None:
        return "-"
    return f"{row['lookahead_accepted_fraction']:.1%}, {row['lookahead_accepted_per_pass']:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
