"""How a command ends: refusals, full disks and memory, and the user's wish to stop, each with a line and a status."""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

NO_ROOM = 2**16  # bytes: with fewer free, what fails while it writes fails for want of room
KEPT = "What is finished is kept, and the same command continues from there."


def run_command(body: Callable[[list[Path]], int]) -> int:
    """The exit status of a command: its body's; 2 where it refuses, 3 where room runs out, 130 where it is stopped.

    Args:
        body: is given a list, to which it adds the run folder once that is known.
    """
    folders: list[Path] = []
    try:
        with _terminated_like_interrupted():
            return body(folders)
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, and the same command continues from there", file=sys.stderr)
        return 130
    except Exception as error:
        from recipes.schema import RecipeError

        if isinstance(error, RecipeError):
            print(f"error: {error}", file=sys.stderr)
            return 2
        if (advice := advice_for(error, folders[0] if folders else Path())) is None:
            raise
        print(f"error: {error}\n{advice}", file=sys.stderr)
        return 3


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Within, SIGTERM ends the program as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def advice_for(error: BaseException, folder: Path) -> str | None:
    """What to do where memory, or the disk of a folder, has run out; None for any other error."""
    import torch

    if _is_full(error, folder):
        return f"The disk is full: make room, or move the run folder and set runs to its new place. {KEPT}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return (
            "Memory has run out: lower the stage's batch_size (answers, rollouts) or "
            "trainer.per_device_train_batch_size with gradient_accumulation_steps, turn trainer.gradient_checkpointing "
            f"on, or spread the target (engine.target_options: {{device_map: auto}}). {KEPT}"
        )
    return None


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error comes from a full disk: libraries that write say so in their own words, or not at all."""
    writing = isinstance(error, OSError | RuntimeError) or "Safetensor" in type(error).__name__
    with contextlib.suppress(OSError):
        if writing and shutil.disk_usage(folder).free < NO_ROOM:
            return True
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
