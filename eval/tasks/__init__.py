"""Task families: where prompts come from, and what a right answer is."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Protocol, cast

from eval.tasks import ledger


class Task(Protocol):
    """What a task's module offers. Splits are "train", "calibration" and "test"."""

    def draw_prompt(self, rng: random.Random, split: str) -> str:
        """A prompt of the split."""
        ...

    def check(self, prompt: str, answer: str) -> bool:
        """Whether a finished answer is right."""
        ...

    def first_wrong(self, prompt: str, answer: str) -> int | None:
        """Index of the first wrong sentence of an answer or a prefix, None where all are right."""
        ...


TASKS: dict[str, ModuleType] = {"ledger": ledger}


def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: for an unknown task, naming those there are.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not known; tasks: {', '.join(TASKS)}")
    return cast(Task, TASKS[name])


def draw_prompts(task: Task, split: str, count: int, seed: int) -> list[str]:
    """Distinct prompts of a split, the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[task.draw_prompt(rng, split)] = None
    return list(prompts)
