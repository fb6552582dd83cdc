"""What is checked of a recipe's models and prompts before anything expensive."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from eval.judges import labeller_of
from eval.prompts import plan, prompts_of
from eval.tasks import load_task
from eval.tasks.task import Prompt
from parse.local.loading import (
    FINDING,
    HUB_ID,
    base_of,
    check_architecture,
    check_options,
    check_weights,
    finding,
    tokenizer_of,
    whole_model,
)
from parse.prompts import encode_prompt, render, split_beginning
from parse.text import encode_text, text_of
from parse.verifiers import PromptVerifier
from parse.verifiers.adapter import suffix_of
from recipes.pair import adapted_layers, draft_tokenizer, empty_draft, hidden_states, target_config, target_tokenizer
from recipes.schema import Recipe, RecipeError, to_dict

OTHER_THINKING = ("[THINK]", "<|channel|>", "<thinking>", "<reasoning>")  # tags that are not read, as <think> is


def check_models(recipe: Recipe) -> None:
    """Refuse models that are not there or that the engine cannot run, from their configurations.

    Raises:
        RecipeError: naming the key, the model and the remedy.
    """
    for key, options in ("target", recipe.engine.target_options), ("draft", recipe.engine.draft_options):
        if found := ", ".join(sorted(FINDING & options.keys())):
            raise RecipeError(
                f"engine.{key}_options holds {found}, and the stages read the {key}'s configuration and tokenizer from "
                "where it is named: download what you mean into a folder, and name the folder"
            )
    models = {"target": recipe.target} | ({"draft": recipe.draft} if isinstance(recipe.draft, str) else {})
    options = {"target": recipe.engine.target_options, "draft": recipe.engine.draft_options}
    for key, source in models.items():
        if not Path(source).is_dir() and not HUB_ID.fullmatch(source):
            raise RecipeError(
                f"{key}: {source} is not a folder here; give the folder of a model, or a hub id such as org/name"
            )
        try:
            config = AutoConfig.from_pretrained(base_of(source), **finding(options[key]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{key}: {source} cannot be read as a model: {error}") from error
        try:
            check_architecture(config)
            check_options(options[key], config)
            if wanted := options[key].get("quantization_config"):
                AutoHfQuantizer.from_config(wanted).validate_environment(device_map=options[key].get("device_map"))
        except Exception as error:  # a quantiser says in its own way what it lacks
            raise RecipeError(f"{key}: {error}") from error
    for key, source in models.items():
        try:
            check_weights(source)
            check_weights(base := base_of(source))
            if Path(base).is_dir():
                whole_model(base, device_map="meta", **finding(options[key]))
            AutoTokenizer.from_pretrained(tokenizer_of(source), **finding(options[key]))
        except Exception as error:  # whatever a library raises for files that it cannot read
            raise RecipeError(f"{key}: {source} cannot be loaded: {error}") from error
    draft_tokenizer(recipe)
    with torch.device("meta"):
        empty_draft(recipe)
    if recipe.verifier.kind == "prompt":
        check_asking(recipe, "verifier.kind")
    if recipe.rollouts.labeller == "agreement" and not recipe.rollouts.judge:
        check_asking(recipe, "rollouts.labeller")
    depth = target_config(recipe).num_hidden_layers
    hidden_states(recipe.verifier.probe.layers, depth)
    adapted_layers(recipe.verifier.adapter.layers, depth)
    if recipe.verifier.kind in ("best", "adapter"):
        try:
            suffix_of(target_tokenizer(recipe), recipe.verifier.adapter.suffix)
        except ValueError as error:
            raise RecipeError(f"verifier.kind: {error}") from error


def check_prompts(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse prompts that do not fit or that the target's tokenizer cannot read, and splits without any."""
    try:
        task = load_task(recipe.task, to_dict(recipe.data))
    except (OSError, ValueError) as error:
        raise RecipeError(f"task: {error}") from error
    if recipe.data.check == "math" and task.references:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise RecipeError("data.check is 'math': install its library, `pip install math-verify`") from error
    compared = labeller_of(recipe, task) == "agreement" and {"rollouts", "relabel", "eval"} & set(stages)
    if compared and not recipe.rollouts.judge:
        check_asking(recipe, "rollouts.labeller")
    if task.duplicates:
        print(f"task: {task.duplicates} rows of {recipe.task} hold a prompt of an earlier row and are left out")
    tokenizer = target_tokenizer(recipe)
    if other := [tag for tag in OTHER_THINKING if tag in str(tokenizer.chat_template)]:
        print(f"note: the target's chat template has {other[0]}, and what stands there counts as a part of the answer")
    for stage in dict.fromkeys(stage for stage in stages if plan(recipe, stage)[0]):
        chosen = prompts_of(recipe, task, stage)
        prompts = [prompt for _, prompt in chosen.prompts]
        for remark in chosen.remarks:
            print(remark)
        for prompt in prompts:
            _check_words(recipe, prompt, tokenizer)
        _check_reading(recipe, prompts[0], tokenizer)


