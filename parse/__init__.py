"""PARSE: parallel prefix verification for speculative generation."""

from parse.answer import Generation, Segment, Stats
from parse.engine import Engine

__all__ = ["Engine", "Generation", "Segment", "Stats"]
