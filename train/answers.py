"""Stage 1: what the target answers to the training prompts, from the engine here or from a server.

Token ids, the mask of the answer's own tokens, and the text are saved together, so that nothing is tokenized again
later. What nothing can be learnt from is left out, and stands in `rejected.jsonl` with the reason.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from eval.generation import Row, Work, batched, finish_all, in_threads, write_after
from eval.prompts import prompts_of
from eval.server import Answered, Client
from eval.tasks import Task, load_task
from eval.tasks.rows import key_of
from eval.tasks.task import Prompt
from parse.prompts import (
    CLOSE,
    OPEN,
    begins_thinking,
    encode_prompt,
    final_answer,
    no_thinking,
    opens_thinking,
    split_beginning,
)
from parse.text import before_stop, encode_continuation, find_stop, text_of
from recipes.files import write_text
from recipes.pair import learnt_end, load_engine, target_tokenizer
from recipes.run import KEPT, Run
from recipes.schema import Recipe, RecipeError, to_dict


def run(recipe: Recipe, run: Run) -> None:
    """Write `answers/`: input_ids, completion_mask, prompt, answer, and whether the task calls it right (or None)."""
    with run.stage("answers") as folder:
        task, section = load_task(recipe.task, to_dict(recipe.data)), recipe.answers
        chosen = prompts_of(recipe, task, "answers")
        prompts = [prompt for _, prompt in chosen.prompts]
        encode = Encoding(recipe)
        found = (
            _references(task, prompts) if section.source == "references" else _asked(recipe, folder, prompts, task.stop)
        )
        if run.is_main:
            rows = [_row(encode, task, prompt, Answered(**one)) for prompt, one in zip(prompts, found, strict=True)]
            kept = [row for row in rows if "reason" not in row]
            rejected = [row for row in rows if "reason" in row]
            rejected += [{"prompt": prompt, "answer": "", "reason": reason} for prompt, reason in chosen.too_long]
            write_text(folder / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
            if not kept:
                raise RecipeError(
                    f"answers: all {len(rows)} were rejected, the first because it {rejected[0]['reason']}; see what "
                    "the target writes, or raise engine.max_new_tokens"
                )
            Dataset.from_list(kept).save_to_disk(folder)
            _explain(run, section.source, kept, rejected)


def _asked(recipe: Recipe, folder: Path, prompts: list[Prompt], stops: tuple[str, ...]) -> list[Row]:
    """What the target answers."""
    work = _from_server(recipe, stops) if recipe.answers.server else _here(recipe, stops)
    return finish_all(folder / KEPT, prompts, work, "answers")


def _references(task: Task, prompts: list[Prompt]) -> list[Row]:
    """The first answer that each row calls right.

    Raises:
        RecipeError: where the task has no rows, or they no references.
    """
    if not task.references:
        raise RecipeError("answers.source=references takes them from rows with a `reference`, and the task has none")
    return [vars(Answered(task.references[key_of(prompt)][0], ended=True)) for prompt in prompts]


def _here(recipe: Recipe, stops: tuple[str, ...]) -> Work[Prompt]:
    """The engine's own greedy answers."""
    engine = load_engine(recipe)
    target = engine.models["target"]

    async def answering(prompt: Prompt) -> Row:
        answer = await write_after(target, engine.encode(prompt), recipe.engine.max_new_tokens, stops=stops)
        return vars(_stopped(Answered(text_of(answer.ids, engine.tokenizer), answer.ended, ids=answer.ids), stops))

    return batched(answering, recipe.answers.batch_size)


def _stopped(answered: Answered, stops: tuple[str, ...]) -> Answered:
    """The answer up to a stop string, which ends it."""
    if find_stop(answered.text, stops) is None:
        return answered
    return replace(answered, text=before_stop(answered.text, stops), ended=True, ids=None)


def _from_server(recipe: Recipe, stops: tuple[str, ...]) -> Work[Prompt]:
    """The server's greedy answers."""
    section = recipe.answers.server
    assert section is not None
    client = Client(section, section.model or recipe.target, recipe.engine.max_new_tokens)
    return in_threads(lambda prompt: vars(_stopped(client.answer(prompt), stops)), section.concurrency)


