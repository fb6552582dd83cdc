"""The prompts of a stage: those of its split that leave the models room for an answer; the others are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from eval.judges import labeller_of, question_of
from eval.tasks import Task
from eval.tasks.task import Prompt
from parse.local.loading import context_length
from parse.prompts import encode_for_draft, encode_prompt
from parse.verifiers import PromptVerifier
from recipes.pair import draft_tokenizer, empty_draft, target_config, target_tokenizer
from recipes.schema import Recipe, RecipeError

SEARCHED = 1000  # prompts of a split: where all of them are too long, no other is looked at


@dataclass(frozen=True)
class Room:
    """What one model must hold: a prompt, one or more answers, and a verdict."""

    role: str
    context: int
    answers: int  # as many as are compared, or one
    more: int  # tokens that a verdict takes
    what: str  # that there must be room for, in words


class Fitting:
    """Which prompts leave room for an answer, in all that a stage does with them."""

    def __init__(self, recipe: Recipe, task: Task, stage: str) -> None:
        self.recipe = recipe
        self._target = target_tokenizer(recipe)
        self._draft: Any = None  # where it has other tokens
        self._rooms: list[Room] = []
        context = context_length(target_config(recipe))
        judged = stage in ("rollouts", "relabel", "eval")
        self._add("target", context, 1, "an answer", _verdict_tokens(recipe, self._target) if judged else 0)
        if stage == "answers":  # the engine's draft may stop where its context ends, but not what it learns
            own = draft_tokenizer(recipe)
            self._draft = None if own.get_vocab() == self._target.get_vocab() else own
            with torch.device("meta"):
                self._add("draft", context_length(empty_draft(recipe).config), 1, "an answer")
        if judged and labeller_of(recipe, task) == "agreement" and not recipe.rollouts.judge:
            what = "two answers, which rollouts.labeller=agreement lets the target compare"
            self._add("target", context, 2, what)

    def _add(self, role: str, context: int | None, answers: int, what: str, more: int = 0) -> None:
        if context is not None:
            self._rooms.append(Room(role, context, answers, more, what))

    def lacks(self, prompt: Prompt) -> str | None:
        """Why a prompt leaves too little room; None where it leaves enough.

        Raises:
            ValueError: for a prompt that cannot be encoded.
        """
        ids = encode_prompt(prompt, self._target)
        limit = self.recipe.engine.max_new_tokens
        for room in self._rooms:
            length = len(ids)
            if room.role == "draft" and self._draft is not None:
                length = len(encode_for_draft(prompt, self._draft, self._target))
            elif room.answers > 1:
                length = len(encode_prompt(question_of(prompt), self._target))
            if length + room.answers * limit + room.more > room.context:
                return (
                    f"has {length} tokens, and with engine.max_new_tokens={limit} the {room.role}'s context of "
                    f"{room.context} leaves no room for {room.what}{' and a verdict' if room.more else ''}"
                )
        return None


def _verdict_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of the longest suffix that a verifier of the recipe may append to an answer."""
    asking = PromptVerifier.if_possible(tokenizer)
    return max(len(asking.suffix_ids) if asking else 0, recipe.verifier.adapter.suffix)


def plan(recipe: Recipe, stage: str) -> tuple[dict[str, int], int]:
    """How many prompts of each split a stage takes, and the seed that draws them.

    Seeds differ, so that nothing is judged on prompts that the draft learnt from, where a task makes them.
    """
    section = recipe.rollouts
    labelled = {"train": section.train, "calibration": section.calibration, "test": section.test}
    aligning = {"train": recipe.align.prompts}
    plans = {
        "answers": ({"answers": recipe.answers.prompts}, 0),
        "rollouts": (aligning if recipe.aligned else labelled, 1),
        "relabel": (labelled, 2),
        "eval": ({"test": recipe.eval.prompts}, 0),
    }
    counts, offset = plans.get(stage, ({}, 0))
    return counts, recipe.seed + offset


@dataclass(frozen=True)
class Chosen:
    """The prompts that a stage works on."""

    prompts: list[tuple[str, Prompt]]  # split and prompt
    too_long: list[tuple[Prompt, str]]  # left out, and why
    remarks: list[str]  # what a user should know of them


def prompts_of(recipe: Recipe, task: Task, stage: str) -> Chosen:
    """The prompts of all splits that a stage works on.

    Raises:
        RecipeError: as `fitting_prompts` does.
    """
    counts, seed = plan(recipe, stage)
    chosen, fitting = Chosen([], [], []), Fitting(recipe, task, stage)
    for split, count in counts.items():
        kept, left_out = fitting_prompts(recipe, task, fitting, split, count, seed)
        chosen.prompts.extend((split, prompt) for prompt in kept)
        chosen.too_long.extend(left_out)
        if left_out:
            prompt, reason = left_out[0]
            chosen.remarks.append(
                f"{stage}: {len(left_out)} prompts of the split {split!r} are left out as too long; the first, "
                f"{prompt!r:.60}, {reason}"
            )
        if len(kept) < count:
            chosen.remarks.append(
                f"{stage}: {recipe.task} has {len(kept)} prompts of the split {split!r}, {count} were asked for"
            )
    return chosen


def fitting_prompts(
    recipe: Recipe, task: Task, fitting: Fitting, split: str, count: int, seed: int
) -> tuple[list[Prompt], list[tuple[Prompt, str]]]:
    """So many prompts of a split that leave room, in an order that the seed decides; and those left out, with why.

    Raises:
        RecipeError: where a prompt cannot be encoded, or none is there, or none leaves room.
    """
    kept: list[Prompt] = []
    left_out: list[tuple[Prompt, str]] = []
    for prompt in task.prompts(split, seed):
        try:
            lacking = fitting.lacks(prompt)
        except ValueError as error:
            raise RecipeError(f"task: the prompt {prompt!r:.200} cannot be read: {error}") from error
        if lacking is None:
            kept.append(prompt)
        else:
            left_out.append((prompt, lacking))
        if len(kept) == count or (not kept and len(left_out) == SEARCHED):
            break
    if not kept and not left_out:
        raise RecipeError(
            f"task: {recipe.task} has no prompt for the split {split!r}: give more rows, or change data.shares"
        )
    if not kept:
        raise RecipeError(
            f"task: all {len(left_out)} prompts of the split {split!r} are too long, the first {left_out[0][1]}: "
            "shorten them, or lower engine.max_new_tokens"
        )
    return kept, left_out
