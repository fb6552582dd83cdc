"""The report of a verifier stage: a console table, and a page that is a part of the evaluation's too."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

from eval import plots
from eval.page import Part, page

COLUMNS = (  # key of report.json, title, format
    ("auc", "AUC", "{:.4f}"),
    ("threshold", "threshold", "{:.4g}"),
    ("false_accept_rate", "false accepts", "{:.1%}"),
    ("false_reject_rate", "false rejects", "{:.1%}"),
    ("first_error_f1", "first error F1", "{:.3f}"),
    ("accepted_fraction", "accepted", "{:.1%}"),
    ("accuracy_loss", "accuracy lost", "{:.2%}"),
    ("ece", "ECE", "{:.3f}"),
    ("milliseconds_per_cut", "ms a cut", "{:.2f}"),
)
TERMS = {
    "cut": "where a draft may be cut, such as the end of a sentence; valid, if all before it is right",
    "likelihood ..., divergence ...": "rules on what a pass of the target gives anyway; nothing is trained",
    "prompt": "the target is asked in words whether what it reads is right",
    "probe": "a small network on the target's states",
    "folded": "the same as more rows of the target's LM head, so that a server such as vLLM can compute it",
    "adapter": "a LoRA of the target that is asked after each cut",
    "false accepts, false rejects": "the share of invalid cuts that were accepted, and of valid ones that were not",
    "first error F1": "how well the first invalid cut of a draft is found: 1 is always",
    "accepted": "the share of the drafts' tokens that are kept",
    "ECE": "expected calibration error: how far confidences are from the share of valid cuts, on average",
}


def read_report(verifier: Path) -> dict[str, Any] | None:
    """What the verifier's stage found, by its folder; None for a verifier without a report.

    Raises:
        RecipeError: for a report that is none.
    """
    from recipes.schema import RecipeError

    file = verifier / "report.json"
    if not file.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        list(verifier_parts(report))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is no report of a verifier ({error!r}): run the stage `verifier` again") from error
    return report


def console_table(report: dict[str, Any]) -> str:
    """The kinds as text, one a line."""
    lines = [f"  {'kind':26s}" + "".join(f"{title:>15s}" for _, title, _ in COLUMNS)]
    for name, figures in report["kinds"].items():
        cells = "".join(f"{cell:>15s}" for cell in kind_cells(figures))
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


def verifier_parts(report: dict[str, Any] | None) -> list[Part]:
    """The kinds at their thresholds, their curves, and whether more labelled prompts would help."""
    if not report:
        return []
    oracle = report["kinds"][report["chosen"]]["oracle_accepted_fraction"]
    text = (
        f"On the verifier's own {report['n_prompts']} test prompts with {report['n_prefixes']} prefixes. Each kind "
        f"stands at the threshold that keeps the accuracy loss under {report['max_accuracy_loss']:.1%} by the "
        "calibration prompts; what it loses on these may be more or less. The saved kind accepted most of the held-out "
        "training drafts; among equals its confidences were the nearest to the labels. Test prompts decide nothing, so "
        "another kind may look better in this table. "
        f"An oracle that knows the labels accepts {oracle:.1%}. Cuts count up to a draft's first invalid one."
    )
    rows = [[_name(kind, report), *kind_cells(figures)] for kind, figures in report["kinds"].items()]
    head = ["kind", *(title for _, title, _ in COLUMNS)]
    pictures = plots.verifier_curves(report) if report.get("curves") else []
    saved = _name(report["chosen"], report)
    return [Part("Verifiers", head, rows, text, saved, TERMS, pictures), *_curve(report)]


def kind_cells(figures: dict[str, float]) -> list[str]:
    """A kind's figures as text, by `COLUMNS`; "-" where there was nothing to measure."""
    return ["-" if isnan(figures[key]) else form.format(figures[key]) for key, _, form in COLUMNS]


def _name(kind: str, report: dict[str, Any]) -> str:
    return f"{kind} (saved)" if kind == report["chosen"] else kind


def _curve(report: dict[str, Any]) -> list[Part]:
    """The learning curve, where there is one."""
    points = report.get("learning_curve")
    if not points:
        return []
    text = (
        "Probes trained on a part of the labelled prompts, and on all of them: the share of held-out draft tokens that "
        "each may accept within the promise, on other prompts than the table above. If it still rises at the end, more "
        "prompts would help (rollouts.train)."
    )
    rows = [[f"{one['prompts']:.0f}", f"{one['acceptable']:.1%}", f"{one['loss']:.3f}"] for one in points]
    return [Part("More labelled prompts?", ["prompts", "acceptable tokens", "log loss of a draft"], rows, text)]
