"""python -m eval.bench engine | server | gpu."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.bench.tables import Table, text_table
from recipes.files import write_text
from recipes.machine import environment
from recipes.progress import quieten


def main(arguments: list[str] | None = None) -> int:
    """Measure; print tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description="How fast the engine is, part by part.")
    commands = parser.add_subparsers(dest="what", required=True)
    engine = commands.add_parser("engine", help="ratios of the engine's parts, of small models")
    engine.add_argument("--models", nargs="+", default=["embedded", "smollm2"], choices=["embedded", "smollm2"])
    engine.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    engine.add_argument("--repeats", type=int, default=5)
    server = commands.add_parser("server", help="requests a second through the server, over those of the engine")
    server.add_argument("--clients", nargs="+", type=int, default=[8, 32])
    server.add_argument("--repeats", type=int, default=9)
    for command in (engine, server):
        command.add_argument("--out", type=Path, help="a folder for a JSON file, such as docs/results")
    gpu = commands.add_parser("gpu", help="all that only a GPU can show, in nine minutes")
    gpu.add_argument("--out", type=Path, required=True, help="the folder for the JSON file")
    gpu.add_argument("--tiny", action="store_true", help="tiny shapes, on any device: to see that all runs")
    gpu.add_argument("--run", type=Path, help="a run folder: its draft and verifier in the place of the shipped ones")
    gpu.add_argument("--commit", help="of the sources, where they are no git repository")
    gpu.add_argument("--resume", action="store_true", help="keep the parts that the file has")
    options = parser.parse_args(arguments)
    quieten()
    if options.what == "gpu":
        return _gpu(options)
    if options.what == "server":
        from eval.bench import server as bench

        rows = bench.measure(options.clients, options.repeats)
        _tell("The server", [bench.table(rows)], rows, options.out)
        return 0
    from eval.bench.engine import measure, tables

    rows = measure(options.models, options.batches, options.repeats)
    _tell("The engine", list(tables(rows)), rows, options.out)
    return 0


def _tell(title: str, tables: Sequence[Table], rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the tables and one JSON object; with a folder, leave all in a file there for docs/results.md."""
    made = environment()
    print(f"\n{made['hardware']}\n")
    for table in tables:
        print(f"{text_table(table)}\n")
    if out:
        record = {"title": title, "finished": datetime.now(UTC).isoformat(timespec="seconds"), **made}
        record |= {"tables": [asdict(table) for table in tables], "rows": rows}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"bench-{title.split()[-1]}.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps({"hardware": made["hardware"], "rows": rows}))


def _gpu(options: argparse.Namespace) -> int:
    from eval.bench.gpu import measure

    try:
        record = measure(options.out, options.tiny, options.run, options.commit, options.resume)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record))
    return int(any(part["error"] for part in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
