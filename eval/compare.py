"""python -m eval compare RUN RUN ...: evaluated runs side by side, in the console and as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from eval.bench.tables import Table, text_table
from eval.methods import Outcome
from eval.page import Part, page
from eval.report import CHOICE, report_parts, transcripts
from eval.sentences import requests, row_of, sentence, tables_of
from eval.verifier_report import read_report
from recipes.command import run_command
from recipes.files import write_text
from recipes.schema import RecipeError

SHOWN = ("target", "parse")  # whose answers a page's transcripts are made of


class Evaluated(NamedTuple):
    """What `python -m eval` wrote of a run."""

    summary: dict[str, Any]  # what eval/summary.json holds
    outcomes: dict[str, list[Outcome]]  # by method, those of `SHOWN`
    verifier: dict[str, Any] | None  # the verifier's report, where it has one that is still there
    made: dict[str, Any]  # how, by provenance.json


Runs = Mapping[str, Evaluated]  # by run folder


def main(arguments: Sequence[str]) -> int:
    """Print the runs' methods and write the page."""
    parser = argparse.ArgumentParser(prog="python -m eval compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as runs/quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="the page's file")
    options = parser.parse_args(arguments)
    return run_command(lambda _: _main(options))


def _main(options: argparse.Namespace) -> int:
    runs = {str(folder): _evaluated(folder) for folder in options.runs}
    made = comparison(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, made)
    tables = [text_table(Table(part.title, part.head, part.rows)) for part in side_by_side(runs)]
    print("\n\n".join([*tables, f"page: {options.out}"]))
    return 0


def _evaluated(folder: Path) -> Evaluated:
    """What a run's evaluation found.

    Raises:
        RecipeError: where there is none, or an older version wrote it.
    """
    file = folder / "eval" / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        lines = (folder / "eval" / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder} cannot be read ({error}): name run folders that `python -m eval` wrote") from error
    made = folder / "provenance.json"
    try:
        outcomes: dict[str, list[Outcome]] = {}
        for record in map(json.loads, lines):
            if record["method"] in SHOWN:
                outcomes.setdefault(record["method"], []).append(Outcome.of_record(record))
        verifier = read_report(Path(summary["verifier"])) if summary["verifier"] else None
        report_parts(summary, verifier)
        stages = json.loads(made.read_text(encoding="utf-8"))["stages"] if made.is_file() else {}
    except RecipeError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{folder} was evaluated by another version ({error!r}): run `python -m eval` on that run again"
        ) from error
    return Evaluated(summary, outcomes, verifier, stages.get("eval", {}))


def side_by_side(runs: Runs) -> list[Part]:
    """For each number of requests at once: the methods' accuracy and speed-up in every run that was measured so."""
    loads = dict.fromkeys(at_once for run in runs.values() for at_once in tables_of(run.summary))
    return [_at_load(at_once, runs) for at_once in loads]


def _at_load(at_once: int, runs: Runs) -> Part:
    tables = {name: tables_of(run.summary).get(at_once, []) for name, run in runs.items()}
    head = ["method", *(f"{run}: {what}" for run in runs for what in ("right", "speed-up"))]
    rows = []
    for method in dict.fromkeys(row["name"] for table in tables.values() for row in table):
        found = [row_of(table, method) for table in tables.values()]
        cells = [[f"{row['accuracy']:.1%}", f"{row['speedup']:.2f}x"] if row else ["-", "-"] for row in found]
        rows.append([method, *chain(*cells)])
    counts = [[f"{table[0]['n']} prompts", ""] if table else ["-", "-"] for table in tables.values()]
    return Part(f"Side by side: {requests(at_once)}", head, [*rows, ["measured on", *chain(*counts)]], marked="parse")


def comparison(runs: Runs) -> str:
    """The page: the runs' sentences, their methods side by side, how each was made, then the parts of its own page."""
    told = [f"{name}: {text}" for name, run in runs.items() if (text := sentence(run.summary))]
    parts, answers = [*side_by_side(runs), _made(runs)], list[dict[str, Any]]()
    filters = {"all": "all runs"}
    for number, (name, run) in enumerate(runs.items()):
        own = report_parts(run.summary, run.verifier)
        parts += [part._replace(title=_of(name, part.title)) for part in own]
        shown, kinds = transcripts(run.outcomes)
        for one in shown:
            own_kinds = [f"{kind}-{number}" for kind in one["kinds"]]
            answers.append({**one, "kinds": ["all", *own_kinds], "title": _of(name, one["title"])})
        filters |= {f"{kind}-{number}": f"{name}: {words}" for kind, words in kinds.items()}
    return page("PARSE: runs side by side", told, parts, answers, filters, choice=CHOICE)


def _made(runs: Runs) -> Part:
    facts = {name: {**run.made, **run.made.get("packages", {})} for name, run in runs.items()}
    names = [
        "finished",
        "hardware",
        "git_commit",
        *dict.fromkeys(chain(*(run.made.get("packages", {}) for run in runs.values()))),
    ]
    rows = [[fact, *(str(each.get(fact) or "-") for each in facts.values())] for fact in names]
    return Part("How these were made", ["what", *runs], rows, folded=True)


def _of(run: str, title: str) -> str:
    return f"{run}: {title[0].lower()}{title[1:]}"
