"""python -m eval.results [RUN ...]: keep the figures of runs, and write docs/results.md out of all that are kept.

Of a run its evaluation, the verifier's report and the labels' noise are kept, with commit, machine and date, as one
JSON file in docs/results/. The benchmarks leave their files there by themselves. What a document shows between
`<!-- NAME -->` or `<!-- NAME: sentence -->` and `<!-- end -->` is written anew too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from eval.bench.tables import Table, gpu_tables, markdown_table
from eval.sentences import requests, sentence
from eval.verifier_report import COLUMNS, kind_cells
from recipes.files import write_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = {
    "parse": "**PARSE**",
    "target": "target alone",
    "generate": "`generate` of transformers",
    "assisted": "assisted generation of transformers",
    "draft": "draft alone",
    "sequential": "sequential verification",
    "speculation": "lossless speculation",
    "parse_lookahead": "PARSE + lookahead",
    "parse_probe": "PARSE by a probe",
    "parse_folded": "PARSE by a folded probe",
    "parse_adapter": "PARSE by an adapter",
    "parse_prompt": "PARSE, the target asked",
    "parse_likelihood": "PARSE by likelihood",
}


SECONDS = ("seconds_per_request", "first_token_seconds", "first_token_seconds_p95", "latency_seconds_p95")


def keep(run: Path, folder: Path) -> Path:
    """Copy the figures of a run into a file of the folder.

    Raises:
        FileNotFoundError: for a run without an evaluation.
    """
    summary, record = (json.loads((run / name).read_text()) for name in ("eval/summary.json", "provenance.json"))
    made = record["stages"]["eval"]
    content = {key: made[key] for key in ("finished", "git_commit", "packages", "hardware")}
    seconds = {stage: one["seconds"] for stage, one in record["stages"].items()}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    content |= {"name": summary["name"], "seconds": seconds, "summary": summary}
    content["lookahead"] = recipe["engine"]["lookahead"]
    for key, path in {
        "verifier": ROOT / (summary["verifier"] or "none") / "report.json",  # the run's own, or one that is shipped
        "labels": run / "rollouts" / "labels.json",
    }.items():
        content[key] = json.loads(path.read_text()) if path.is_file() else None
    if content["verifier"]:
        content["verifier"].pop("curves", None)  # thousands of lines that no table shows
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"run-{summary['name']}.json"
    write_text(file, json.dumps(content, indent=1) + "\n")
    return file


def document(folder: Path) -> str:
    """The document, of what lies in the folder."""
    head = ["# Results", "", "Written by `make results`; the figures are in `docs/results/`.", ""]
    return "\n".join([*head, *_runs(folder), *_benchmarks(folder), *_gpu(folder)])


def _runs(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("run-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        served = record["summary"].get("servers")
        yield from _section(record["name"], record | {"servers": served}, run_tables(record))


def _benchmarks(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("bench-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        yield from _section(record["title"], record, [Table(**table) for table in record["tables"]])


def _section(title: str, record: dict[str, Any], tables: Iterable[Table]) -> Iterator[str]:
    """Tables under a title, and what they were made with."""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items() if version)
    yield f"## {title}"
    yield ""
    served = ", on a vLLM server: " + ", ".join(record["servers"]) if record.get("servers") else ""
    commit, _, changed = str(record["git_commit"]).partition("-")
    commit = commit[:12] + (" with changes" if changed else "")
    yield f"{record['finished']}, commit {commit}, {record['hardware']}, {packages}{served}."
    yield ""
    yield from map(markdown_table, tables)


def run_tables(record: dict[str, Any]) -> Iterator[Table]:
    """The tables of a run: the methods by the requests at once, the verifiers, and the learning curve."""
    summary, verifier = record["summary"], record["verifier"]
    for part in (summary, *summary["concurrency"]):
        yield methods_table(part["methods"], part["at_once"], record.get("lookahead", 0))
    if verifier:
        head = ["verifier", *(title for _, title, _ in COLUMNS)]
        rows = [
            [
                f"**{kind}**" if kind == verifier["chosen"] else kind,
                *kind_cells(figures),
            ]
            for kind, figures in verifier["kinds"].items()
        ]
        oracle = verifier["kinds"][verifier["chosen"]]["oracle_accepted_fraction"]
        title = (
            f"Verifiers on {verifier['n_prompts']} test prompts ({verifier['n_prefixes']} prefixes), "
            f"{verifier['max_accuracy_loss']:.1%} of accuracy promised; an oracle accepts {oracle:.1%}"
        )
        yield Table(title, head, rows)
        if curve := verifier.get("learning_curve"):
            rows = [[f"{one['prompts']:.0f}", f"{one['acceptable']:.1%}", f"{one['loss']:.3f}"] for one in curve]
            yield Table("The probe by the prompts that it learns from", ["prompts", "acceptable", "loss, nats"], rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def methods_table(rows: list[dict[str, Any]], at_once: int, lookahead: int = 0) -> Table:
    """The methods on the same prompts, so many requests at once; see `engine.lookahead` of a recipe."""
    head = ["method", "accuracy (95%)", "against target", "speed-up (95%)", "a request", "first token", "its p95"]
    head += ["latency p95", "tokens from draft, target"]
    cells = []
    for row in rows:
        (low, high), (slow, fast) = row["accuracy_ci95"], row["speedup_ci95"]
        cells.append(
            [
                NAMES.get(row["name"], row["name"]),
                f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})",
                f"{row['accuracy_difference'] * 100:+.1f} pt",
                f"{row['speedup']:.2f}x ({slow:.2f} to {fast:.2f})",
                *(_seconds(row[key]) for key in SECONDS),
                f"{row['tokens_from_draft']:.0f}, {row['tokens_from_target']:.0f}",
            ]
        )
    ahead = f", PARSE with a lookahead of {lookahead}" if lookahead else ""
    return Table(f"{rows[0]['n']} test prompts, {requests(at_once)}{ahead}", head, cells)


def with_tables(text: str, folder: Path) -> str:
    """A document with the first table, or the sentence, of each run that it names; see the module's docstring."""

    def written(found: re.Match[str]) -> str:
        file = folder / f"run-{found['name']}.json"
        if not file.is_file():
            return found[0]
        record = json.loads(file.read_text(encoding="utf-8"))
        part = record["summary"]
        if found["sentence"]:
            shown = f"> {sentence(part)}"
        else:
            shown = markdown_table(methods_table(part["methods"], part["at_once"], record.get("lookahead", 0)))
        return f"<!-- {found['name']}{found['sentence']} -->\n{shown}\n<!-- end -->"

    pattern = r"<!-- (?P<name>[\w-]+)(?P<sentence>: sentence|) -->\n.*?<!-- end -->"
    return re.sub(pattern, written, text, flags=re.DOTALL)


