"""Progress bars with a rate and a remaining time, on a terminal and off it; and quiet libraries beside them."""

from __future__ import annotations

import io
import sys
import warnings
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm
from transformers.utils import logging


def progress_bar(what: str, total: int) -> tqdm[Any]:
    """A progress bar with rate and remaining time; off a terminal, a line every ten seconds."""
    if sys.stderr.isatty():
        return _Bar(desc=what, total=total, mininterval=0.2, dynamic_ncols=True)
    return _Bar(desc=what, total=total, mininterval=10, maxinterval=10, ascii=True, ncols=100, file=_Lines())


def quieten() -> None:
    """Silence the libraries' own bars and notices, so that ours can be read."""
    if find_spec("datasets"):  # measuring takes none
        import datasets

        datasets.disable_progress_bars()
        datasets.disable_caching()  # beside the data sets, in the run folder
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)  # PEFT mends it itself


class _Lines(io.TextIOBase):
    """Where no terminal rewrites a line, each state of a progress bar takes a line of its own."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return sys.stderr.write(f"{line}\n") if line else 0


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar that estimates once there is something to go by: texts that begin together end together."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm formats the bar from."""
        values: dict[str, Any] = super().format_dict
        if 50 * values["n"] < (values["total"] or 0):
            values["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
        return values
