"""The report of a verifier stage: a console table, and one self-contained HTML file with plots."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_curve

from eval.report import STYLE
from eval.verifier_metrics import Scored, accuracy_loss, judgements, keeps, reliability

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
COLOURS = (
    "#0072b2",
    "#cf7c00",
    "#009e73",
    "#000000",
    "#d03000",
    "#cc79a7",
    "#56b4e9",
)  # told apart by the colour-blind
RULES = 4  # kinds that share a colour, at most, where their names begin with the same word
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 420, 320, 60, 52, 16
POINTS = 60  # thresholds on the curve of accepted tokens against lost accuracy

LAYOUT = """
.wide { overflow-x: auto } .plots { display: flex; flex-wrap: wrap; gap: 0 2rem }
figure { margin: 1rem 0; max-width: 100%; min-width: 0 }
figcaption { font-weight: 600 } .plots svg { max-width: 100%; height: auto }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; list-style: none; padding: 0 }
.legend svg { width: 44px; height: 10px; margin-right: .4rem }
"""

Curve = list[tuple[float, float]]


class LineStyle(NamedTuple):
    """How a kind's line is drawn."""

    colour: str
    dash: str  # of SVG's stroke-dasharray; empty is solid
    width: float

    @property
    def attributes(self) -> str:
        """The same as attributes of a shape in SVG."""
        return f'stroke="{self.colour}" stroke-dasharray="{self.dash}" stroke-width="{self.width}"'


def console_table(report: dict[str, Any]) -> str:
    """The kinds as text, one a line."""
    lines = [f"  {'kind':26s}" + "".join(f"{title:>15s}" for _, title, _ in COLUMNS)]
    for name, figures in report["kinds"].items():
        cells = "".join(f"{form.format(figures[key]):>15s}" for key, _, form in COLUMNS)
        lines.append(f"  {name:26s}{cells}" + ("   <- saved" if name == report["chosen"] else ""))
    oracle = report["kinds"][report["chosen"]]["oracle_accepted_fraction"]
    size = f"{report['n_prompts']} test prompts, {report['n_prefixes']} prefixes"
    lines.append(f"  on {size}; an oracle that knows the labels accepts {oracle:.1%}")
    if curve := report.get("learning_curve"):
        points = ", ".join(f"{row['prompts']:.0f} prompts {row['acceptable']:.1%}" for row in curve)
        lines.append(f"  learning curve, tokens of held-out drafts that a probe may accept: {points}")
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
    max_accuracy_loss = report["max_accuracy_loss"]
    styles = line_styles(list(tested))
    plots = (
        _plot("ROC", roc, styles, 1.0, "invalid cuts accepted", "valid cuts accepted"),
        _plot("Reliability", reliable, styles, 1.0, "confidence", "share of valid cuts"),
        _plot("Use", losses, styles, max(5 * max_accuracy_loss, 0.05), "accuracy lost", "draft tokens accepted"),
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}: verifier</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}{LAYOUT}</style><h1>Verifiers: {html.escape(name)}</h1>
<p>{report["n_prompts"]} test prompts, {report["n_prefixes"]} prefixes. Each kind stands at the threshold that keeps
the accuracy loss under {max_accuracy_loss:.1%} by the calibration prompts. Cuts count up to a draft's first invalid
one.</p>
<div class="wide"><table><tr>{head}</tr>{body}</table></div>
{_legend(styles, report["chosen"])}<div class="plots">{"".join(plots)}</div>{_curve(report)}</html>
"""


def _curve(report: dict[str, Any]) -> str:
    """The learning curve as a table; nothing where there is none."""
    rows = "".join(
        f"<tr><td>{row['prompts']:.0f}</td><td>{row['acceptable']:.1%}</td><td>{row['loss']:.3f}</td></tr>"
        for row in report.get("learning_curve", [])
    )
    if not rows:
        return ""
    heads = ("prompts", "acceptable tokens", "loss (nats a draft)")
    return f"""<h2>More labelled prompts?</h2><p>Probes trained on a part of the labelled prompts, and on all of them:
the share of held-out draft tokens that each may accept within the promise. If it still rises in the last row, more
prompts would help (<code>rollouts.train</code>).</p><div class="wide"><table>
<tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{rows}</table></div>"""


def line_styles(kinds: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each kind, no two with the same colour and dashes, however many there are.

    A kind by itself has a thick, solid line. Kinds whose names begin with the same word, such as the rules on the
    target's likelihood, share a colour and differ by their dashes.
    """
    families: dict[str, list[str]] = {}
    for kind in kinds:
        families.setdefault(kind.partition(" ")[0], []).append(kind)
    groups = [family[i : i + RULES] for family in families.values() for i in range(0, len(family), RULES)]
    styles: dict[str, LineStyle] = {}
    taken: set[tuple[str, str]] = set()
    for index, group in enumerate(groups):
        colour, alone = COLOURS[index % len(COLOURS)], len(group) == 1
        patterns = chain([""] if alone else [], ("9 3", "4 3", "1.5 3"), ("9 3" + " 2 3" * n for n in count(1)))
        for kind in group:
            dash = next(dash for dash in patterns if (colour, dash) not in taken)
            taken.add((colour, dash))
            styles[kind] = LineStyle(colour, dash, 3 if alone else 1.75)
    return {kind: styles[kind] for kind in kinds}


def _roc(scored: Sequence[Scored]) -> Curve:
    confidences, valid = judgements(scored)
    if valid.all() or not valid.any():
        return []
    false, true, _ = roc_curve(valid, confidences)
    return list(zip(false.tolist(), true.tolist(), strict=True))


def _losses(scored: Sequence[Scored]) -> Curve:
    """Accuracy lost and share of the drafts' tokens accepted, over thresholds."""
    confidences = np.unique([confidence for one in scored for confidence in one.confidences])
    chosen = confidences[np.linspace(0, len(confidences) - 1, POINTS).astype(int)]
    total = sum(one.draft.ends[-1] for one in scored)
    kept = [sum([0, *one.draft.ends][keeps(one, t)] for one in scored) / total for t in chosen]
    return sorted((accuracy_loss(scored, t), share) for t, share in zip(chosen, kept, strict=True))


def _plot(
    title: str, curves: dict[str, Curve], styles: dict[str, LineStyle], right: float, across: str, up: str
) -> str:
    """Lines over [0, right] across and [0, 1] up, as inline SVG with named axes."""
    inner_width, inner_height = WIDTH - LEFT - MARGIN, HEIGHT - BOTTOM - MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + inner_width * min(x / right, 1), HEIGHT - BOTTOM - inner_height * y

    shapes = []
    for i in range(6):
        x, y = place(right * i / 5, i / 5)
        shapes.append(f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{right * i / 5:.0%}</text>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{i / 5:.0%}</text>')
        shapes.append(f'<line x1="{LEFT}" y1="{y:.0f}" x2="{WIDTH - MARGIN}" y2="{y:.0f}" stroke="#ddd"/>')
    x, y = place(right / 2, 0.5)
    shapes.append(f'<text x="{x:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{across}</text>')
    shapes.append(f'<text transform="translate(16 {y:.0f}) rotate(-90)" text-anchor="middle">{up}</text>')
    for kind, curve in curves.items():
        drawn = curve * 2 if len(curve) == 1 else curve  # a single point is a dot, by the line's round ends
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in drawn))
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke-linecap="{"round" if len(curve) == 1 else "butt"}" '
            f"{styles[kind].attributes}><title>{html.escape(kind)}</title></polyline>"
        )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(shapes)}</svg>'
    return f"<figure><figcaption>{title}: {up} against {across}</figcaption>{picture}</figure>"


def _legend(styles: dict[str, LineStyle], chosen: str) -> str:
    """Each kind beside a piece of its line."""
    entries = [
        f'<li><svg viewBox="0 0 44 10"><line x1="0" y1="5" x2="44" y2="5" {style.attributes}/></svg>'
        f"{html.escape(kind)}{' (saved)' if kind == chosen else ''}</li>"
        for kind, style in styles.items()
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'
