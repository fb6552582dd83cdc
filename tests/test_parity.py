"""What training saw against what the engine feeds: each kind of difference is named with its place."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from eval.parity import COUNT, EXAMPLES, compare, save_examples
from eval.tasks import TASKS, draw_prompts
from parse import Engine
from recipes.schema import load_recipe
from tests.conftest import MODELS

ALIKE = "alike in all of 4 prompts"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", compile=False)


@pytest.fixture
def run(engine, tmp_path):
    """A run folder with answers, rollouts, and a draft's examples, as the stages write them; and its recipe."""
    prompts = draw_prompts(TASKS["ledger"], "train", 4, seed=1)
    rows = []
    for prompt in prompts:
        start, answer = engine.encode(prompt), "#1 the fig from rome costs us 4 coins ."
        ids = [*start, *engine.tokenizer.encode(answer, add_special_tokens=False), engine.tokenizer.eos_token_id]
        mask = [0] * len(start) + [1] * (len(ids) - len(start))
        rows.append({"input_ids": ids, "completion_mask": mask, "prompt": prompt, "answer": answer})
    recipe = load_recipe("recipes/quickstart.yaml", [f"runs={tmp_path}"])
    Dataset.from_list(rows).save_to_disk(recipe.folder / "answers")
    labelled = [{"prompt": row["prompt"], "prompt_ids": engine.encode(row["prompt"])} for row in rows]
    Dataset.from_list(labelled).save_to_disk(recipe.rollouts_folder)
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda values, pad: [*values, *[pad] * (width - len(values))]
    batch = {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(
            [
                fill([i if m else -100 for i, m in zip(row["input_ids"], row["completion_mask"], strict=True)], -100)
                for row in rows
            ]
        ),
    }
    (recipe.folder / "draft").mkdir()
    save_examples(recipe.folder / "draft", prompts, [row["answer"] for row in rows], batch)
    return recipe


def texts(engine, recipe):
    return {check.name: check.text for check in compare(engine, recipe)}


def test_alike_where_nothing_changed(engine, run):
    assert set(texts(engine, run).values()) == {ALIKE}
    assert len(json.loads((run.folder / "draft" / EXAMPLES).read_text())) == 4 <= COUNT


def changed(run, change):
    file = run.folder / "draft" / EXAMPLES
    rows = json.loads(file.read_text())
    change(rows[1])
    file.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda row: row["input_ids"].__setitem__(2, 5), "draft's prompt", "token 2 was"),
        (lambda row: row.update(prompt=row["prompt"] + " ."), "draft's prompt", "in training and is '.'"),
        (lambda row: row["learnt"].__setitem__(-1, False), "draft learns the end", "False in training, True expected"),
        (lambda row: row["learnt"].__setitem__(-4, False), "draft's answer", "in training, '#1 the fig from rome"),
        (lambda row: row["input_ids"].__setitem__(-1, 5), "draft's end", "token 5 ended the answer in training, the"),
    ],
)
def test_what_differs_is_named(engine, run, change, name, words):
    changed(run, change)
    found = texts(engine, run)
    assert found[name].startswith("differs in 1 of 4 prompts; in number 2 ")
    assert words in found[name]


def test_another_way_of_writing_prompts_is_named(engine, run):
    """As a chat template that writes the date: the target's prompts differ, and the verifier's."""
    ids = engine.encode
    engine.encode = lambda prompt: [*ids(prompt), 7]
    try:
        found = texts(engine, run)
    finally:
        del engine.encode
    for name in ("target's prompt", "verifier's prompt", "draft's prompt"):
        assert found[name].startswith("differs in 4 of 4 prompts; in number 1 token ")
        assert "was the end in training" in found[name]
    assert found["target's end"] == ALIKE


def test_another_draft_is_not_compared_with_what_the_runs_own_learnt(engine, run, tmp_path):
    other = replace(run, eval=replace(run.eval, draft=str(tmp_path)))
    assert texts(engine, other)["draft's prompt"] == "not compared: training left no record"
    assert texts(engine, other)["target's prompt"] == ALIKE


def test_what_was_not_recorded_is_not_compared(engine, run):
    shutil.rmtree(run.folder)
    assert set(texts(engine, run).values()) == {"not compared: training left no record"}
