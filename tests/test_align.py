"""Alignment: pairs of preferred continuations, and a draft that learns them."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM

import train.align
import train.distill
from parse import Engine
from parse.local.loading import load_model
from recipes.schema import RecipeError
from tests.conftest import LEDGER_PROMPTS, adopt, told
from tests.test_distill import finished, losses


@pytest.fixture
def aligned(begin):
    """A run whose draft and rollouts are there: each draft is right but for the total of its second sentence."""

    def made(*words):
        recipe = begin("stages=[answers,distill,rollouts,align,verifier]", *words)
        engine = Engine.from_pretrained(recipe.target, recipe.draft, compile=False)
        rows = []
        for number, prompt in enumerate(LEDGER_PROMPTS):
            first, second, *rest = told(prompt).split(" . ")
            wrong = " . ".join([first, second.replace("coins", "coins 1", 1), *rest])
            ids = engine.tokenizer.encode(wrong, add_special_tokens=False)
            good = engine.tokenizer.encode(" . ".join([second, *rest]), add_special_tokens=False)
            ends = [i + 1 for i, token in enumerate(engine.tokenizer.convert_ids_to_tokens(ids)) if token == "."]
            rows.append(
                {"split": "train", "number": number, "round": 0, "prompt": prompt, "prefix_ids": [], "draft_ids": ids}
                | {"prompt_ids": engine.encode(prompt), "ended": True, "ends": ends, "target_right": True, "met": True}
                | {"valid": [True] + [False] * (len(ends) - 1), "continuation_ids": good}
            )
        adopt(recipe, distill=Path(recipe.draft), rollouts=Dataset.from_list(rows))
        return recipe, engine

    return made


def align(recipe):
    return finished("align", recipe)


def test_a_pair_is_a_segment_of_each_after_the_last_valid_prefix(aligned):
    recipe, engine = aligned()
    pair = next(train.align.pairs(engine, load_from_disk(recipe.folder / "rollouts")))
    first, second = (f"{sentence} ." for sentence in told(LEDGER_PROMPTS[0]).split(" . ")[:2])
    assert pair["prompt_ids"] == [
        *engine.encode(LEDGER_PROMPTS[0]),
        *engine.tokenizer.encode(first, add_special_tokens=False),
    ]
    assert engine.tokenizer.decode(pair["chosen_ids"]) == second
    assert engine.tokenizer.decode(pair["rejected_ids"]) == second.replace("coins", "coins 1", 1)


def test_what_a_disturbed_copy_said_is_no_pair(aligned):
    recipe, engine = aligned()
    rows = load_from_disk(recipe.folder / "rollouts")
    assert list(train.align.pairs(engine, rows))
    assert not list(train.align.pairs(engine, rows.map(lambda _: {"met": False})))


@pytest.mark.parametrize("method", ["dpo", "on_policy"])
def test_alignment_gives_a_plain_peft_folder(aligned, method):
    """The engine runs it merged, or as it is, and answers the same."""
    from peft import PeftModel

    steps = "align.trainer={max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 1}"
    recipe, engine = aligned(f"align.method={method}", steps, "engine.max_new_tokens=40")
    folder = align(recipe)
    files = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "losses.json"} <= files
    assert not [name for name in files if name.endswith(".bin")]
    assert len(losses(folder)) == 4
    merged = Engine.from_pretrained(recipe.target, folder, compile=False)
    base = AutoModelForCausalLM.from_pretrained(recipe.folder / "draft", dtype=torch.float32)
    apart = PeftModel.from_pretrained(base, folder)
    beside = Engine.from_pretrained(recipe.target, apart, draft_tokenizer=merged.draft_tokenizer, compile=False)
    texts = [one.generate(LEDGER_PROMPTS, 40, method="draft") for one in (engine, merged, beside)]
    before, after, unmerged = ([result.token_ids for result in some] for some in texts)
    assert after == unmerged
    assert after != before


def test_alignment_by_preference_learns_the_preference(aligned):
    steps = "align.trainer={max_steps: 20, per_device_train_batch_size: 6, learning_rate: 3e-3, logging_steps: 1}"
    found = losses(align(aligned(steps)[0]))
    assert found[0] == pytest.approx(math.log(2), abs=0.1)
    assert found[-1] < 0.3


def test_alignment_without_a_pair_says_so(aligned):
    recipe, _ = aligned()
    rollouts = load_from_disk(recipe.folder / "rollouts").map(lambda row: {"valid": [True] * len(row["valid"])})
    adopt(recipe, rollouts=Dataset.from_list(rollouts.to_list()))
    with pytest.raises(RecipeError, match="none of 12 drafts has an invalid prefix that the target mends"):
        align(recipe)


def test_a_moved_run_finds_its_draft(aligned, tmp_path):
    recipe, _ = aligned("align.trainer={max_steps: 1}")
    align(recipe)
    recipe.folder.rename(tmp_path / "moved")
    moved = load_model(tmp_path / "moved" / "draft-lora")
    assert moved.config.name_or_path == str(tmp_path / "moved" / "draft-lora")
