"""What is checked before anything expensive: models, methods, prompts, and room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import str_to_bool
from transformers import AutoConfig, AutoTokenizer

from eval.judges import labeller_of, question_of
from eval.tasks import draw_prompts, load_task
from eval.tasks.rows import Prompt, Rows
from parse.models import (
    check_architecture,
    check_weights,
    context_length,
    encode_prompt,
    encode_text,
    finding,
    render,
    text_of,
)
from parse.verifiers import Prompt as Verdict
from train.models import empty_draft
from train.recipe import NewDraft, Recipe, RecipeError, hidden_states, to_dict

LOOKED_AT = 200  # prompts of each split whose tokens are counted
SAVED = 4  # bytes a weight of the draft, in its folder
CHECKPOINT = 12  # bytes a trained weight: itself and AdamW's two moments; the old one stands until the new is whole
ROW = 40  # bytes a token of an answer or a draft: ids, mask, text, labels; the data set and what was kept on the way


def check_all(recipe: Recipe, stages: Sequence[str]) -> int:
    """Refuse what some of the stages could not do, in seconds.

    Returns:
        bytes that the stages may write.

    Raises:
        RecipeError: naming the key, what was given and the remedy.
    """
    check_launch(stages)
    check_models(recipe)
    check_methods(recipe, stages)
    check_prompts(recipe, stages)
    return sum(check_disk(recipe, stages).values())


def check_launch(stages: Sequence[str]) -> None:
    """Refuse a topology that a stage cannot learn under."""
    if "verifier" in stages and str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        raise RecipeError(
            "the verifier learns in one process, under DDP or under FSDP2, not under DeepSpeed: name the stages before "
            "it here (distill, align), and start the rest with recipes/accelerate/ddp.yaml or fsdp2.yaml"
        )


def check_methods(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse a method of training that this pair of models cannot take, or arguments that the libraries refuse."""
    from train import align, distill  # TRL takes seconds to import
    from train.trainers import lora_config, same_vocabulary

    comparing = []
    if "distill" in stages:
        distill.trainer_config(recipe)
        if recipe.distill.lora is not None:
            lora_config(recipe.distill.lora, "distill.lora")
        if recipe.distill.method == "gold":
            _check_gold(recipe)
        if recipe.distill.method in ("logits", "on_policy"):
            comparing.append(f"distill.method={recipe.distill.method}")
    if "align" in stages:
        align.trainer_config(recipe)
        lora_config(recipe.align.lora, "align.lora")
        if recipe.align.method == "on_policy":
            comparing.append("align.method=on_policy")
    if comparing:
        draft = recipe.draft if isinstance(recipe.draft, str) else recipe.target
        own, theirs = (AutoTokenizer.from_pretrained(source) for source in (draft, recipe.target))
        with torch.device("meta"):
            width = empty_draft(recipe).config.vocab_size
        widths = (width, AutoConfig.from_pretrained(recipe.target).vocab_size)
        for method in comparing:
            same_vocabulary(recipe, method, own, theirs, widths)


def _check_gold(recipe: Recipe) -> None:
    """Refuse tokenizers across which TRL cannot align answers."""
    from trl.experimental.utils import is_byte_level_tokenizer

    draft = recipe.draft if isinstance(recipe.draft, str) else recipe.target
    for source in (draft, recipe.target):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not tokenizer.chat_template or not is_byte_level_tokenizer(tokenizer.backend_tokenizer):
            raise RecipeError(
                f"distill.method=gold aligns answers by the bytes of their tokens, and the tokenizer of {source} has "
                f"{'no byte-level tokens' if tokenizer.chat_template else 'no chat template'}: use "
                "distill.method=sequence"
            )


