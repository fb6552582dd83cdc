"""What the commands of the engine have in common: options for models and settings, and how they speak of errors."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import NoReturn

from parse.sources import EXPECTED, MODEL, VERIFIER


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"error: {message}; `{self.prog} --help` tells what is allowed\n")


def add_models(parser: argparse.ArgumentParser) -> None:
    """Options that name models; `parse.sources.load` reads them."""
    models = parser.add_argument_group("models")
    models.add_argument("--run", help="a run folder, such as runs/quickstart: its models and settings")
    models.add_argument("--target", help=f"{MODEL}; default: the run's")
    models.add_argument("--draft", help="like --target")
    models.add_argument("--verifier", help=f"{VERIFIER}; default: the run's")
    models.add_argument("--segments", type=value, help="where an answer may be cut: sentence, line or every N tokens")
    models.add_argument("--compile", action="store_true", help="compile passes first where that pays: for many prompts")


def add_settings(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options for how to answer; the group, for more of them."""
    settings = parser.add_argument_group("settings", "as of Engine.generate; default: the run's, else the engine's")
    settings.add_argument("--method", help="parse, target (alone) or draft (alone)")
    settings.add_argument("--threshold", type=float, help="accept confidences at or above it; default: as calibrated")
    settings.add_argument("--policy", help="first_fail, longest or whole")
    settings.add_argument("--handback", help="segment or never")
    settings.add_argument("--horizon", type=value, help="tokens of a draft, segment, or none for no limit")
    settings.add_argument("--lookahead", type=int, help="tokens that the draft proposes while the target writes")
    settings.add_argument("--max-new-tokens", type=int)
    settings.add_argument("--temperature", type=float, help="0 is greedy")
    settings.add_argument("--top-k", type=int)
    settings.add_argument("--top-p", type=float)
    settings.add_argument("--seed", type=int, help="the same seed gives the same answer")
    return settings


def value(text: str) -> int | str | None:
    """A number of tokens where it is one, None for "none", else the word."""
    try:
        return int(text)
    except ValueError:
        return None if text == "none" else text


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return int(text)


def quieten() -> None:
    """Keep the libraries' bars, and their notices for other programmers, away; what is left to say takes a line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _note


def _note(message: object, *_: object, **__: object) -> None:
    print(f"note: {one_line(message)}", file=sys.stderr)


def message_of(error: Exception) -> str | None:
    """What to say of an error that its user can mend; None for a fault of the program."""
    text = one_line(error)
    memory = ("out of memory", "can't allocate memory", "MemoryError")
    if isinstance(error, MemoryError) or any(words in text for words in memory):
        return f"memory has run out: lower --batch-size or --max-new-tokens, or use smaller models ({text[:200]})"
    return text if isinstance(error, EXPECTED) else None


def one_line(words: object) -> str:
    """Words without line breaks."""
    return " ".join(str(words).split())
