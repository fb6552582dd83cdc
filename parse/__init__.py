"""PARSE: parallel prefix verification for speculative generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parse.engine import Engine
    from parse.generation import Generation, Segment, Stats

__all__ = ["Engine", "Generation", "Segment", "Stats"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch and transformers take seconds, and `--help` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("parse.engine" if name == "Engine" else "parse.generation"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
