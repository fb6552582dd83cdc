"""What a task is: prompts in splits, and what a right answer to each is."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from parse.local.loading import Messages

Prompt = str | Messages
FirstWrong = Callable[[Prompt, str], int | None]
Corrupted = Callable[[Prompt, str, random.Random], str | None]


class Task(ABC):
    """Prompts, and a checker where there is one.

    Splits are "answers" (what the draft learns), "train" (what verifiers learn), "calibration" and "test".
    """

    checks = True  # whether answers can be checked; else the target compares them with its own
    # index of the first wrong sentence of an answer or a prefix of one, None where all are right; whatever follows a
    # wrong sentence, the answer is wrong. No function where nobody knows
    first_wrong: FirstWrong | None = None
    corrupted: Corrupted | None = None  # a right answer with one fault, or None where none can be made
    foreign_prefix: Callable[[Prompt, random.Random], str] | None = None  # a right beginning in another writer's words
    references: Mapping[str, tuple[str, ...]] = {}  # right answers by `key_of(prompt)`, where they are given
    stop: tuple[str, ...] = ()  # strings that end an answer where the first of them begins
    about = ""  # what is asked, in words, where somebody wrote it down
    duplicates = 0  # prompts that were left out, since an earlier one is the same

    @abstractmethod
    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """Distinct prompts of a split, as many as there are, in an order that the seed decides."""

    @abstractmethod
    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether a finished answer, without its thinking, is right."""

    @abstractmethod
    def content(self) -> bytes:
        """All that decides what is asked and what is right: where it changes, what was made of it is made again."""


class Generated(Task):
    """A module's task, without end.

    The module has `draw_prompt(rng, split)`, `check`, `first_wrong` and perhaps `corrupted`, as `Task` has them. Its
    splits are "train", "calibration" and "test": there are so many prompts that those of two seeds are others.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        _, _, about = (module.__doc__ or "").partition("\n")[0].partition(": ")
        self.about = about.rstrip(".")
        self.first_wrong = module.first_wrong
        self.corrupted = getattr(module, "corrupted", None)
        self.foreign_prefix = getattr(module, "foreign_prefix", None)

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """See `Task`."""
        split = "train" if split == "answers" else split
        rng, seen = random.Random(f"{split} {seed}"), set[str]()
        while True:
            prompt = self._module.draw_prompt(rng, split)
            if prompt not in seen:
                seen.add(prompt)
                yield prompt

    def check(self, prompt: Prompt, answer: str) -> bool:
        """See `Task`."""
        return bool(self._module.check(prompt, answer))

    def content(self) -> bytes:
        """See `Task`."""
        files = getattr(self._module, "FILES", [self._module.__file__])
        return b"".join(Path(str(file)).read_bytes() for file in files)
