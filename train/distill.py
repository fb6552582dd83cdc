"""Stage 2: the draft learns the target's answers (sequence-level distillation, TRL's SFTTrainer)."""

from __future__ import annotations

import difflib
from dataclasses import fields

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from parse.models import load_model
from train.recipe import Recipe, RecipeError
from train.run import Run


def run(recipe: Recipe, run: Run) -> None:
    """Write `draft/`, a plain Hugging Face folder: model and tokenizer."""
    with run.stage("distill") as folder:
        answers = load_from_disk(run.path("answers"))
        assert isinstance(answers, Dataset)
        tokenizer = AutoTokenizer.from_pretrained(recipe.draft)
        trainer = SFTTrainer(
            model=load_model(recipe.draft, dtype=torch.float32),
            args=trainer_config(recipe),
            train_dataset=answers.select_columns(["input_ids", "completion_mask"]),
            processing_class=tokenizer,
        )
        result = trainer.train()
        trainer.save_model(str(folder))
        if run.is_main:
            tokenizer.save_pretrained(folder)
        run.say(f"distill: {result.global_step} steps, training loss {result.training_loss:.4f}")


def trainer_config(recipe: Recipe) -> SFTConfig:
    """TRL's configuration: the recipe's `distill.trainer`, over defaults that suit the machine.

    Raises:
        RecipeError: for a key or a value that TRL refuses.
    """
    given = recipe.distill.trainer
    allowed = [field.name for field in fields(SFTConfig) if field.init]
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown key {key!r} in section 'distill.trainer'{hint} See TRL's SFTConfig")
    on_gpu = torch.cuda.is_available()
    defaults = {
        "output_dir": str(recipe.folder / ".distill-checkpoints"),
        "completion_only_loss": True,
        "seed": recipe.seed,
        "report_to": "wandb" if recipe.logging.wandb else "none",  # the run that is open
        "save_strategy": "no",
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": False,
    }
    try:
        return SFTConfig(**{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"section 'distill.trainer' is refused by TRL: {error}") from error
