"""Stage 4: a LoRA moves the draft toward answers that the target takes up.

- `dpo` prefers, after a draft's last valid prefix, the target's next segment to the draft's (TRL's DPOTrainer).
- `on_policy` follows the target's next tokens at each token of the draft's own answers, by reverse KL (TRL's
  DistillationTrainer).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, Trainer
from trl import DistillationConfig, DPOConfig, DPOTrainer

from parse import Engine
from parse.local.loading import load_model
from recipes.pair import load_engine, target_tokenizer, whole_weights
from recipes.run import Run
from recipes.schema import Recipe, RecipeError
from train.distill import prompts
from train.rollouts import first_segment
from train.trainers import OnPolicyTrainer, arguments, checkpoints, lora_config, same_vocabulary, train, training_kind


class TokenDPOTrainer(DPOTrainer):
    """DPO on token ids as they are: prompt_ids, chosen_ids, rejected_ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def run(recipe: Recipe, run: Run) -> None:
    """Write `draft-lora/`, a plain PEFT folder over `draft/` with the tokenizer; and `losses.json`."""
    with run.stage("align") as folder:
        section, draft = recipe.align, run.path("distill")
        rollouts = load_from_disk(run.path("rollouts"))
        assert isinstance(rollouts, Dataset)
        tokenizer = AutoTokenizer.from_pretrained(draft)
        with whole_weights():
            model = load_model(draft, dtype=torch.float32)
        common: dict[str, Any] = {
            "model": model,
            "args": trainer_config(recipe, checkpoints(folder)),
            "processing_class": tokenizer,
            "peft_config": lora_config(section.lora, "align.lora"),
        }
        trainer = _by_preference(recipe, run, rollouts, common) if section.method == "dpo" else None
        trainer = trainer or _on_policy(recipe, rollouts, common)
        train(trainer, "align", run, folder)
        if run.is_main:
            tokenizer.save_pretrained(folder)


def _by_preference(recipe: Recipe, run: Run, rollouts: Dataset, common: dict[str, Any]) -> Trainer:
    """DPO on the pairs of the rollouts."""
    found = list(pairs(load_engine(recipe, run.path("distill")), rollouts))
    if not found:
        raise RecipeError(
            f"align: none of {len(rollouts)} drafts has an invalid prefix that the target mends, so there is no pair "
            "to learn from: leave 'align' out of stages, or ask for more prompts (align.prompts)"
        )
    run.say(f"align: {len(found)} pairs from {len(rollouts)} drafts")
    return training_kind(TokenDPOTrainer)(train_dataset=Dataset.from_list(found), **common)


def _on_policy(recipe: Recipe, rollouts: Dataset, common: dict[str, Any]) -> Trainer:
    """Distillation on the draft's own answers to the prompts of the rollouts."""
    target = load_model(recipe.target, options=recipe.engine.target_options)
    widths = (common["model"].config.vocab_size, target.config.vocab_size)
    of_target = target_tokenizer(recipe)
    same_vocabulary(recipe, "align.method=on_policy", common["processing_class"], of_target, widths)
    asked = {row["number"]: row["prompt"] for row in rollouts}
    data = prompts(list(asked.values()), common["processing_class"])
    return training_kind(OnPolicyTrainer)(teacher_model=target, train_dataset=data, **common)


def pairs(engine: Engine, rollouts: Dataset) -> Iterator[dict[str, list[int]]]:
    """What the target wrote after the last valid prefix of each draft, and what the draft wrote there: a segment each.

    Yields:
        prompt_ids (the prompt and the valid prefix), chosen_ids, rejected_ids, in the draft's tokens.
    """
    for row in rollouts:
        if not row["met"] or all(row["valid"]) or not row["target_right"] or not row["continuation_ids"]:
            continue
        first = row["valid"].index(False)
        start, end = [0, *row["ends"]][first], row["ends"][first]
        kept = [*row["prefix_ids"], *row["draft_ids"][:start]]
        chosen, rejected = first_segment(engine, row["continuation_ids"]), row["draft_ids"][start:end]
        if chosen != rejected:
            yield {
                "prompt_ids": [*engine.encode_for_draft(row["prompt"]), *engine.pair.to_draft(kept)],
                "chosen_ids": engine.pair.to_draft(chosen),
                "rejected_ids": engine.pair.to_draft(rejected),
            }


def trainer_config(recipe: Recipe, output: str | None = None) -> Any:
    """TRL's configuration of the recipe's method: `align.trainer` over defaults.

    Raises:
        RecipeError: for a key or a value that TRL refuses.
    """
    section = recipe.align
    defaults: dict[str, Any] = {"output_dir": output} if output else {}
    kind: type = DPOConfig
    if section.method == "on_policy":
        kind = DistillationConfig
        defaults |= {"max_completion_length": recipe.engine.max_new_tokens, "temperature": 1.0, "beta": 1.0}
    else:
        defaults |= {"max_length": None}
    return arguments(kind, section.trainer, recipe, "align.trainer", **defaults)
