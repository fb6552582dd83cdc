"""Stage 1: what the target answers to the training prompts.

Token ids, the mask of the answer's own tokens, and the text are saved together, so that nothing is
tokenized again later.
"""

from __future__ import annotations

from datasets import Dataset

from eval.tasks import draw_prompts, load_task
from parse import Engine
from parse.models import text_of
from parse.passes import Steps
from train.generation import Row, finish_all, going_on
from train.recipe import Recipe
from train.run import KEPT, Run


def run(recipe: Recipe, run: Run) -> None:
    """Write `answers/`: input_ids, completion_mask, prompt, answer, and whether the task calls it right."""
    with run.stage("answers") as folder:
        task, section = load_task(recipe.task), recipe.answers
        engine = Engine.from_pretrained(recipe.target, compile=False)
        reader = engine.readers["target"]
        end = min(reader.eos_ids)

        def answering(prompt: str) -> Steps[Row]:
            ids = engine.encode(prompt)
            answer = yield from going_on(reader, ids, recipe.engine.max_new_tokens)
            completion = [*answer.ids, *([end] if answer.ended else [])]  # the end is learnt too
            text = text_of(answer.ids, engine.tokenizer)
            return {
                "input_ids": [*ids, *completion],
                "completion_mask": [0] * len(ids) + [1] * len(completion),
                "prompt": prompt,
                "answer": text,
                "right": answer.ended and task.check(prompt, text),
            }

        prompts = draw_prompts(task, "train", section.prompts, recipe.seed)
        rows = finish_all(folder / KEPT, prompts, answering, section.batch_size, "target answers")
        if run.is_main:
            Dataset.from_list(rows).save_to_disk(folder)
            right = sum(row["right"] for row in rows) / len(rows)
            tokens = sum(sum(row["completion_mask"]) for row in rows) / len(rows)
            run.log("answers", {"right": right, "tokens": tokens})
            run.say(f"answers: {len(rows)} by the target, {right:.1%} right, {tokens:.0f} tokens each")
