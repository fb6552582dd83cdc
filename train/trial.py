"""A trainer, built as its stage will build it, but on one row and with small models, before anything expensive.

What TRL, PEFT or an optimizer refuses of a recipe's arguments, they refuse here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from parse.local.loading import check_mergeable
from recipes.pair import draft_tokenizer, empty_draft, whole_weights
from recipes.schema import Recipe, RecipeError
from train import align, distill
from train.logits import LogitsTrainer, packed
from train.trainers import OnPolicyTrainer, lora_config

WORDS = "a b"  # the row's
WITHOUT_WRITING = (
    distill.AnswerTrainer,
    LogitsTrainer,
    align.TokenDPOTrainer,
)  # a batch, which takes no answers to make


def try_distill(recipe: Recipe) -> None:
    """Raise RecipeError where `distill.trainer` or `distill.lora` are refused."""
    section, tokenizer = recipe.distill, draft_tokenizer(recipe)
    adapter = _lora_of(recipe)
    ids = [*tokenizer.encode(WORDS, add_special_tokens=False)] or [0]
    row: dict[str, Any] = {"input_ids": ids * 2, "completion_mask": [0] * len(ids) + [1] * len(ids)}

    def make(common: dict[str, Any]) -> Trainer:
        if section.method == "logits":
            row["likely"] = packed(torch.zeros(len(ids), 1, dtype=torch.long), torch.zeros(len(ids), 1))
            return LogitsTrainer(train_dataset=Dataset.from_list([row]), **common)
        if section.method == "on_policy":
            teacher = _stand_in(tokenizer)
            return OnPolicyTrainer(teacher_model=teacher, train_dataset=distill.prompts([WORDS], tokenizer), **common)
        if section.method == "gold":
            return distill.gold_trainer([{"prompt": WORDS, "answer": WORDS}], _stand_in(tokenizer), common)
        return distill.AnswerTrainer(train_dataset=Dataset.from_list([row]), **common)

    _try("distill.trainer", lambda output: distill.trainer_config(recipe, output), make, tokenizer, adapter)


def _lora_of(recipe: Recipe) -> LoraConfig | None:
    """The LoRA that learns: a new one, or one that goes on."""
    section, key = recipe.distill, "distill.lora"
    if section.lora_from is not None:
        key = "distill.lora_from"
        try:
            adapter = PeftConfig.from_pretrained(section.lora_from)
        except Exception as error:  # whatever a library raises for files that it cannot read
            raise RecipeError(f"{key}: {section.lora_from} is no PEFT folder: {error!s:.200}") from error
        if not isinstance(adapter, LoraConfig):
            raise RecipeError(f"{key}: {section.lora_from} holds {adapter.peft_type}, and a LoRA is needed")
        adapter.inference_mode = False
        _check_shapes(recipe, adapter, Path(section.lora_from))
    elif section.lora is not None:
        adapter = lora_config(section.lora, key)
    else:
        return None
    _try_lora(recipe, adapter, key)
    return adapter


def _check_shapes(recipe: Recipe, adapter: LoraConfig, folder: Path) -> None:
    """Refuse a LoRA that was learnt on a model of other sizes."""
    with whole_weights(), torch.device("meta"):
        made = get_peft_model_state_dict(get_peft_model(empty_draft(recipe), adapter))
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if other := sorted(name for name in shapes.keys() | held.keys() if shapes.get(name) != held.get(name)):
        name = other[0]
        raise RecipeError(
            f"distill.lora_from: the LoRA in {folder} was learnt on another model than the draft: its {name} has the "
            f"shape {held.get(name)}, and the draft's would have {shapes.get(name)}"
        )


def try_align(recipe: Recipe) -> None:
    """Raise RecipeError where `align.trainer` or `align.lora` are refused."""
    tokenizer, adapter = draft_tokenizer(recipe), lora_config(recipe.align.lora, "align.lora")
    _try_lora(recipe, adapter, "align.lora")
    ids = [*tokenizer.encode(WORDS, add_special_tokens=False)] or [0]

    def make(common: dict[str, Any]) -> Trainer:
        if recipe.align.method == "on_policy":
            teacher = _stand_in(tokenizer)
            return OnPolicyTrainer(teacher_model=teacher, train_dataset=distill.prompts([WORDS], tokenizer), **common)
        row = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}
        return align.TokenDPOTrainer(train_dataset=Dataset.from_list([row]), **common)

    _try("align.trainer", lambda output: align.trainer_config(recipe, output), make, tokenizer, adapter)


def _try(
    section: str,
    config: Callable[[str], Any],
    make: Callable[[dict[str, Any]], Trainer],
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig | None,
) -> None:
    """Build the trainer, its batches, its optimizer and its schedule."""
    with tempfile.TemporaryDirectory() as output:
        common: dict[str, Any] = {"model": _stand_in(tokenizer), "processing_class": tokenizer}
        if adapter is not None:  # its own names of modules are the draft's
            common["peft_config"] = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
        try:
            args = config(output)
            args.dataloader_drop_last = False  # one row is no whole batch
            trainer = make({**common, "args": args})
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            if type(trainer) in WITHOUT_WRITING:
                batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
                trainer.compute_loss(cast(nn.Module, trainer.model), batch)
            else:
                trainer.get_train_dataloader()
        except RecipeError:
            raise
        except Exception as error:  # whatever the libraries raise for arguments that they cannot use
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"section {section!r} is refused by TRL: {type(error).__name__}: {reason:.500}"
            ) from error


def _try_lora(recipe: Recipe, adapter: LoraConfig, section: str) -> None:
    """Build the LoRA on the draft's architecture, without weights."""
    try:
        with whole_weights(), torch.device("meta"):
            model = empty_draft(recipe)
            names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            if unknown := sorted({*(adapter.modules_to_save or [])} - names):
                raise ValueError(
                    f"modules_to_save names {', '.join(unknown)}, and the draft has {', '.join(sorted(names))}"
                )
            check_mergeable(get_peft_model(model, adapter), section)
    except RecipeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"section {section!r} is refused by PEFT: {type(error).__name__}: {reason:.500}") from error


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of no size that reads these tokens."""
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=10**6)
    with whole_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
