"""The report: a console table, and one self-contained HTML file with plots and coloured transcripts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from eval.methods import WHAT, Outcome

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } 
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #444 } td { border-bottom: 1px solid #ddd } 
td:first-child, th:first-child { text-align: left }
.kept { background: #d8f0d8 } .cut { background: #f6d5d5; text-decoration: line-through; color: #777 }
.target { background: #d9e5f8 } .answer { padding: .6rem; border-left: 3px solid #bbb; margin: .5rem 0 1.5rem }
span { border-radius: 3px; padding: 0 .15rem } sup { color: #777; font-size: .7em } svg text { font: 12px system-ui }
"""


def console_table(rows: Sequence[dict[str, Any]]) -> str:
    """The methods as text, one a line."""
    lines = [
        f"{'method':16s}{'accuracy':>9s} {'95% interval':>15s}{'speed-up':>10s} {'95% interval':>14s}"
        f"{'s/request':>11s}{'first token':>13s}{'accepted':>10s}{'vs target':>11s}"
    ]
    for row in rows:
        low, high = row["accuracy_ci95"]
        slow, fast = row["speedup_ci95"]
        lines.append(
            f"{row['name']:16s}{row['accuracy']:9.1%} {f'{low:.1%}-{high:.1%}':>15s}{row['speedup']:9.2f}x "
            f"{f'{slow:.2f}-{fast:.2f}':>14s}{row['seconds_per_request']:11.3f}{row['first_token_seconds']:12.3f}s"
            f"{_percent(row['accepted_fraction']):>10s}{row['accuracy_difference'] * 100:+9.1f}pt"
        )
    return "\n".join(lines)


def requests(at_once: int) -> str:
    """How many requests run, in words."""
    return "one request at a time" if at_once == 1 else f"{at_once} requests at once"


def pair_table(pair: dict[str, Any]) -> str:
    """The properties of the pair as text."""
    tokens, auc = pair["answer_tokens"], pair["auc"]
    free = {name: value for name, value in auc.items() if name.startswith("likelihood")}
    lines = [
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
    return "\n".join(f"  {name:38s}{value}" for name, value in lines)


def html_report(summary: dict[str, Any], outcomes: dict[str, list[Outcome]], shown: int = 8) -> str:
    """The whole report as one HTML document."""
    rows = summary["methods"]
    transcripts = "".join(_transcript(outcome) for outcome in outcomes.get("parse", [])[:shown])
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(summary["name"])}</title>
<style>{STYLE}</style><h1>PARSE: {html.escape(summary["name"])}</h1>
<p>{rows[0]["n"]} prompts, every method on the same ones in turn, {requests(summary["at_once"])}, on
{html.escape(summary["hardware"])}. Speed-up is end-to-end seconds of target-alone over the method's; intervals are
95%.</p>
{_html_table(rows)}{_concurrency(summary)}<h2>Speed against accuracy</h2>{_plot(summary)}
<p>Points are the methods; the line is PARSE over thresholds, on {summary["sweep_prompts"]} of the prompts.</p>
<h2>The pair of models</h2><pre>{html.escape(pair_table(summary["pair"])) if summary["pair"] else ""}</pre>
<h2>Transcripts</h2><p><span class="kept">draft, accepted</span> <span class="cut">draft, rejected</span>
<span class="target">target</span>; small figures are the confidence at each cut.</p>{transcripts}</html>
"""


def _html_table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "method|accuracy|interval|vs target|p|speed-up|interval|s/request|first token|accepted|"
        "false accepts|false rejects"
    )
    body = []
    for row in rows:
        low, high = row["accuracy_ci95"]
        slow, fast = row["speedup_ci95"]
        cells = [
            row["name"],
            f"{row['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['accuracy_difference'] * 100:+.1f} pt",
            f"{row['mcnemar_p']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{slow:.2f} to {fast:.2f}",
            f"{row['seconds_per_request']:.3f}",
            f"{row['first_token_seconds']:.3f} s",
            _percent(row["accepted_fraction"]),
            _percent(row["false_accept_rate"]),
            _percent(row["false_reject_rate"]),
        ]
        body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head.split("|"))
    what = "; ".join(f"<b>{row['name']}</b>: {WHAT[row['name']]}" for row in rows)
    return f"<table><tr>{header}</tr>{''.join(body)}</table><p>{what}.</p>"


def _concurrency(summary: dict[str, Any]) -> str:
    """The same table for other numbers of requests at once; of these seconds are those of all over their number."""
    return "".join(
        f"<h2>{requests(other['at_once']).capitalize()}</h2>{_html_table(other['methods'])}"
        for other in summary["concurrency"]
    )


def _plot(summary: dict[str, Any]) -> str:
    """Speed-up (across) against accuracy (up), as inline SVG."""
    points = [(row["speedup"], row["accuracy"], row["name"]) for row in summary["methods"]]
    sweep = [(p["speedup"], p["accuracy"], f"{p['threshold']:.3g}") for p in summary["sweep"]]
    width, height, margin = 640, 360, 50
    right = max(x for x, _, _ in points + sweep) * 1.1
    bottom = min(y for _, y, _ in points + sweep)
    floor = max(0.0, bottom - (1 - bottom) * 0.15 - 0.005)

    def place(x: float, y: float) -> tuple[float, float]:
        across = margin + (width - 2 * margin) * x / right
        return across, height - margin - (height - 2 * margin) * (y - floor) / (1 - floor)

    shapes = []
    for tick in range(int(right) + 1):
        x, y = place(tick, floor)
        shapes.append(f'<text x="{x:.0f}" y="{y + 20:.0f}" text-anchor="middle">{tick}x</text>')
    for i in range(5):
        value = floor + (1 - floor) * i / 4
        x, y = place(0, value)
        shapes.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{value:.0%}</text>')
        shapes.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{width - margin}" y2="{y:.0f}" stroke="#ddd"/>')
    if sweep:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(a, b) for a, b, _ in sweep))
        shapes.append(f'<polyline points="{path}" fill="none" stroke="#3a7" stroke-width="2"/>')
    for a, b, name in sweep:
        x, y = place(a, b)
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#3a7"><title>threshold {name}</title></circle>')
    for a, b, name in points:
        x, y = place(a, b)
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#27c"/>')
        shapes.append(f'<text x="{x + 8:.1f}" y="{y + 16:.1f}">{name}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}">{"".join(shapes)}</svg>'


def _transcript(outcome: Outcome) -> str:
    pieces = []
    for segment in outcome.generation.segments:
        style = "target" if segment.source == "target" else "kept" if segment.accepted else "cut"
        mark = f"<sup>{segment.confidence:.2f}</sup>" if segment.confidence is not None else ""
        pieces.append(f'<span class="{style}">{html.escape(segment.text)}</span>{mark}')
    verdict = "right" if outcome.right else "wrong"
    return (
        f"<b>{html.escape(str(outcome.prompt))}</b> ({verdict}, {outcome.seconds:.2f} s)"
        f'<div class="answer">{" ".join(pieces)}</div>'
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
