"""Task families: where prompts come from, and what a right answer is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from eval.tasks import ledger, restaurants
from eval.tasks.harness import PREFIX, load_harness
from eval.tasks.rows import load_rows
from eval.tasks.task import Generated, Prompt, Task
from recipes.schema import Recipe, to_dict

TASKS: dict[str, Task] = {"ledger": Generated(ledger), "restaurants": Generated(restaurants)}


def load_task(name: str, data: Mapping[str, Any] | None = None) -> Task:
    """The task of that name, or the rows of a JSONL file or a hub data set, or a task of EleutherAI's harness.

    Args:
        data: the recipe's section `data`, for all but the first.

    Raises:
        ValueError: for an unknown task, naming those there are; for rows that are none.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(PREFIX) and data is not None:
        return load_harness(name.removeprefix(PREFIX), json.dumps(data["harness"]), json.dumps(data["shares"]))
    if data is None or not (name.endswith((".jsonl", ".json")) or name.count("/") == 1):
        raise ValueError(
            f"task {name!r} is not known; tasks: {', '.join(TASKS)}; or give a JSONL file, or a data set of the hub as "
            "org/name (gsm8k is openai/gsm8k), or one of EleutherAI's harness as lm_eval:NAME"
        )
    return load_rows(name, data)


def draw_prompts(task: Task, split: str, count: int, seed: int) -> list[Prompt]:
    """So many prompts of a split, or all there are; the same for the same seed."""
    return list(islice(task.prompts(split, seed), count))


def content_of_task(recipe: Recipe) -> str:
    """The digest of what a recipe's task asks and how it checks answers."""
    return hashlib.sha256(load_task(recipe.task, to_dict(recipe.data)).content()).hexdigest()
