"""The report of a verifier stage: a console table, and one self-contained HTML file with plots."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from eval.judged import Scored, accuracy_loss, judgements, keeps, reliability
from eval.report import STYLE

COLUMNS = (  # key of report.json, title, format
    ("auc", "AUC", "{:.4f}"),
    ("threshold", "threshold", "{:.4f}"),
    ("false_accept_rate", "false accepts", "{:.1%}"),
    ("false_reject_rate", "false rejects", "{:.1%}"),
    ("first_error_f1", "first error F1", "{:.3f}"),
    ("accepted_fraction", "accepted", "{:.1%}"),
    ("accuracy_loss", "accuracy lost", "{:.2%}"),
    ("ece", "ECE", "{:.3f}"),
    ("milliseconds_per_cut", "ms a cut", "{:.2f}"),
)
COLOURS = ("#27c", "#c52", "#3a7", "#85b", "#a83", "#555", "#2aa", "#d4a")
WIDTH, HEIGHT, MARGIN = 420, 300, 46
POINTS = 60  # thresholds on the curve of accepted tokens against lost accuracy

Curve = list[tuple[float, float]]


def console_table(report: dict[str, Any]) -> str:
    """The kinds as text, one a line."""
    lines = [f"  {'kind':26s}" + "".join(f"{title:>15s}" for _, title, _ in COLUMNS)]
    for name, figures in report["kinds"].items():
        cells = "".join(f"{form.format(figures[key]):>15s}" for key, _, form in COLUMNS)
        lines.append(f"  {name:26s}{cells}" + ("   <- saved" if name == report["chosen"] else ""))
    oracle = report["kinds"][report["chosen"]]["oracle_accepted_fraction"]
    size = f"{report['n_prompts']} test prompts, {report['n_prefixes']} prefixes"
    lines.append(f"  on {size}; who knows the labels accepts {oracle:.1%}")
    return "\n".join(lines)


def html_report(name: str, report: dict[str, Any], tested: Mapping[str, Sequence[Scored]]) -> str:
    """The whole report as one HTML document.

    Args:
        tested: each kind's verdicts on the test prompts.
    """
    head = "".join(f"<th>{title}</th>" for title in ("kind", *(title for _, title, _ in COLUMNS)))
    body = "".join(
        f"<tr><td>{html.escape(kind)}{' (saved)' if kind == report['chosen'] else ''}</td>"
        + "".join(f"<td>{form.format(figures[key])}</td>" for key, _, form in COLUMNS)
        + "</tr>"
        for kind, figures in report["kinds"].items()
    )
    roc = {kind: _roc(scored) for kind, scored in tested.items()}
    reliable = {kind: [(stated, true) for _, stated, true in reliability(*judgements(tested[kind]))] for kind in tested}
    losses = {kind: _losses(scored) for kind, scored in tested.items()}
    promise = report["max_accuracy_loss"]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}: verifier</title>
<style>{STYLE}</style><h1>Verifiers: {html.escape(name)}</h1>
<p>{report["n_prompts"]} test prompts, {report["n_prefixes"]} prefixes. Each kind stands at the threshold that keeps the
accuracy loss under {promise:.1%} by the calibration prompts; cuts count up to a draft's first invalid one.</p>
<table><tr>{head}</tr>{body}</table>
<h2>Valid cuts accepted against invalid cuts accepted (ROC)</h2>{_plot(roc, 1.0)}
<h2>Share of valid cuts against confidence (reliability)</h2>{_plot(reliable, 1.0)}
<h2>Draft tokens accepted against accuracy lost</h2>{_plot(losses, max(5 * promise, 0.05))}
<p>Across is what the heading names last. The lines are, in turn: {_legend(list(tested))}.</p></html>
"""


def _roc(scored: Sequence[Scored]) -> Curve:
    confidences, valid = judgements(scored)
    if valid.all() or not valid.any():
        return []
    false, true, _ = roc_curve(valid, confidences)
    return list(zip(false.tolist(), true.tolist(), strict=True))


def _losses(scored: Sequence[Scored]) -> Curve:
    """Accuracy lost and share of the drafts' tokens accepted, over thresholds."""
    confidences = np.unique(judgements(scored)[0])
    chosen = confidences[np.linspace(0, len(confidences) - 1, POINTS).astype(int)]
    total = sum(one.draft.ends[-1] for one in scored)
    kept = [sum([0, *one.draft.ends][keeps(one, t)] for one in scored) / total for t in chosen]
    return sorted((accuracy_loss(scored, t), share) for t, share in zip(chosen, kept, strict=True))


def _plot(curves: dict[str, Curve], right: float) -> str:
    """Lines over [0, right] across and [0, 1] up, as inline SVG."""
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + inner_width * min(x / right, 1), HEIGHT - MARGIN - inner_height * y

    shapes = []
    for i in range(6):
        x, y = place(right * i / 5, i / 5)
        shapes.append(f'<text x="{x:.0f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{right * i / 5:.0%}</text>')
        shapes.append(f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">{i / 5:.0%}</text>')
        shapes.append(f'<line x1="{MARGIN}" y1="{y:.0f}" x2="{WIDTH - MARGIN}" y2="{y:.0f}" stroke="#ddd"/>')
    for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2">'
            f"<title>{html.escape(name)}</title></polyline>"
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(shapes)}</svg>'


def _legend(names: Sequence[str]) -> str:
    pairs = zip(names, _colours(len(names)), strict=True)
    return ", ".join(f'<b style="color:{colour}">{html.escape(name)}</b>' for name, colour in pairs)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
