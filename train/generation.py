"""Texts that models write for data: many at once, shared out over processes, each kept as it is finished.

A stage that is killed goes on behind what it has kept: every finished text is a line of a file in the stage's
scratch folder, whichever process wrote it and however many there are at the next start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from parse.decode import GREEDY, Context, Sampling, Written
from parse.passes import Reader, Steps, drive_together
from train.run import progress_bar

T = TypeVar("T")
Row = dict[str, Any]  # what JSON can hold


Work = Callable[[Sequence[T]], Iterator[tuple[int, Row]]]  # items to (place, row), in the order in which they finish


def together(steps: Callable[[T], Steps[Row]], at_once: int) -> Work[T]:
    """Work by models here: so many items at a time; what passes they want at a moment run together."""
    return lambda items: drive_together(map(steps, items), at_once)


def in_threads(make: Callable[[T], Row], at_once: int) -> Work[T]:
    """Work that waits for a server: so many items at a time, each in a thread."""

    def work(items: Sequence[T]) -> Iterator[tuple[int, Row]]:
        with ThreadPoolExecutor(at_once) as pool:
            places = {pool.submit(make, item): place for place, item in enumerate(items)}
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            finally:  # where one fails, or the reader stops, nothing more is asked
                pool.shutdown(wait=False, cancel_futures=True)

    return work


def finish_all(folder: Path, items: Sequence[T], work: Work[T], what: str) -> list[Row]:
    """The rows of every item, in the order of the items, on every process.

    Args:
        folder: where finished rows are kept; what an earlier start left there is not made again.
        items: the same on every process.
        work: makes this process's share.
        what: the name on the progress bar.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    done = _read(folder) if state.is_main_process else {}
    left = [[i for i in range(len(items)) if i not in done]]
    if state.num_processes > 1:
        broadcast_object_list(left)  # by whoever has looked before any other writes
    mine = left[0][state.process_index :: state.num_processes]
    finished = work([items[i] for i in mine])
    with (
        (folder / f"{time.time_ns()}-{state.process_index}.jsonl").open("w") as file,
        progress_bar(what, total=len(mine)) as bar,
    ):
        for position, row in finished:
            file.write(json.dumps([mine[position], row]) + "\n")
            file.flush()
            bar.update()
    state.wait_for_everyone()
    rows = _read(folder)
    return [rows[i] for i in range(len(items))]


def _read(folder: Path) -> dict[int, Row]:
    """Rows that are kept, by the index of their item; a line that a kill cut short is none."""
    rows = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                index, row = json.loads(line)
                rows[index] = row
    return rows


def write_all(reader: Reader, prompts: Sequence[Sequence[int]], limit: int, at_once: int, what: str) -> list[Written]:
    """A model's greedy answer of at most `limit` tokens to every prompt (token ids), so many at once."""
    written: dict[int, Written] = {}
    with progress_bar(what, total=len(prompts)) as bar:
        for index, answer in drive_together((going_on(reader, ids, limit) for ids in prompts), at_once):
            written[index] = answer
            bar.update()
    return [written[i] for i in range(len(prompts))]


def going_on(reader: Reader, ids: Iterable[int], limit: int, sample: Sampling = GREEDY) -> Steps[Written]:
    """What a model writes behind a text of its own."""
    context = Context(reader)
    try:
        yield from context.reading(list(ids))
        return (yield from context.writing(limit, sample))
    finally:
        context.close()
