"""The models of a recipe: the pair in an engine, and the draft to begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from parse import Engine
from parse.local.loading import base_of, finding, load_model, tokenizer_of, trusts_code
from parse.prompts import as_messages, end_of_answer
from parse.remote.client import ServerError
from parse.text import eos_ids, named_ends
from recipes.schema import NewDraft, Recipe, RecipeError
from recipes.vocabulary import byte_level_tokenizer

SPREAD = (0.4, 0.6, 0.8, 0.95)  # of the depth: upper layers know what was read, the last ones what comes next


def load_engine(
    recipe: Recipe,
    draft: Path | None = None,
    verifier: Path | None = None,
    compile: bool | None = False,
    served: bool = True,
) -> Engine:
    """The recipe's target, with the draft and the verifier of some folders.

    Args:
        served: where the recipe names a server, use the target there; else its weights are loaded here.

    Raises:
        RecipeError: where they cannot be loaded, or not together.
    """
    engine, target = recipe.engine, dict[str, Any](target=recipe.target, target_options=recipe.engine.target_options)
    if served and engine.target_url:
        options = {"tokenizer": str(base_of(recipe.target))}
        target = {"target": engine.target_url, "target_options": options, "tokenizer": target_tokenizer(recipe)}
    with whole_weights():
        try:
            made = Engine.from_pretrained(
                **target,
                draft=draft,
                verifier=verifier,
                segments=recipe.segments,
                compile=compile,
                draft_options=engine.draft_options,
            )
        except (ValueError, FileNotFoundError, ServerError) as error:
            raise RecipeError(str(error)) from error
    length = made.models["target"].context_length
    if made.served and length is not None and length <= engine.max_new_tokens:
        raise RecipeError(
            f"engine.target_url: {made.models['target'].name} holds {length} tokens, and answers may have "
            f"{engine.max_new_tokens} (engine.max_new_tokens): start it with a larger --max-model-len"
        )
    return made


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


def target_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The target's tokenizer."""
    loaded = AutoTokenizer.from_pretrained(tokenizer_of(recipe.target), **finding(recipe.engine.target_options))
    return cast(PreTrainedTokenizerBase, loaded)


def target_config(recipe: Recipe) -> PreTrainedConfig:
    """The target's configuration."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        base_of(recipe.target), **finding(recipe.engine.target_options)
    )
    return config


def first_draft(
    recipe: Recipe, answers: Iterable[Mapping[str, Any]] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The draft that distillation begins with, in float32, and its tokenizer, which name the end that it will learn.

    Args:
        answers: see `draft_tokenizer`.

    Raises:
        RecipeError: where the target has no such layers, or the configuration is refused.
    """
    draft, tokenizer = recipe.draft, draft_tokenizer(recipe, answers)
    if isinstance(draft, str):
        model = load_model(draft, dtype=torch.float32, options=finding(recipe.engine.draft_options))
    elif draft.layers is not None:
        whole = load_model(recipe.target, dtype=torch.float32, options=finding(recipe.engine.target_options))
        model = with_layers(whole, draft.layers)
    else:
        model = _from_config(draft, tokenizer)
    end = int(cast(Any, tokenizer).eos_token_id)
    others = sorted(eos_ids(model) - {end})
    model.config.eos_token_id = end
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [end, *others] if others else end
    return model, tokenizer


