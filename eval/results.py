"""python -m eval.results: docs/results.md, out of the files that benchmarks leave in docs/results/."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.bench.tables import gpu_tables, markdown_table
from train.files import write_text

DOCS = Path(__file__).parents[1] / "docs"


def document(folder: Path) -> str:
    """The document, of what lies in the folder."""
    return "\n".join(
        ["# Results", "", "Written by `make results`; the figures are in `docs/results/`.", "", *_gpu(folder)]
    )


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


def main() -> int:
    """Write the document."""
    write_text(DOCS / "results.md", document(DOCS / "results"))
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
