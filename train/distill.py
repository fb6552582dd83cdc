"""Stage 2: the draft learns the target's answers.

- `sequence`: the answers themselves, token by token (TRL's SFTTrainer).
- `logits`: the target's most likely next tokens at each token of its answers, kept once (`train.logits`).
- `on_policy`: the target's next tokens at each token of the draft's own answers (TRL's DistillationTrainer).
- `gold`: the target's next tokens at each token of its answers, for a draft with other tokens (TRL's GOLDTrainer).

Each trains every weight, or a LoRA, which is merged afterwards or left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, set_seed
from trl import DistillationConfig, SFTConfig

from eval.parity import COUNT, save_examples
from parse.local.loading import Messages, context_length, load_model
from parse.prompts import as_messages, encode_for_draft, encode_prompt, render, split_beginning
from parse.text import encode_continuation, encode_text
from recipes.pair import first_draft, target_tokenizer, whole_weights
from recipes.run import KEPT, Run
from recipes.schema import Recipe, RecipeError
from train.logits import LogitsTrainer, likely_tokens
from train.trainers import (
    AnswerTrainer,
    OnPolicyTrainer,
    arguments,
    checkpoints,
    lora_config,
    same_vocabulary,
    train,
    training_kind,
)


def run(recipe: Recipe, run: Run) -> None:
    """Write `draft/`, a plain Hugging Face folder: model and tokenizer; and `losses.json`."""
    with run.stage("distill") as folder:
        section = recipe.distill
        answers = load_from_disk(run.path("answers"))
        assert isinstance(answers, Dataset)
        model, tokenizer = first_draft(recipe, answers)
        fitting = _that_fit(recipe, answers, model, run)
        trainer = make_trainer(recipe, fitting, model, tokenizer, folder)
        adapter = folder / KEPT / "lora"
        train(trainer, "distill", run, adapter if section.by_lora else folder)
        if run.is_main:
            if section.by_lora:
                if section.merge:
                    _merge(recipe, adapter, folder, answers)
                else:
                    _leave(adapter, folder)
            tokenizer.save_pretrained(folder)
            _keep_examples(trainer, fitting, folder)


def _keep_examples(trainer: Trainer, answers: Dataset, folder: Path) -> None:
    """Keep what the trainer's collator made of the first answers, for `eval.parity`.

    Nothing where the trainer writes its own answers, or packs several into one text.
    """
    seen, count = trainer.train_dataset, min(COUNT, len(answers))
    if not isinstance(seen, Dataset) or "input_ids" not in seen.column_names or len(seen) != len(answers):
        return
    batch = trainer.data_collator([seen[i] for i in range(count)])
    if "attention_mask" in batch and len(batch["input_ids"]) == count:
        save_examples(folder, answers["prompt"][:count], answers["answer"][:count], batch)


def _that_fit(recipe: Recipe, answers: Dataset, model: PreTrainedModel, run: Run) -> Dataset:
    """The answers that the draft's context, and the recipe's `max_length`, hold whole: no end may be cut off."""
    given = recipe.distill.trainer.get("max_length")
    longest = min((limit for limit in (context_length(model.config), given) if limit is not None), default=None)
    if longest is None:
        return answers
    fitting = answers.select([i for i, ids in enumerate(answers["input_ids"]) if len(ids) <= longest])
    if not len(fitting):
        raise RecipeError(
            f"distill: room for {longest} tokens, and every prompt with its answer has more: raise max_length"
        )
    if len(fitting) < len(answers):
        count = len(answers) - len(fitting)
        run.say(f"distill: {count} answers have more than {longest} tokens with their prompts: left out")
    return fitting


def make_trainer(recipe: Recipe, answers: Dataset, model: Any, tokenizer: Any, folder: Path) -> Trainer:
    """The trainer of the recipe's method.

    Raises:
        RecipeError: where the method needs tokens that draft and target share, and they do not.
    """
    section = recipe.distill
    args = trainer_config(recipe, checkpoints(folder))
    common: dict[str, Any] = {"model": model, "args": args, "processing_class": tokenizer}
    if section.lora is not None:
        common["peft_config"] = lora_config(section.lora, "distill.lora")
    if section.lora_from is not None:
        common["model"] = PeftModel.from_pretrained(model, section.lora_from, is_trainable=True)
    if section.method == "sequence":
        return training_kind(AnswerTrainer)(train_dataset=examples(recipe, answers, tokenizer), **common)
    with whole_weights() if section.method == "logits" else nullcontext():
        target = load_model(recipe.target, options=recipe.engine.target_options)
    if section.method == "gold":
        return gold_trainer(answers, target, common)
    of_target = target_tokenizer(recipe)
    widths = (model.config.vocab_size, target.config.vocab_size)
    same_vocabulary(recipe, f"distill.method={section.method}", tokenizer, of_target, widths)
    if section.method == "on_policy":
        return training_kind(OnPolicyTrainer)(
            teacher_model=target, train_dataset=prompts(answers["prompt"], tokenizer), **common
        )
    kept = likely_tokens(folder / KEPT / "likely", target, answers, section.top_k)
    return training_kind(LogitsTrainer)(train_dataset=kept, **common)


def gold_trainer(answers: Iterable[dict[str, Any]], target: PreTrainedModel, common: dict[str, Any]) -> Trainer:
    """TRL's GOLDTrainer on answers as conversations."""
    from trl.experimental.gold import GOLDTrainer

    tokenizer = common["processing_class"]
    if tokenizer.pad_token is None:  # as Llama 3's has none, and this trainer fails without
        tokenizer.pad_token = tokenizer.eos_token

    turns = [{"messages": conversation(row["prompt"], row["answer"])} for row in answers]
    trainer: Trainer = training_kind(GOLDTrainer)(
        teacher_model=target, train_dataset=Dataset.from_list(turns), **common
    )
    return trainer


