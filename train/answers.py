"""Stage 1: what the target answers to the training prompts.

Token ids, the mask of the answer's own tokens, and the text are saved together, so that nothing is
tokenized again later.
"""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoTokenizer

from eval.tasks import draw_prompts, load_task
from parse.models import encode_prompt, eos_ids, load_model
from train.generation import write_all
from train.recipe import Recipe
from train.run import Run


def run(recipe: Recipe, run: Run) -> None:
    """Write `answers/`: input_ids, completion_mask, prompt, answer, and whether the task calls it right."""
    with run.stage("answers") as folder:
        task, section = load_task(recipe.task), recipe.answers
        model, tokenizer = load_model(recipe.target), AutoTokenizer.from_pretrained(recipe.target)
        prompts = draw_prompts(task, "train", section.prompts, recipe.seed)
        prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
        limit = recipe.engine.max_new_tokens
        answers = write_all(model, tokenizer, prompt_ids, limit, section.batch_size, "target answers")
        end = min(eos_ids(model, tokenizer.eos_token_id))
        rows = []
        for prompt, ids, answer in zip(prompts, prompt_ids, answers, strict=True):
            completion = [*answer.ids, *([end] if answer.ended else [])]  # the end is learnt too
            text = tokenizer.decode(answer.ids)
            rows.append(
                {
                    "input_ids": [*ids, *completion],
                    "completion_mask": [0] * len(ids) + [1] * len(completion),
                    "prompt": prompt,
                    "answer": text,
                    "right": answer.ended and task.check(prompt, text),
                }
            )
        Dataset.from_list(rows).save_to_disk(folder)
        right = sum(row["right"] for row in rows) / len(rows)
        tokens = sum(sum(row["completion_mask"]) for row in rows) / len(rows)
        print(f"answers: {len(rows)} by the target, {right:.1%} right, {tokens:.0f} tokens each")