def _check_words(recipe: Recipe, prompt: Prompt, tokenizer: Any) -> None:
    """Refuse a prompt with words that the target's tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return  # where one token is all of them (Granite, OLMo 2), it stands in templates, and no word is unknown
    ids = encode_prompt(prompt, tokenizer)
    if unknown in ids:
        raise RecipeError(
            f"task: the tokenizer of {recipe.target} does not know words of the prompt {prompt!r:.200}: it reads "
            f"{text_of(ids, tokenizer)!r:.200}. Take a target whose tokenizer covers these prompts"
        )


def _check_reading(recipe: Recipe, prompt: Prompt, tokenizer: Any) -> None:
    """A prompt that comes back from its tokens as another text is not what the target will read."""
    asked, _ = split_beginning(prompt)
    text = render(asked, tokenizer) if tokenizer.chat_template else str(prompt)
    words = asked[-1]["content"]
    if _letters(words) not in _letters(text):
        raise RecipeError(
            f"task: the target's chat template leaves out words of a prompt: of {words!r:.200} it makes {text!r:.200}"
        )
    back = text_of(encode_text(text, tokenizer), tokenizer)
    if _letters(back) != _letters(text):
        raise RecipeError(
            f"task: a prompt comes back from the tokens of {recipe.target} as another text, {back!r:.200} instead of "
            f"{text!r:.200}: its tokenizer does not suit these prompts"
        )


def _letters(text: str) -> str:
    """A text without what tokenizers may change of it: spaces, and which of several ways spells a character."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def check_speculation(recipe: Recipe) -> None:
    """Refuse a draft for lossless speculation that cannot be read.

    Raises:
        RecipeError: naming it.
    """
    methods, source = recipe.eval.methods, recipe.eval.speculation_draft
    if source is None or (methods is not None and "speculation" not in methods):
        return
    try:
        AutoTokenizer.from_pretrained(tokenizer_of(source))
    except (OSError, ValueError) as error:
        raise RecipeError(f"eval.speculation_draft: {source} cannot be read as a model: {error}") from error


def verifier_of_kind(recipe: Recipe, kind: str) -> Path:
    """The folder of a run's verifier of a kind, the chosen one or another.

    Raises:
        RecipeError: where the run has none.
    """
    chosen = recipe.evaluated[1]
    for folder in (chosen, chosen / "others" / kind):
        if (record := folder / "verifier.json").is_file() and json.loads(record.read_text()).get("kind") == kind:
            return folder
    raise RecipeError(
        f"eval.methods has 'parse_{kind}', and {chosen} holds no verifier of the kind {kind}: run the stage `verifier` "
        "with verifier.kind=best, which trains all that the models can do, or leave the method out"
    )


def check_asking(recipe: Recipe, key: str) -> None:
    """Raise RecipeError for a target that cannot be asked in words."""
    try:
        PromptVerifier.of(target_tokenizer(recipe))
    except ValueError as error:
        raise RecipeError(f"{key} asks the target in words: {error}") from error