def _gpu(folder: Path) -> Iterator[str]:
    yield "## On a GPU"
    yield ""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("gpu-*.json"))]
    measured = [record for record in records if not record["tiny"]]
    if not measured:
        yield "No GPU has been measured yet. `make gpu`, on a machine with one, leaves its figures here."
        yield ""
    for record in measured:
        yield f"### {record['device']}"
        yield ""
        yield _made_with(record)
        yield ""
        yield from map(markdown_table, gpu_tables(record))


def _made_with(record: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    commit = f"commit {record['commit'][:12]}" if record["commit"] else "an unknown commit"
    return f"{record['date']}, {commit}, {packages}; {record['seconds']:.0f} s in all."


def main(arguments: list[str] | None = None) -> int:
    """Keep what is asked for, and write the documents."""
    parser = argparse.ArgumentParser(prog="python -m eval.results", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders whose figures are kept")
    options = parser.parse_args(arguments)
    for run in options.runs:
        try:
            print(keep(run, DOCS / "results"))
        except (OSError, KeyError) as error:
            print(f"error: {run} holds no evaluation ({error}): run `python -m eval` first", file=sys.stderr)
            return 2
    write_text(DOCS / "results.md", document(DOCS / "results"))
    for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        before = file.read_text(encoding="utf-8")
        if (after := with_tables(before, DOCS / "results")) != before:
            write_text(file, after)
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
