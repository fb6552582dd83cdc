"""Stage 3: what the draft answers, and which of its prefixes are valid.

A prefix is valid if the target, going on from it, reaches a right answer; the task's checker says
what is right. A draft whose own answer is right shows that every prefix of it can be finished, and
in a wrong one the first invalid prefix is found by bisection: validity is lost once and not regained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer

from eval.tasks import Task, draw_prompts, load_task
from parse.models import encode_prompt, load_model, text_of
from parse.segments import cut
from train.generation import write_all
from train.recipe import Recipe
from train.run import Run


@dataclass
class Rollout:
    """One draft answer and the search for its last valid prefix."""

    split: str
    prompt: str
    prompt_ids: list[int]
    draft_ids: list[int]  # N
    ended: bool
    ends: list[int]  # K
    right: bool
    target_right: bool = True  # whether the target's own answer is right; asked where the draft's is not
    valid: int = 0  # the first `valid` prefixes are known to be valid
    invalid: int = 0  # prefix `invalid` (counted from 1) is known to be invalid; K + 1 for a right draft
    continuation_ids: list[int] = field(default_factory=list)  # the target's, behind the last valid prefix

    @property
    def probe(self) -> int:
        """The prefix to ask next, between what is known."""
        return (self.valid + self.invalid) // 2


def run(recipe: Recipe, run: Run) -> None:
    """Write `rollouts/`: split, prompt_ids, draft_ids, ended, ends, valid (one a cut), target_right."""
    with run.stage("rollouts") as folder:
        task, section = load_task(recipe.task), recipe.rollouts
        rollouts = _draft(recipe, run, task)
        _search(recipe, task, rollouts)
        rows = [
            {
                "split": r.split,
                "prompt": r.prompt,
                "prompt_ids": r.prompt_ids,
                "draft_ids": r.draft_ids,
                "ended": r.ended,
                "ends": r.ends,
                "valid": [k + 1 < r.invalid for k in range(len(r.ends))],
                "target_right": r.target_right,
                "continuation_ids": r.continuation_ids,
            }
            for r in rollouts
        ]
        Dataset.from_list(rows).save_to_disk(folder)
        right = sum(r.right for r in rollouts) / len(rollouts)
        prefixes = sum(len(r.ends) for r in rollouts)
        valid = sum(min(r.invalid - 1, len(r.ends)) for r in rollouts)
        print(
            f"rollouts: {section.train} for training and {section.calibration} for calibration; the draft is "
            f"right in {right:.1%}, {valid} of {prefixes} prefixes are valid"
        )


def _draft(recipe: Recipe, run: Run, task: Task) -> list[Rollout]:
    """The draft's answers, cut by the engine's segmenter."""
    section, target_tokenizer = recipe.rollouts, AutoTokenizer.from_pretrained(recipe.target)
    folder = run.path("distill")
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    # a seed of their own: the draft must not be judged on prompts that it was distilled on
    prompts = [
        *((p, "train") for p in draw_prompts(task, "train", section.train, recipe.seed + 1)),
        *((p, "calibration") for p in draw_prompts(task, "calibration", section.calibration, recipe.seed)),
    ]
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt, _ in prompts]
    limit = recipe.engine.max_new_tokens
    written = write_all(model, tokenizer, prompt_ids, limit, section.batch_size, "draft answers")
    rollouts = []
    for (prompt, split), answer in zip(prompts, written, strict=True):
        text = text_of(answer.ids, tokenizer)
        ids = answer.ids
        if tokenizer.get_vocab() != target_tokenizer.get_vocab():
            ids = target_tokenizer.encode(text, add_special_tokens=False)
        right = answer.ended and task.check(prompt, text)
        ends = cut(ids, target_tokenizer, recipe.segments)
        rollouts.append(
            Rollout(
                split,
                prompt,
                encode_prompt(prompt, target_tokenizer),
                ids,
                answer.ended,
                ends,
                right,
                valid=len(ends) if right else 0,
                invalid=len(ends) + 1 if right else len(ends),
            )
        )
    return rollouts


def _search(recipe: Recipe, task: Task, rollouts: list[Rollout]) -> None:
    """Bisect every wrong draft at once, a batch of continuations a step; the empty prefix comes first."""
    model, tokenizer = load_model(recipe.target), AutoTokenizer.from_pretrained(recipe.target)

    def go_on(some: list[Rollout], starts: list[list[int]]) -> list[tuple[list[int], bool]]:
        """The target's continuations, and whether each ends in a right answer."""
        prompts = [[*r.prompt_ids, *start] for r, start in zip(some, starts, strict=True)]
        limit, batch_size = recipe.engine.max_new_tokens, recipe.rollouts.batch_size
        written = write_all(model, tokenizer, prompts, limit, batch_size, "target continuations")
        texts = [text_of([*s, *w.ids], tokenizer) for s, w in zip(starts, written, strict=True)]
        return [(w.ids, w.ended and task.check(r.prompt, t)) for r, w, t in zip(some, written, texts, strict=True)]

    wrong = [r for r in rollouts if not r.right and r.ends]
    if wrong:
        for r, (ids, right) in zip(wrong, go_on(wrong, [[] for _ in wrong]), strict=True):
            r.target_right, r.continuation_ids = right, ids
    while open_ones := [r for r in rollouts if r.invalid - r.valid > 1]:
        starts = [r.draft_ids[: r.ends[r.probe - 1]] for r in open_ones]
        for r, (ids, right) in zip(open_ones, go_on(open_ones, starts), strict=True):
            if right:
                r.valid, r.continuation_ids = r.probe, ids
            else:
                r.invalid = r.probe