def check_prompts(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse prompts that do not fit or that the target's tokenizer cannot read, and splits without any."""
    try:
        task = load_task(recipe.task, to_dict(recipe.data))
    except (OSError, ValueError) as error:
        raise RecipeError(f"task: {error}") from error
    if recipe.data.check == "math" and isinstance(task, Rows) and task.checks:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise RecipeError("data.check is 'math': install its library, `pip install math-verify`") from error
    compared = labeller_of(recipe, task) == "agreement" and bool({"rollouts", "relabel", "eval"} & set(stages))
    if compared:
        check_asking(recipe, "rollouts.labeller")
    tokenizer = AutoTokenizer.from_pretrained(recipe.target)
    contexts = {"target": (tokenizer, context_length(AutoConfig.from_pretrained(recipe.target)))}
    if {"distill", "align"} & set(stages):  # the engine's draft may stop at its context's end, what it learns may not
        own = AutoTokenizer.from_pretrained(recipe.draft) if isinstance(recipe.draft, str) else tokenizer
        with torch.device("meta"):
            contexts["draft"] = own, context_length(empty_draft(recipe).config)
    labelled = ("train", "calibration", "test")
    splits = {
        "answers": ("answers",),
        "distill": ("answers",),
        "rollouts": ("train",) if recipe.aligned else labelled,
        "align": ("train",),
        "relabel": labelled,
        "eval": ("test",),
    }
    for split in dict.fromkeys(split for stage in stages for split in splits.get(stage, ())):
        prompts = draw_prompts(task, split, LOOKED_AT, recipe.seed)
        if not prompts:
            raise RecipeError(
                f"task: {recipe.task} has no prompt for the split {split!r}: give more rows, or change data.shares"
            )
        for role, (own, context) in contexts.items():
            _check_lengths(recipe, prompts, role, own, context)
        if compared:
            asked = [question_of(prompt) for prompt in prompts]
            _check_lengths(recipe, asked, "target", *contexts["target"], answers=2)
        _check_reading(recipe, prompts[0], tokenizer)


def _check_lengths(
    recipe: Recipe, prompts: Sequence[Prompt], role: str, tokenizer: Any, context: int | None, answers: int = 1
) -> None:
    if context is None:
        return
    lengths, limit = [len(encode_prompt(prompt, tokenizer)) for prompt in prompts], recipe.engine.max_new_tokens
    if (longest := max(lengths)) > context - answers * limit:
        over = sum(length > context - answers * limit for length in lengths)
        what = "it" if answers == 1 else "two answers, which rollouts.labeller=agreement lets the target compare"
        raise RecipeError(
            f"engine.max_new_tokens is {limit}, and {over} of {len(lengths)} prompts leave no room for {what}: the "
            f"longest has {longest} tokens, and the {role}'s context holds {context}. Shorten or leave out those "
            f"prompts, or set engine.max_new_tokens to {max((context - longest) // answers, 0)} or less"
        )


def _check_reading(recipe: Recipe, prompt: Prompt, tokenizer: Any) -> None:
    """A prompt that comes back from its tokens as another text is not what the target will read."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = render(messages, tokenizer) if tokenizer.chat_template else str(prompt)
    except Exception as error:  # whatever the template's own code raises
        raise RecipeError(f"task: the target's chat template refuses the prompt {messages!r}: {error}") from error
    ids = encode_text(text, tokenizer)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise RecipeError(
            f"task: the tokenizer of {recipe.target} does not know words of the prompt {prompt!r}: it reads "
            f"{text_of(ids, tokenizer)!r}. Take a target whose tokenizer covers these prompts"
        )
    if "".join(text_of(ids, tokenizer).split()) != "".join(text.split()):
        raise RecipeError(
            f"task: a prompt comes back from the tokens of {recipe.target} as another text, "
            f"{text_of(ids, tokenizer)!r} instead of {text!r}: its tokenizer does not suit these prompts"
        )


def check_disk(recipe: Recipe, stages: Sequence[str]) -> dict[str, int]:
    """Refuse a run that the disk has no room for.

    Returns:
        bytes that the stages may write, by what they are for.
    """
    tokens = recipe.answers.prompts * recipe.engine.max_new_tokens
    need: dict[str, int] = {}
    if "answers" in stages:
        need["answers"] = tokens * ROW
    if "distill" in stages:
        with torch.device("meta"):
            weights = empty_draft(recipe).num_parameters()
        trained = weights if recipe.distill.lora is None else weights // 50
        need["draft"] = weights * SAVED
        need["checkpoints"] = 2 * trained * CHECKPOINT
        if recipe.distill.method == "logits":
            from train.logits import BYTES

            need["the target's logits"] = tokens * recipe.distill.top_k * BYTES * 4 // 3
    labelled = recipe.rollouts.train + recipe.rollouts.calibration + recipe.rollouts.test
    first = recipe.align.prompts if recipe.aligned else labelled
    prompts = first * ("rollouts" in stages) + labelled * ("relabel" in stages)
    need["rollouts"] = prompts * recipe.engine.max_new_tokens * ROW
    folder = recipe.folder
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if sum(need.values()) > free:
        parts = ", ".join(f"{name} {size_of(size)}" for name, size in need.items())
        raise RecipeError(
            f"runs: {Path(recipe.runs)} has {size_of(free)} free, and this run may take "
            f"{size_of(sum(need.values()))} ({parts}): make room, set runs to another disk, or lower "
            "answers.prompts, rollouts or distill.top_k"
        )
    return need


def size_of(count: int) -> str:
    """A number of bytes, as people read it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_models(recipe: Recipe) -> None:
    """Refuse models that are not there or that the engine cannot run, from their configurations.

    Raises:
        RecipeError: naming the key, the model and the remedy.
    """
    for key, options in ("target", recipe.engine.target_options), ("draft", recipe.engine.draft_options):
        if found := ", ".join(sorted(finding(options))):
            raise RecipeError(
                f"engine.{key}_options holds {found}, and the stages read the {key}'s configuration and tokenizer from "
                "where it is named: download what you mean into a folder, and name the folder"
            )
    models = {"target": recipe.target} | ({"draft": recipe.draft} if isinstance(recipe.draft, str) else {})
    for key, source in models.items():
        looks_local = source.count("/") != 1 or source.startswith((".", "~"))
        if not Path(source).is_dir() and looks_local:
            raise RecipeError(
                f"{key}: {source} is not a folder here; give the folder of a model, or a hub id such as org/name"
            )
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{key}: {source} cannot be read as a model: {error}") from error
        try:
            check_weights(source)
            check_architecture(config)
        except ValueError as error:
            raise RecipeError(f"{key}: {error}") from error
    if isinstance(recipe.draft, NewDraft):
        with torch.device("meta"):
            empty_draft(recipe)
    if recipe.verifier.kind == "prompt":
        check_asking(recipe, "verifier.kind")
    if recipe.rollouts.labeller == "agreement":
        check_asking(recipe, "rollouts.labeller")
    hidden_states(recipe.verifier.probe.layers, AutoConfig.from_pretrained(recipe.target).num_hidden_layers)


def check_asking(recipe: Recipe, key: str) -> None:
    """Raise RecipeError for a target that cannot be asked in words."""
    try:
        Verdict.of(AutoTokenizer.from_pretrained(recipe.target))
    except ValueError as error:
        raise RecipeError(f"{key} asks the target in words: {error}") from error
