"""Texts that models write for data: many at once, shared out over processes, each kept as it is finished.

A stage that is killed resumes after what it has kept: every finished text is a line of a file in the stage's
scratch folder, whichever process wrote it and however many there are at the next start.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from parse.model import Model, ModelSequence
from parse.sampling import GREEDY, Sampling, Written
from parse.scheduler import Steps, run_together
from parse.text import says, through_stop
from recipes.digests import of_values
from recipes.progress import progress_bar
from recipes.schema import RecipeError

T = TypeVar("T")
Row = dict[str, Any]  # what JSON can hold
FAILED = "failed"  # the key of a row that another try may still make, and why it is not made yet
REFUSED = "error"  # the key of a row that is none for its item's own sake, and why: not kept, but an outcome
MAY_FAIL = 0.01  # of the items, for good
IN_A_ROW = 20  # failures after which nothing more is tried
KEPT_SO_FAR = "what is finished is kept, and the next start asks for the rest. The reason"


class TooManyFailed(RecipeError):
    """Too many items could not be finished: a stage that went on with the others would stand on few."""


Work = Callable[
    [Sequence[T]], Generator[tuple[int, Row], None, None]
]  # items to (place, row), in the order in which they finish


def batched(steps: Callable[[T], Steps[Row]], at_once: int) -> Work[T]:
    """Work by models here: so many items at a time; what passes they want at a moment run together."""
    return lambda items: run_together(map(steps, items), at_once)


def in_threads(make: Callable[[T], Row], at_once: int) -> Work[T]:
    """Work that waits for a server: `at_once` items at a time, each in a thread.

    Nobody waits for a thread: where one fails, or the user stops, what it is waiting for is left.
    """

    def work(items: Sequence[T]) -> Generator[tuple[int, Row], None, None]:
        wanted: SimpleQueue[int] = SimpleQueue()
        finished: SimpleQueue[tuple[int, Row | BaseException]] = SimpleQueue()
        for place in range(len(items)):
            wanted.put(place)

        def ask() -> None:
            with contextlib.suppress(Empty):
                while True:
                    place = wanted.get_nowait()
                    try:
                        finished.put((place, make(items[place])))
                    except BaseException as error:
                        finished.put((place, error))
                        return

        try:
            for _ in range(min(at_once, len(items))):
                threading.Thread(target=ask, daemon=True).start()
            for _ in items:
                place, row = finished.get()
                if isinstance(row, BaseException):
                    raise row
                yield place, row
        finally:
            with contextlib.suppress(Empty):
                while True:
                    wanted.get_nowait()

    return work


def finish_all(
    folder: Path, items: Sequence[T], work: Work[T], what: str, identity: Callable[[T], Any] = lambda item: item
) -> list[Row]:
    """The rows of every item, in the order of the items, on every process.

    Rows are kept by what their items are, not by where they stand: the next start may have other items before them. A
    row that `FAILED`, or that was `REFUSED`, is not kept, and its item is asked for again by the next start.

    Args:
        folder: where finished rows are kept; what an earlier start left there is not made again.
        items: the same on every process, all different.
        work: makes this process's share.
        what: the name on the progress bar.
        identity: what JSON can hold of an item that tells it from others.

    Raises:
        TooManyFailed: where `IN_A_ROW` failures follow each other, or too many are left at the end.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    keys = [of_values([identity(item)]) for item in items]
    done = _read(folder) if state.is_main_process else {}
    left = [[i for i, key in enumerate(keys) if key not in done]]
    if state.num_processes > 1:
        broadcast_object_list(left)  # by whoever has looked before any other writes
    mine = left[0][state.process_index :: state.num_processes]
    unkept: dict[str, Row] = {}
    in_a_row = 0
    with (
        (folder / f"{time.time_ns()}-{state.process_index}.jsonl").open("w") as file,
        progress_bar(what, total=len(mine)) as bar,
        closing(work([items[i] for i in mine])) as finished,
    ):
        for position, row in finished:
            key = keys[mine[position]]
            in_a_row = in_a_row + 1 if row.get(FAILED) else 0
            if in_a_row >= IN_A_ROW:
                raise TooManyFailed(f"{what}: the last {in_a_row} of {len(mine)} failed; {KEPT_SO_FAR}: {row[FAILED]}")
            if row.get(FAILED) or row.get(REFUSED):
                unkept[key] = row
            else:
                file.write(json.dumps([key, row]) + "\n")
                file.flush()
            bar.update()
    state.wait_for_everyone()
    others: dict[str, Row] = dict(pair for some in gather_object([list(unkept.items())]) for pair in some)
    reasons = [row[FAILED] for row in others.values() if row.get(FAILED)]
    if len(reasons) > MAY_FAIL * len(items):
        raise TooManyFailed(f"{what}: {len(reasons)} of {len(items)} failed; {KEPT_SO_FAR}: {reasons[0]}")
    rows = {**others, **_read(folder)}
    return [rows[key] for key in keys]


def _read(folder: Path) -> dict[str, Row]:
    """Rows that are kept, by their items' keys; a line that a kill or damage left broken is none, and is made again."""
    rows = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text(errors="replace").split("\n")[:-1]:
            with contextlib.suppress(ValueError, TypeError):
                key, row = json.loads(line)
                if isinstance(key, str) and isinstance(row, dict):
                    rows[key] = row
    return rows


def write_all(model: Model, prompts: Sequence[Sequence[int]], limit: int, at_once: int, what: str) -> list[Written]:
    """A model's greedy answer of at most `limit` tokens to every prompt (token ids), so many at once."""
    written: dict[int, Written] = {}
    with progress_bar(what, total=len(prompts)) as bar:
        for index, answer in run_together((write_after(model, ids, limit) for ids in prompts), at_once):
            written[index] = answer
            bar.update()
    return [written[i] for i in range(len(prompts))]


async def write_after(
    model: Model, ids: Sequence[int], limit: int, sampling: Sampling = GREEDY, stops: Sequence[str] = ()
) -> Written:
    """What a model writes after a prompt, up to `limit` tokens or a stop string."""
    sequence = model.open(ids)
    try:
        return await write_on(sequence, model.tokenizer, [], limit, sampling, stops)
    finally:
        sequence.close()


async def write_on(
    sequence: ModelSequence,
    tokenizer: PreTrainedTokenizerBase,
    start: Sequence[int],
    limit: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[str] = (),
) -> Written:
    """What a model writes after the beginning of an answer, up to `limit` tokens or a stop string.

    A stop string ends an answer as the end token does; the tokens up to the one that completes it are given.
    """
    written = await sequence.decode(start, limit, sampling, says(stops, start, tokenizer) if stops else None)
    count = through_stop([*start, *written.ids], stops, tokenizer)
    if count is None:
        return written
    return Written(written.ids[: max(count - len(start), 0)], ended=True)
