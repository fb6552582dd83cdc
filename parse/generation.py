"""Plain data of an answer: how it is asked for, what it is made of, and what it took."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

METHODS = ("parse", "target", "draft")
POLICIES = ("first_fail", "longest", "whole")
HANDBACKS = ("segment", "never")


@dataclass(frozen=True)
class Segment:
    """A piece of an answer: who wrote it, how confident the target was, and whether it was kept."""

    text: str  # with a cut inside a character, that is the later piece's; those kept join to the answer
    source: str  # "draft" or "target"
    confidence: float | None
    accepted: bool


@dataclass
class Stats:
    """What one answer took. Seconds are wall time; tokens are the target's, without end-of-sequence."""

    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_tokens: int = 0
    rounds: int = 0
    verify_passes: int = 0
    lookahead_tokens: int = 0  # that the draft proposed, a few at a time, while the target wrote
    lookahead_accepted_tokens: int = 0  # those of them that the target chose too; they count among `target_tokens`
    lookahead_passes: int = 0  # of the target over proposals
    seconds: dict[str, float] = field(
        default_factory=lambda: {"draft": 0.0, "verify": 0.0, "target": 0.0, "other": 0.0}
    )
    first_token_seconds: float = 0.0


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens (end-of-sequence left out), and how it came about."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    segments: list[Segment]
    stats: Stats
    error: str | None = None  # why the prompt was not answered, where others of its list were


@dataclass(frozen=True)
class Settings:
    """How to answer: the arguments of `Engine.generate`.

    Raises:
        ValueError: for a value that is not allowed; the message says what is.
    """

    max_new_tokens: int = 512
    threshold: float | None = None
    policy: str = "first_fail"
    handback: str = "segment"
    horizon: int | str | None = None
    lookahead: int = 0
    method: str = "parse"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("policy", POLICIES), ("handback", HANDBACKS), ("method", METHODS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: use one of {', '.join(allowed)}")
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        if self.threshold is not None:
            finite_number("threshold", self.threshold)
        if self.horizon not in (None, "segment"):
            whole_number("horizon", self.horizon, least=1, other='None, "segment" or ')
        whole_number("lookahead", self.lookahead, least=0)
        finite_number("temperature", self.temperature, least=0)
        whole_number("top_k", self.top_k, least=0)
        if not 0 < finite_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p={self.top_p} is no share of the probability: use a number above 0, up to 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop={self.stop!r:.100}: use None, a string, or a list of strings, none of them empty")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r}: use True or False")
        if self.seed is not None:
            whole_number("seed", self.seed, least=0, most=2**63 - 1, other="None or ")


def whole_number(name: str, value: Any, least: int, most: int | None = None, other: str = "") -> int:
    """The value, where it is a whole number in a range.

    Raises:
        ValueError: naming the setting, what was given, and what is allowed (`other` and a whole number).
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        end = "on" if most is None else f"to {most}"
        raise ValueError(f"{name}={value!r}: use {other}a whole number from {least} {end}")
    return number


def finite_number(name: str, value: Any, least: float | None = None) -> float:
    """The value, where it is a number, at or above the least one; else ValueError."""
    number = math.nan
    with contextlib.suppress(OverflowError):  # of an integer beyond any float
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or (least is not None and number < least):
        raise ValueError(f"{name}={value!r:.100}: use a number{'' if least is None else f' from {least} on'}")
    return number


def accept(confidences: Sequence[float], threshold: float, policy: str = "first_fail") -> int:
    """How many of K cuts to accept: the index after the last accepted one, 0..K.

    "first_fail" stops before the first cut below the threshold; "longest" takes the last cut at or above it, whatever
    came before; "whole" takes all or none, by the last one.
    """
    passed = [confidence >= threshold for confidence in confidences]
    if policy == "whole":
        return len(passed) if passed and passed[-1] else 0
    if policy == "first_fail":
        return passed.index(False) if False in passed else len(passed)
    return max((k + 1 for k, ok in enumerate(passed) if ok), default=0)
