"""python -m eval.bench gpu: what only a GPU can show, in one process and at most nine minutes.

The parts run one after the other. Each has a limit of time and notes its figures one by one, so what it measured stays
where it fails or runs out of time, and the next part goes on. All is written to one JSON file after every part.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import time
from types import FrameType
from typing import Any

import torch

from eval.bench.parts import PARTS, Part
from eval.bench.shared import FULL, TINY, Bench, Rows
from eval.bench.tables import gpu_tables, text_table
from recipes.files import write_text
from recipes.machine import environment

LIMIT = 540.0  # seconds, for all parts
AGAIN = 5.0  # seconds after which a part that went on all the same is told again that its time is over
GRACE = 20.0  # seconds more before the process is ended from outside of Python


class OutOfTime(KeyboardInterrupt):
    """A part's time is over. Not an `Exception`: what handles those, as tests and compilers do, lets it through."""


def measure(out: Path, tiny: bool, run: Path | None, commit: str | None, resume: bool = False) -> dict[str, Any]:
    """Run all parts; print a table, and leave one JSON file in `out`.

    Args:
        tiny: the same parts with tiny shapes, on whatever device there is, to see that they run.
        run: a run folder whose draft and verifier the last part takes; None: the shipped draft, and the target's own
            verdict by a prompt.
        commit: of the sources, where they are no git repository.
        resume: go on after the parts that the file has.

    Returns:
        what the file holds.

    Raises:
        ValueError: where there is no GPU, and tiny shapes were not asked for.
    """
    if not (torch.cuda.is_available() or tiny):
        raise ValueError(
            "python -m eval.bench gpu needs a GPU, and torch sees none here; --tiny runs its parts anywhere"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu-{'tiny' if tiny else re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    record = json.loads(file.read_text()) if resume else _new_record(device, tiny, commit)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape, within what is measured
    bench = Bench(TINY if tiny else FULL, record, run)
    for part in PARTS:
        if part.name in record["parts"]:
            continue
        left = record["started"] + LIMIT - time()
        faulthandler.dump_traceback_later(max(1.0, left + GRACE), exit=True)  # anew: pytest takes it away
        _run(part, bench, min(part.limit, left), file)
        if not _device_answers():
            _start_again(out, tiny, run)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{device}, {record['seconds']:.0f} s\n")
    for table in gpu_tables(record):
        print(f"{text_table(table)}\n")
    print(f"written to {file}", flush=True)
    return record


def _new_record(device: str, tiny: bool, commit: str | None) -> dict[str, Any]:
    made = environment()
    return {
        "device": device,
        "tiny": tiny,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit or made["git_commit"],
        "packages": {"python": made["python"], **{k: v for k, v in made["packages"].items() if v}},
        "started": time(),
        "seconds": 0.0,
        "parts": {},
    }


def _run(part: Part, bench: Bench, limit: float, file: Path) -> None:
    """Run a part; its record holds its rows, its seconds, and why it did not come to its end, if it did not."""
    record, started = bench.record, time()

    def keep(error: str | None = "the process ended within it") -> None:
        entry = {"seconds": time() - started, "error": error, "rows": list(rows)}
        record["parts"][part.name] = entry
        record["seconds"] = time() - record["started"]
        write_text(file, json.dumps(record, indent=1) + "\n")

    rows, error = Rows(part.name, keep), None
    keep()
    print(f"[{part.name}] {part.what}, at most {limit:.0f} s", flush=True)
    try:
        with _at_most(limit):
            part.run(bench, rows)
    except OutOfTime:
        error = f"out of time after {limit:.0f} s"
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"[:2000]
    gc.collect()
    keep(error)
    if error:
        print(f"[{part.name}] not finished: {error}", flush=True)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Within, `OutOfTime` is raised once so many seconds are over."""
    if seconds <= 0:
        raise OutOfTime

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _device_answers() -> bool:
    """Whether the device computes: after some errors it does not, in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return bool((torch.ones(8, device="cuda") + 1 == 2).all())
    except RuntimeError as error:
        print(f"the device fails in this process: {error}", flush=True)
        return False
    return True


def _start_again(out: Path, tiny: bool, run: Path | None) -> None:
    """Replace this process by a fresh one that resumes after what is written."""
    words = [*(["--tiny"] if tiny else []), *(["--run", str(run)] if run else []), "--resume"]
    command = [sys.executable, "-m", "eval.bench", "gpu", "--out", str(out), *words]
    sys.stdout.flush()
    os.execv(sys.executable, command)
