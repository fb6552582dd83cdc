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
from eval.sentences import interval, opening, points, requests, row_of, tables_of
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
PAIR_TERMS = {
    "foreign prefix": "a right beginning of an answer in words that the target would not have chosen",
    "best free rule": "the best of the rules on likelihoods that a pass of the target gives anyway",
    "AUC": "how often a valid cut gets a higher confidence than an invalid one: 1 is always, 0.5 is chance",
    "oracle, lossless": (
        "what a faultless verifier would keep of one draft, while PARSE drafts again after a repair; what is kept "
        "where each token must be the target's"
    ),
}
COUNTED = (
    "Accepted tokens per pass are the draft's alone: the token that the target writes after them, elsewhere called a "
    "bonus, is not counted."
)
Column = tuple[str, Callable[[Mapping[str, Any]], str]]  # a title, and how a row shows it
METHODS: tuple[Column, ...] = (
    ("method", lambda row: row["name"]),
    ("speed-up (95%)", lambda row: f"{row['speedup']:.2f}x ({interval(row['speedup_ci95'], '.2f')})"),
    ("right (95%)", lambda row: f"{row['accuracy']:.1%} ({interval(row['accuracy_ci95'], '.1%')})"),
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
    shown, filters = transcripts(outcomes)
    parts = report_parts(summary, verifier)
    return page(f"PARSE: {summary['name']}", opening(summary), parts, shown, filters, origin, CHOICE)


def report_parts(summary: dict[str, Any], verifier: dict[str, Any] | None) -> list[Part]:
    """All tables and plots of an evaluation; its arguments are those of `html_report`."""
    of_pair = [*_pair_part(summary["pair"]), _parity_part(summary["parity"])]
    return [*_method_parts(summary), *verifier_parts(verifier), *of_pair]


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


def _difference(row: Mapping[str, Any]) -> str:
    if row["name"] == "target":
        return "-"
    return f"{100 * row['accuracy_difference']:+.1f} ({points(row['accuracy_difference_ci95'])})"


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
