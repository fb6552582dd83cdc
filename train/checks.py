"""What is checked before anything expensive: models, methods, prompts, and room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import str_to_bool
from transformers import AutoConfig, AutoModelForCausalLM

from eval.checks import check_models, check_prompts
from recipes.pair import draft_tokenizer, empty_draft, hidden_states, target_config, target_tokenizer
from recipes.schema import Recipe, RecipeError
from train.evidence import BYTES

SAVED = 4  # bytes a weight of the draft, in its folder
CHECKPOINT = 12  # bytes a trained weight: itself and AdamW's two moments; the old one stands until the new is whole
REPAIRED = 3  # texts a prompt before which drafts stand: itself, and what was repaired
ROW = 40  # bytes a token of an answer or a draft: ids, mask, text, labels; the data set and what was kept on the way


def check_all(recipe: Recipe, stages: Sequence[str]) -> int:
    """Refuse what some of the stages could not do, in seconds.

    Returns:
        bytes that the stages may write.

    Raises:
        RecipeError: naming the key, what was given and the remedy.
    """
    check_launch(stages)
    if "pretrain" in stages:
        check_pretrain(recipe)
    if set(stages) == {"pretrain"}:
        return 0
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


def check_pretrain(recipe: Recipe) -> None:
    """Refuse models that cannot be made: their architectures, and what of them learns to judge."""
    from recipes.demo.corpus import make_tokenizer
    from recipes.demo.verdicts import check

    vocabulary = len(make_tokenizer())
    for name, section in recipe.pretrain.items():
        try:
            check(name, section, vocabulary)
            with torch.device("meta"):
                architecture = {**section.architecture, "vocab_size": vocabulary}
                AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
        except Exception as error:  # whatever a model's code raises for sizes that it cannot have
            reason = f"{type(error).__name__}: {error}"
            raise RecipeError(f"pretrain.{name} describes a model that cannot be made: {reason:.500}") from error


def check_methods(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse a method of training that this pair of models cannot take, or arguments that the libraries refuse."""
    from train.trainers import same_vocabulary  # TRL takes seconds to import
    from train.trial import try_align, try_distill

    comparing = []
    if "distill" in stages:
        if recipe.distill.method == "gold":
            _check_gold(recipe)
        if recipe.distill.method in ("logits", "on_policy"):
            comparing.append(f"distill.method={recipe.distill.method}")
    if "align" in stages and recipe.align.method == "on_policy":
        comparing.append("align.method=on_policy")
    if comparing:
        own, theirs = draft_tokenizer(recipe), target_tokenizer(recipe)
        with torch.device("meta"):
            width = empty_draft(recipe).config.vocab_size
        widths = (width, target_config(recipe).vocab_size)
        for method in comparing:
            same_vocabulary(recipe, method, own, theirs, widths)
    if "distill" in stages:
        try_distill(recipe)
    if "align" in stages:
        try_align(recipe)


def _check_gold(recipe: Recipe) -> None:
    """Refuse tokenizers across which TRL cannot align answers."""
    from trl.experimental.utils import is_byte_level_tokenizer

    sources = recipe.draft if isinstance(recipe.draft, str) else recipe.target, recipe.target
    for source, tokenizer in zip(sources, (draft_tokenizer(recipe), target_tokenizer(recipe)), strict=True):
        if not tokenizer.chat_template or not is_byte_level_tokenizer(tokenizer.backend_tokenizer):
            raise RecipeError(
                f"distill.method=gold aligns answers by the bytes of their tokens, and the tokenizer of {source} has "
                f"{'no byte-level tokens' if tokenizer.chat_template else 'no chat template'}: use "
                "distill.method=sequence"
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
        trained = weights // 50 if recipe.distill.by_lora else weights
        need["draft"] = weights * SAVED
        need["checkpoints"] = 2 * trained * CHECKPOINT
        if recipe.distill.method == "logits":
            from train import logits

            need["the target's logits"] = tokens * recipe.distill.top_k * logits.BYTES * 4 // 3
    rolled = recipe.rollouts
    labelled = rolled.train * rolled.drafts + rolled.calibration + rolled.test
    first = recipe.align.prompts if recipe.aligned else labelled
    prompts = first * ("rollouts" in stages) + labelled * ("relabel" in stages)
    need["rollouts"] = prompts * recipe.engine.max_new_tokens * ROW
    if "verifier" in stages and recipe.verifier.kind in ("best", "probe", "folded"):
        config, layers = target_config(recipe), set[int]()
        if recipe.verifier.kind != "folded":
            layers |= {*hidden_states(recipe.verifier.probe.layers, config.num_hidden_layers)}
        if recipe.verifier.kind != "probe":
            layers.add(config.num_hidden_layers)
        width = len(layers) * config.hidden_size
        answers = rolled.drafts + rolled.negatives * (rolled.labels in ("auto", "checker"))
        contexts = REPAIRED if recipe.verifier.probe.blocks else 0  # a prompt and the answer so far, each
        tokens = rolled.train * (answers + contexts) * recipe.engine.max_new_tokens
        need["states"] = tokens * width * BYTES
    folder = recipe.folder
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if sum(need.values()) > free:
        parts = ", ".join(f"{name} {size_of(size)}" for name, size in need.items())
        raise RecipeError(
            f"runs: {Path(recipe.runs)} has {size_of(free)} free, and this run may take "
            f"{size_of(sum(need.values()))} ({parts}): make room, set runs to another disk, or lower "
            "answers.prompts, rollouts, distill.top_k or the number of verifier.probe.layers"
        )
    return need


def size_of(count: int) -> str:
    """A number of bytes, as people read it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
