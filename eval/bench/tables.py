"""Tables of what the benchmarks measured: for a terminal, and for docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Format = Callable[[Any], str]
Columns = Sequence[tuple[str, str, Format]]  # of each the words above it, the key, and how a value is written


@dataclass(frozen=True)
class Table:
    """A title, what stands above the columns, and the cells of each row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def plain(value: Any) -> str:
    """The value as it is; "-" for None."""
    return "-" if value is None else str(value)


def _in(unit: float, text: str) -> Format:
    return lambda value: "-" if value is None else text.format(value / unit)


times: Format = _in(1, "{:.2f}x")
percent: Format = _in(0.01, "{:.1f}%")
_ms: Format = _in(1e-3, "{:.2f} ms")
_seconds: Format = _in(1, "{:.3f} s")

# for each kind of row that the benchmark of a GPU leaves, its title and columns
COLUMNS: dict[str, tuple[str, Columns]] = {
    "tests": (
        "Tests on the device",
        (
            ("file", "file", plain),
            ("passed", "passed", plain),
            ("failed", "failed", plain),
            ("skipped", "skipped", plain),
        ),
    ),
    "ceilings": (
        "Ceilings: bytes read and written by a copy, and a matrix product",
        (("bandwidth", "bandwidth", _in(1e12, "{:.2f} TB/s")), ("rate", "rate", _in(1e12, "{:.0f} TFLOP/s"))),
    ),
    "steps": (
        "Decoding steps, against the time that their bytes take, and `generate` (goals at 1 text: 85%, 60%; 3x)",
        (
            ("model", "role", plain),
            ("texts", "batch", plain),
            ("step", "step", _ms),
            ("floor", "floor", _ms),
            ("floor / step", "floor_share", percent),
            ("generate / ours", "generate_over_ours", times),
        ),
    ),
    "passes": (
        "Packed passes of the target (goal at N = 1024, K = 64, S = 4: 1.15x an equal prefill)",
        (
            ("N", "N", plain),
            ("K", "K", plain),
            ("S", "S", plain),
            ("packed", "packed", _ms),
            ("/ equal prefill", "over_equal", times),
            ("K passes /", "sequential_over", times),
        ),
    ),
    "split": (
        "One packed pass's time",
        (
            ("N", "N", plain),
            ("K", "K", plain),
            ("S", "S", plain),
            ("packed", "packed", _ms),
            ("attention", "attention", percent),
            ("linear layers", "linear", percent),
            ("head", "head", percent),
            ("rest", "rest", percent),
        ),
    ),
    "masks": (
        "Packed passes that are not compiled: dense masks, and FlexAttention's",
        (
            ("N", "N", plain),
            ("K", "K", plain),
            ("S", "S", plain),
            ("dense", "dense", _ms),
            ("flex", "flex", _ms),
            ("flex / dense", "flex_over_dense", times),
        ),
    ),
    "answers": (
        "Whole answers by a script (goal: 1.1x the ideal time)",
        (
            ("texts", "batch", plain),
            ("right", "kept", percent),
            ("method", "way", plain),
            ("seconds", "seconds", _seconds),
            ("speed-up", "speedup", times),
            ("drafted", "accepted", percent),
            ("/ ideal", "over_ideal", times),
            ("in models", "models_share", percent),
            ("peak", "peak_gib", _in(1, "{:.1f} GiB")),
            ("/ weights and caches", "peak_over_held", times),
        ),
    ),
    "pair": (
        "The shipped pair on its task",
        (
            ("method", "method", plain),
            ("draft", "draft", plain),
            ("verifier", "verifier", plain),
            ("n", "n", plain),
            ("accuracy", "accuracy", percent),
            ("speed-up", "speedup", times),
            ("s/request", "seconds_per_request", _seconds),
            ("first token", "first_token_seconds", _seconds),
            ("drafted kept", "accepted_fraction", percent),
            ("in models", "model_time_fraction", percent),
        ),
    ),
}


def of_rows(title: str, columns: Columns, rows: Sequence[dict[str, Any]]) -> Table:
    """A table of rows, whose cells may lack some of the columns."""
    cells = [[write(row.get(key)) for _, key, write in columns] for row in rows]
    return Table(title, [head for head, _, _ in columns], cells)


def gpu_tables(record: dict[str, Any]) -> Iterator[Table]:
    """The tables of a record; of a part that did not come to its end, why, and what it left."""
    for name, part in record["parts"].items():
        if part["error"]:
            yield Table(f"The part `{name}` did not come to its end: {part['error']}", (), ())
        for kind in dict.fromkeys(row["table"] for row in part["rows"]):
            yield of_rows(*COLUMNS[kind], [row for row in part["rows"] if row["table"] == kind])


def text_table(table: Table) -> str:
    """A table for a terminal."""
    lines = [list(table.head), *table.rows] if table.head else []
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([table.title, *text])


def markdown_table(table: Table) -> str:
    """A table for a document."""
    if not table.head:
        return f"{table.title}\n"
    lines = [f"| {' | '.join(line)} |" for line in (table.head, ["---"] * len(table.head), *table.rows)]
    return "\n".join([f"{table.title}:", "", *lines, ""])
