"""python -m eval compare RUN RUN ...: evaluated runs side by side, in the console and as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.bench.tables import Table, text_table
from recipes.command import run_command

Summaries = Mapping[str, dict[str, Any]]  # by run folder, what its eval/summary.json holds


def main(arguments: Sequence[str]) -> int:
    """Print the runs' methods and write the page."""
    parser = argparse.ArgumentParser(prog="python -m eval compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as runs/quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="the page's file")
    options = parser.parse_args(arguments)
    return run_command(lambda _: _main(options))


def _main(options: argparse.Namespace) -> int:
    from recipes.files import write_text

    summaries = {str(folder): _summary(folder) for folder in options.runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, comparison(summaries))
    print(f"{text_table(Table('Runs side by side', *side_by_side(summaries)))}\n\npage: {options.out}")
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """What a run's evaluation found.

    Raises:
        RecipeError: where there is none, or it is an old one.
    """
    from recipes.schema import RecipeError

    file = folder / "eval" / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read ({error}): name run folders that `python -m eval` wrote") from error
    if missing := {"max_accuracy_loss", "methods", "at_once", "concurrency"} - summary.keys():
        raise RecipeError(f"{file} lacks {', '.join(sorted(missing))}: run `python -m eval` on that run again")
    return summary


def side_by_side(summaries: Summaries) -> tuple[list[str], list[list[str]]]:
    """Head and rows: how each run was measured, and each method's accuracy and speed-up, at the first load."""
    from eval.report import requests, row_of

    names = list(dict.fromkeys(row["name"] for summary in summaries.values() for row in summary["methods"]))
    head = ["method", *(f"{run}: {what}" for run in summaries for what in ("right", "speed-up"))]
    rows = []
    for name in names:
        cells = [name]
        for summary in summaries.values():
            row = row_of(summary["methods"], name)
            cells += [f"{row['accuracy']:.1%}", f"{row['speedup']:.2f}x"] if row else ["-", "-"]
        rows.append(cells)
    measured = ["measured"]
    for summary in summaries.values():
        measured += [f"{summary['methods'][0]['n']} prompts", requests(summary["at_once"])]
    return head, [*rows, measured]


def comparison(summaries: Summaries) -> str:
    """The page: the runs' sentences, their methods side by side, and each run's pictures."""
    from eval.page import Part, page
    from eval.report import method_pictures, methods_part, sentence

    head, rows = side_by_side(summaries)
    told = {run: sentence(summary) for run, summary in summaries.items()}
    parts = [Part("Side by side", head, rows, marked="parse")]
    for run, summary in summaries.items():
        parts.append(methods_part(summary, summary["at_once"], run)._replace(pictures=method_pictures(summary)))
    return page("PARSE: runs side by side", [f"{run}: {text}" for run, text in told.items() if text], parts)
