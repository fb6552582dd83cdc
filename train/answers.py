"""Stage 1: what the target answers to the training prompts, from the engine here or from a server.

Token ids, the mask of the answer's own tokens, and the text are saved together, so that nothing is tokenized again
later. What nothing can be learnt from is left out, and stands in `rejected.jsonl` with the reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from eval.tasks import Task, draw_prompts, load_task
from eval.tasks.rows import Prompt, Rows
from parse.models import encode_continuation, encode_prompt, text_of
from parse.passes import Steps
from train.generation import Row, Work, finish_all, going_on, in_threads, together
from train.models import load_engine
from train.recipe import Recipe, RecipeError, to_dict
from train.run import KEPT, Run, write_text
from train.server import Answered, Client

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def run(recipe: Recipe, run: Run) -> None:
    """Write `answers/`: input_ids, completion_mask, prompt, answer, and whether the task calls it right (or None)."""
    with run.stage("answers") as folder:
        task, section = load_task(recipe.task, to_dict(recipe.data)), recipe.answers
        prompts = draw_prompts(task, "answers", section.prompts, recipe.seed)
        if len(prompts) < section.prompts:
            run.say(
                f"answers: {recipe.task} has {len(prompts)} prompts for this stage, {section.prompts} were asked for"
            )
        found = finish_all(folder / KEPT, prompts, _from_server(recipe) if section.server else _here(recipe), "answers")
        if run.is_main:
            encode = Encoding(recipe)
            rows = [_row(encode, task, prompt, Answered(**one)) for prompt, one in zip(prompts, found, strict=True)]
            kept = [row for row in rows if "reason" not in row]
            rejected = [row for row in rows if "reason" in row]
            write_text(folder / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
            if not kept:
                raise RecipeError(
                    f"answers: all {len(rows)} were rejected, the first because it {rejected[0]['reason']}"
                )
            Dataset.from_list(kept).save_to_disk(folder)
            _explain(run, kept, rejected)


def _here(recipe: Recipe) -> Work[Prompt]:
    """The engine's own greedy answers."""
    engine = load_engine(recipe)
    reader = engine.readers["target"]

    def answering(prompt: Prompt) -> Steps[Row]:
        answer = yield from going_on(reader, engine.encode(prompt), recipe.engine.max_new_tokens)
        return vars(Answered(text_of(answer.ids, engine.tokenizer), answer.ended, ids=answer.ids))

    return together(answering, recipe.answers.batch_size)


def _from_server(recipe: Recipe) -> Work[Prompt]:
    """The server's greedy answers."""
    section = recipe.answers.server
    assert section is not None
    client = Client(section, section.model or recipe.target, recipe.engine.max_new_tokens)
    return in_threads(lambda prompt: vars(client.answer(prompt)), section.concurrency)


class Encoding:
    """From prompts and answers to the tokens that a draft learns."""

    def __init__(self, recipe: Recipe) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.target)
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise RecipeError(
                f"target: the tokenizer of {recipe.target} names no end of sequence, so no draft can learn to end: set "
                "its eos_token and save it with the model"
            )
        self.drop = recipe.answers.thinking == "drop"

    def __call__(self, prompt: Prompt, answered: Answered) -> dict[str, Any]:
        """Token ids, mask and text; the end of the answer is learnt too."""
        text, ids = answered.text, answered.ids
        if answered.thinking and not self.drop:
            text, ids = f"<think>\n{answered.thinking}\n</think>\n\n{text}", None
        if self.drop and THINKING.search(text):
            text, ids = THINKING.sub("", text), None
        start = encode_prompt(prompt, self.tokenizer)
        completion = [*(ids if ids is not None else encode_continuation(text, self.tokenizer)), self.end]
        mask = [0] * len(start) + [1] * len(completion)
        return {"input_ids": [*start, *completion], "completion_mask": mask, "prompt": prompt, "answer": text}


def _row(encode: Encoding, task: Task | Rows, prompt: Prompt, answered: Answered) -> Row:
    """A row of the data set, or one with the `reason` why it is none."""
    reason = answered.error
    if reason is None and not answered.ended:
        reason = "did not end within engine.max_new_tokens"
    if reason is None and not answered.text.strip():
        reason = "is empty"
    row = encode(prompt, answered)
    if reason is None and not row["answer"].strip():
        reason = "is empty without its thinking"
    if reason is not None:
        return {"prompt": prompt, "answer": answered.text, "reason": reason}
    checks = not isinstance(task, Rows) or task.checks
    return {**row, "right": task.check(prompt, row["answer"]) if checks else None}


def _explain(run: Run, kept: list[Row], rejected: list[Row]) -> None:
    tokens = sum(sum(row["completion_mask"]) for row in kept) / len(kept)
    figures = {"answers": len(kept), "rejected": len(rejected), "tokens": tokens}
    right = ""
    if kept[0]["right"] is not None:
        figures["right"] = sum(row["right"] for row in kept) / len(kept)
        right = f", {figures['right']:.1%} right"
    run.log("answers", figures)
    run.say(f"answers: {len(kept)} by the target{right}, {tokens:.0f} tokens each")
    if rejected:
        run.say(f"  {len(rejected)} left out, see {Path('answers') / 'rejected.jsonl'}: {rejected[0]['reason']}, ...")