def draft_tokenizer(recipe: Recipe, answers: Iterable[Mapping[str, Any]] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer that the draft learns with; its end-of-sequence token is the one that ends the answers.

    Where draft and target have the same vocabulary it is the target's, chat template and all: the engine gives both
    models the same tokens.

    Args:
        answers: rows with `prompt` and `answer`, of which `draft.tokenizer` learns; without them it knows bytes alone.

    Raises:
        RecipeError: where it names no end, so that no draft can learn to end.
    """
    target = target_tokenizer(recipe)
    if isinstance(recipe.draft, NewDraft) and recipe.draft.tokenizer:
        return byte_level_tokenizer(_texts(answers), recipe.draft.tokenizer.vocab_size)
    if not isinstance(recipe.draft, str):
        own, source = target, recipe.target
    else:
        source = recipe.draft
        own = AutoTokenizer.from_pretrained(tokenizer_of(source), **finding(recipe.engine.draft_options))
    if own.get_vocab() == target.get_vocab():
        target.eos_token = target.convert_ids_to_tokens(learnt_end(recipe, target))
        return target
    if own.eos_token_id is None:
        raise RecipeError(
            f"draft: the tokenizer of {source} names no end-of-sequence token, so no draft can learn to end: set its "
            "eos_token and save it with the model"
        )
    return own


def _texts(answers: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What the rows' prompts and answers hold."""
    for row in answers:
        yield from (str(turn["content"]) for turn in as_messages(row["prompt"]))
        yield str(row["answer"])


def learnt_end(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """The target's token that ends the answers which the draft learns.

    Raises:
        RecipeError: where neither the target's configurations nor its tokenizer name one.
    """
    try:
        generation = GenerationConfig.from_pretrained(base_of(recipe.target))
    except OSError:  # there is none
        generation = None
    config = target_config(recipe)
    size = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    ends = named_ends([generation, config], cast(Any, tokenizer).eos_token_id, size)
    if not ends:
        raise RecipeError(
            f"target: neither the configuration nor the tokenizer of {recipe.target} names an end-of-sequence token, "
            "so no draft can learn to end: set eos_token and save it with the model"
        )
    return end_of_answer(ends, tokenizer)


def empty_draft(recipe: Recipe) -> PreTrainedModel:
    """The draft's architecture, with whatever weights the device at hand gives: on "meta" none.

    Raises:
        RecipeError: as `first_draft` does.
    """
    draft = recipe.draft
    if isinstance(draft, NewDraft) and draft.config is not None:
        return _from_config(draft, draft_tokenizer(recipe))
    if isinstance(draft, str):
        trust = trusts_code(recipe.engine.draft_options)
        config = AutoConfig.from_pretrained(base_of(draft), trust_remote_code=trust)
    else:
        trust, config = trusts_code(recipe.engine.target_options), target_config(recipe)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
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
        if isinstance(value, list) and len(value) == depth:  # layer_types and their like: one value per layer
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
    except Exception as error:  # whatever a model's code raises for sizes that it cannot have
        raise RecipeError(
            f"draft.config is refused: {type(error).__name__}: {error}; name a `model_type` "
            "such as llama and that configuration's arguments"
        ) from error


def hidden_states(layers: Sequence[int] | str, depth: int) -> tuple[int, ...]:
    """The probe's layers as indices into `hidden_states`: 0 is the embedding, `depth` the last; negative from the end.

    "auto" are those at `SPREAD` of the depth.

    Raises:
        RecipeError: where there is no such state, or one is named twice, or none.
    """
    if isinstance(layers, str):
        return tuple(sorted({max(1, round(share * depth)) for share in SPREAD}))
    states = tuple(layer % (depth + 1) for layer in layers if -depth - 1 <= layer <= depth)
    if not layers or len({*states}) < len(layers):
        raise RecipeError(
            f"verifier.probe.layers is {list(layers)}: the target has hidden states 0 (the embedding) to {depth}, or "
            f"{-depth - 1} to -1 from the end; name one or more, each of them once"
        )
    return states


def adapted_layers(layers: int | None, depth: int) -> int:
    """How many of the target's last layers the adapter works on; None is all of its `depth`.

    Raises:
        RecipeError: where it has fewer.
    """
    if layers is not None and not 0 < layers <= depth:
        raise RecipeError(f"verifier.adapter.layers is {layers}: the target has {depth}; give 1 to {depth}, or null")
    return depth if layers is None else layers