def conversation(prompt: str | Messages, answer: str) -> Messages:
    """A prompt and its answer as messages; an answer that the prompt begins is one of them."""
    asked, beginning = split_beginning(prompt)
    return [*asked, {"role": "assistant", "content": beginning + answer}]


def trainer_config(recipe: Recipe, output: str | None = None) -> Any:
    """TRL's configuration of the recipe's method: `distill.trainer` over defaults.

    Args:
        output: the folder of checkpoints.

    Raises:
        RecipeError: for a key or a value that TRL refuses.
    """
    section = recipe.distill
    defaults: dict[str, Any] = {"output_dir": output} if output else {}
    limit = recipe.engine.max_new_tokens
    kind: type = SFTConfig
    if section.method == "on_policy":
        kind = DistillationConfig
        defaults |= {"max_completion_length": limit, "temperature": 1.0}
    elif section.method == "gold":
        from trl.experimental.gold import GOLDConfig

        kind = GOLDConfig
        defaults |= {"use_uld_loss": True, "lmbda": 0.0, "max_completion_length": limit}
        defaults |= {"teacher_tokenizer_name_or_path": recipe.target}
    else:
        defaults |= {"completion_only_loss": True, "max_length": None}  # lengths are checked before
    return arguments(kind, section.trainer, recipe, "distill.trainer", **defaults)


def examples(recipe: Recipe, answers: Dataset, tokenizer: Any) -> Dataset:
    """Token ids and masks of the answers in the draft's tokens: the target's as they are, else anew from text."""
    columns = ["input_ids", "completion_mask"]
    target = target_tokenizer(recipe)
    if tokenizer.get_vocab() == target.get_vocab():
        return answers.select_columns(columns)

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        start = encode_for_draft(row["prompt"], tokenizer, target)
        completion = [*encode_continuation(row["answer"], tokenizer), tokenizer.eos_token_id]
        return {
            "input_ids": [*start, *completion],
            "completion_mask": [0] * len(start) + [1] * len(completion),
        }

    return Dataset.from_list([encoded(row) for row in answers])


def prompts(rows: Any, tokenizer: Any) -> Dataset:
    """Prompts as TRL's trainers that generate take them: turns where there is a chat template."""
    as_taken = as_messages if tokenizer.chat_template else lambda prompt: prompt
    alike = [as_taken(prompt) for prompt in rows if _reads_alike(prompt, tokenizer)]
    if not alike:
        raise RecipeError(
            "TRL reads every prompt in another way: they hold what looks like control tokens, or begin the answer: use "
            "sequence"
        )
    if len(alike) < len(rows):
        print(f"{len(rows) - len(alike)} prompts, which TRL would read in another way, are left out")
    return Dataset.from_list([{"prompt": prompt} for prompt in alike])


def _reads_alike(prompt: str | Messages, tokenizer: Any) -> bool:
    """Whether TRL gives the model the same tokens of a prompt as the engine does.

    It reads words as control tokens, and has answers that a prompt begins answered.
    """
    text = render(as_messages(prompt), tokenizer) if tokenizer.chat_template else str(prompt)
    plain = encode_text(text, tokenizer) if tokenizer.chat_template else list(tokenizer.encode(text))
    return plain == encode_prompt(prompt, tokenizer)


def _leave(adapter: Path, folder: Path) -> None:
    """Put the LoRA into the folder as it is."""
    for file in adapter.iterdir():
        file.rename(folder / file.name)


def _merge(recipe: Recipe, adapter: Path, folder: Path, answers: Dataset) -> None:
    """Save the draft with the LoRA added to its weights."""
    set_seed(recipe.seed)  # a new draft's weights are drawn again
    with whole_weights():
        model, _ = first_draft(recipe, answers)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder)
    losses = adapter / "losses.json"
    losses.rename(folder / losses.name)
