"""The report of a verifier stage: a console table, and a page that is a part of the evaluation's too."""

from __future__ import annotations

from typing import Any

from eval import plots
from eval.page import Part, page

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


def html_report(name: str, report: dict[str, Any]) -> str:
    """The whole report as one HTML document."""
    return page(f"Verifiers: {name}", [], verifier_parts(report))


def verifier_parts(report: dict[str, Any] | None, parse: dict[str, Any] | None = None) -> list[Part]:
    """The kinds at their thresholds, their curves, and whether more labelled prompts would help.

    Args:
        parse: PARSE's row of the evaluation, which tells where verdicts err.
    """
    if not report:
        return []
    text = (
        f"{report['n_prompts']} test prompts, {report['n_prefixes']} prefixes. Each kind stands at the threshold that "
        f"keeps the accuracy loss under {report['max_accuracy_loss']:.1%} by the calibration prompts. Cuts count up to "
        "a draft's first invalid one."
    )
    rows = [
        [kind, *(form.format(figures[key]) for key, _, form in COLUMNS)] for kind, figures in report["kinds"].items()
    ]
    head = ["kind", *(title for _, title, _ in COLUMNS)]
    pictures = plots.verifier_curves(report) if report.get("curves") else []
    if parse and parse.get("false_accept_places"):
        pictures.append(plots.error_places(parse))
    return [Part("Verifiers", head, rows, text, report["chosen"], None, pictures), *_curve(report)]


def _curve(report: dict[str, Any]) -> list[Part]:
    """The learning curve, where there is one."""
    points = report.get("learning_curve")
    if not points:
        return []
    text = (
        "Probes trained on a part of the labelled prompts, and on all of them: the share of held-out draft tokens that "
        "each may accept within the promise. If it still rises in the last row, more prompts would help "
        "(rollouts.train)."
    )
    rows = [[f"{one['prompts']:.0f}", f"{one['acceptable']:.1%}", f"{one['loss']:.3f}"] for one in points]
    return [Part("More labelled prompts?", ["prompts", "acceptable tokens", "loss (nats a draft)"], rows, text)]
