"""Task families: where prompts come from, and what a right answer is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from eval.tasks import ledger, restaurants
from eval.tasks.rows import Prompt, Rows, load_rows
from recipes.schema import Recipe, to_dict


class Task(Protocol):
    """What a task's module offers. Splits are "train", "calibration" and "test".

    It may offer `corrupted(prompt, answer, rng)` too: a right answer with one fault, or None. `Rows` with a checker of
    the user's own may have `first_wrong` and `corrupted`, and else hold None in their places.
    """

    def draw_prompt(self, rng: random.Random, split: str) -> str:
        """A prompt of the split."""
        ...

    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether a finished answer is right."""
        ...

    def first_wrong(self, prompt: Prompt, answer: str) -> int | None:
        """Index of the first wrong sentence of an answer or a prefix, None where all are right.

        Whatever follows a wrong sentence, the answer is wrong.
        """
        ...


TASKS: dict[str, ModuleType] = {"ledger": ledger, "restaurants": restaurants}


def load_task(name: str, data: Mapping[str, Any] | None = None) -> Task | Rows:
    """The task of that name, or the rows of a JSONL file or a hub data set.

    Args:
        data: the recipe's section `data`, for rows.

    Raises:
        ValueError: for an unknown task, naming those there are; for rows that are none.
    """
    if name in TASKS:
        return cast(Task, TASKS[name])
    if data is None or not (name.endswith((".jsonl", ".json")) or name.count("/") == 1):
        raise ValueError(
            f"task {name!r} is not known; tasks: {', '.join(TASKS)}; or give a JSONL file, or a data set of the hub as "
            "org/name (gsm8k is openai/gsm8k)"
        )
    return load_rows(name, data)


def draw_prompts(task: Task | Rows, split: str, count: int, seed: int) -> list[Prompt]:
    """Distinct prompts of a split, the same for the same seed; of rows at most those there are.

    Splits are "answers" (what the draft learns), "train" (what verifiers learn), "calibration" and "test".
    """
    if isinstance(task, Rows):
        return task.draw_prompts(split, count, seed)
    split = "train" if split == "answers" else split  # with another seed: no prompt twice, there are so many
    rng = random.Random(f"{split} {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[task.draw_prompt(rng, split)] = None
    return list(prompts)


def content_of_task(recipe: Recipe) -> str:
    """The digest of what a recipe's task asks and how it checks answers: of its rows, or of its program."""
    data = to_dict(recipe.data)
    task = load_task(recipe.task, data)
    if isinstance(task, Rows):
        content = json.dumps([data["check"], task.prompts, task.references], sort_keys=True).encode()
        if task.checker and task.checker.file:
            content += task.checker.file.read_bytes()
    else:
        files = getattr(task, "FILES", [cast(ModuleType, task).__file__])
        content = b"".join(Path(str(file)).read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()
