"""The models of a recipe: the pair in an engine, and the draft to begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from parse import Engine
from parse.models import load_model
from train.recipe import NewDraft, Recipe, RecipeError


def load_engine(
    recipe: Recipe, draft: Path | None = None, verifier: Path | None = None, compile: bool | None = False
) -> Engine:
    """The recipe's target, with the draft and the verifier of some folders."""
    with whole_weights():
        return Engine.from_pretrained(
            recipe.target,
            draft,
            verifier,
            segments=recipe.segments,
            compile=compile,
            target_options=recipe.engine.target_options,
            draft_options=recipe.engine.draft_options,
        )


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within, every process loads all weights of a model.

    From a trainer's arguments on, DeepSpeed's ZeRO-3 deals those of each model out over the processes, for a trainer.
    """
    dealing = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = dealing


def first_draft(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The draft that distillation begins with, in float32, and its tokenizer.

    Raises:
        RecipeError: where the target has no such layers, or the configuration is refused.
    """
    draft = recipe.draft
    if isinstance(draft, str):
        return load_model(draft, dtype=torch.float32), AutoTokenizer.from_pretrained(draft)
    tokenizer = AutoTokenizer.from_pretrained(recipe.target)
    if draft.layers is not None:
        return with_layers(load_model(recipe.target, dtype=torch.float32), draft.layers), tokenizer
    return _from_config(draft, tokenizer), tokenizer


def empty_draft(recipe: Recipe) -> PreTrainedModel:
    """The draft's architecture, with whatever weights the device at hand gives: on "meta" none.

    Raises:
        RecipeError: as `first_draft` does.
    """
    draft = recipe.draft
    if isinstance(draft, NewDraft) and draft.config is not None:
        return _from_config(draft, AutoTokenizer.from_pretrained(recipe.target))
    source = draft if isinstance(draft, str) else recipe.target
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return model if isinstance(draft, str) or draft.layers is None else with_layers(model, draft.layers)


def with_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model itself, with so many of its layers left: evenly spaced, the first and the last among them.

    Raises:
        RecipeError: where it has fewer.
    """
    config = model.config
    depth = config.num_hidden_layers
    if not 0 < count <= depth:
        raise RecipeError(f"draft.layers is {count}: the target has {depth} layers; give 1 to {depth}")
    kept = [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                setattr(module, name, nn.ModuleList(child[i] for i in kept))
    places = {old: new for new, old in enumerate(kept)}
    for module in model.modules():
        if isinstance(index := getattr(module, "layer_idx", None), int):
            module.layer_idx = places[index]  # type: ignore[assignment]
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:  # layer_types and their like: a value a layer
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = count
    return model


def _from_config(draft: NewDraft, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights, for the target's tokens."""
    given = dict(draft.config or {})
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(given.pop("model_type"), **{"vocab_size": len(tokenizer), **special, **given})
        return AutoModelForCausalLM.from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"draft.config is refused: {error}; name a `model_type` such as llama and that configuration's arguments"
        ) from error