class Encoding:
    """From prompts and answers to the tokens that a draft learns.

    An answer is what the target writes after the prompt, its thinking included, which the template may have begun. With
    `answers.thinking=drop` it is an empty thought, as the template spells it, and what comes after the thinking.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer or target_tokenizer(recipe)
        self.end = learnt_end(recipe, self.tokenizer)
        self.drop = recipe.answers.thinking == "drop"
        self.opened, self.no_thinking = opens_thinking(self.tokenizer), no_thinking(self.tokenizer)

    def final(self, prompt: Prompt, answered: Answered) -> str:
        """What of an answer comes after its thinking; in one that the prompt begins every space counts."""
        opened = self.opened
        if answered.ids is None:  # a server may hand the thinking over apart, or have begun it by a template of its own
            head, closed, _ = answered.text.partition(CLOSE)
            opened = bool(closed) and OPEN not in head
        final = final_answer(answered.text, opened, prompt)
        return final if split_beginning(prompt)[1] else final.lstrip()

    def __call__(self, prompt: Prompt, answered: Answered) -> dict[str, Any]:
        """Token ids, mask and text; the end of the answer is learnt too."""
        text, ids = answered.text, answered.ids
        begun = bool(split_beginning(prompt)[1])  # and what was thought, if anything, stands in the prompt
        if self.drop and not begun and (self.no_thinking or CLOSE in text or begins_thinking(text)):
            text, ids = self.no_thinking + self.final(prompt, answered), None
        elif ids is None and not self.drop and not begun:
            text = self._whole(text, answered.thinking)
        start = encode_prompt(prompt, self.tokenizer)
        completion = [*(ids if ids is not None else encode_continuation(text, self.tokenizer)), self.end]
        mask = [0] * len(start) + [1] * len(completion)
        return {"input_ids": [*start, *completion], "completion_mask": mask, "prompt": prompt, "answer": text}

    def _whole(self, text: str, thinking: str | None) -> str:
        """A server's answer as the target wrote it after the prompt, with its thinking."""
        text = text.lstrip()
        if thinking:
            thought = thinking.replace(OPEN, "").replace(CLOSE, "").strip()
            return f"{'' if self.opened else OPEN + chr(10)}{thought}\n{CLOSE}\n\n{text}"
        if self.opened and CLOSE not in text:
            return self.no_thinking + text
        return text.removeprefix(OPEN).lstrip() if self.opened else text


def _row(encode: Encoding, task: Task, prompt: Prompt, answered: Answered) -> Row:
    """A row of the data set, or one with the `reason` why it is none."""
    reason = answered.error or answered.failed
    if reason is None and not answered.ended:
        reason = "did not end within engine.max_new_tokens"
    if reason is None and not answered.text.strip():
        reason = "is empty"
    final = encode.final(prompt, answered)
    if reason is None and not final.strip():
        reason = "is empty without its thinking"
    if reason is not None:
        return {"prompt": prompt, "answer": answered.text, "reason": reason}
    return {**encode(prompt, answered), "right": task.check(prompt, final) if task.checks else None}


def _explain(run: Run, source: str, kept: list[Row], rejected: list[Row]) -> None:
    tokens = sum(sum(row["completion_mask"]) for row in kept) / len(kept)
    figures = {"answers": len(kept), "rejected": len(rejected), "tokens": tokens}
    right = ""
    if kept[0]["right"] is not None:
        figures["right"] = sum(row["right"] for row in kept) / len(kept)
        right = f", {figures['right']:.1%} right"
    run.log("answers", figures)
    by = "the target" if source == "target" else "the rows themselves"
    run.say(f"answers: {len(kept)} by {by}{right}, {tokens:.0f} tokens each")
    if rejected:
        run.say(f"  {len(rejected)} left out, see {Path('answers') / 'rejected.jsonl'}: {rejected[0]['reason']}, ...")
