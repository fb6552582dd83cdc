"""The recipe for one's own domain, on a real chat model, with a handful of prompts."""

import json

import pytest
from datasets import load_from_disk

from eval.__main__ import main as evaluate
from eval.judges import Agreement, AskedTarget
from eval.measure import summarize
from eval.methods import compare
from eval.tasks import TASKS, draw_prompts
from eval.tasks.__main__ import main as write_rows
from eval.tasks.rows import Rows
from parse import Engine
from recipes.schema import Data, load_recipe, to_dict
from tests.conftest import MODELS
from train.__main__ import main as train

RECIPE = "recipes/custom_domain.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("smollm")
def test_a_domain_of_ones_own_from_prompts_to_evaluation(tmp_path, capsys):
    task = tmp_path / "restaurants.jsonl"
    assert write_rows(["restaurants", str(task), "--rows", "60"]) == 0
    few = ["answers.prompts=6", "rollouts.train=4", "rollouts.calibration=3", "rollouts.test=2", "rollouts.recheck=1"]
    few += ["distill.trainer={max_steps: 2, per_device_train_batch_size: 2}", "verifier.probe.epochs=2"]
    few += ["verifier.folded.tries=1", "verifier.folded.epochs=2"]
    few += ["rollouts.drafts=2", "rollouts.negatives=1"]
    few += ["eval.prompts=1", "eval.warmup=0", "eval.sweep_prompts=0", "engine.compile=false"]
    words = [RECIPE, f"task={task}", f"runs={tmp_path}", *few]
    assert train(words) == 0
    recipe = load_recipe(RECIPE, words[1:])
    labels = json.loads((recipe.rollouts_folder / "labels.json").read_text())
    assert {*labels["labels"].values()} == {"checker"}
    assert len(labels["noise_levels"]) == 1
    rows = load_from_disk(recipe.rollouts_folder)
    assert any(not row["met"] for row in rows)
    assert any(all(row["valid"]) for row in rows if row["split"] != "train")  # into which a fault could have been put
    assert all(row["met"] for row in rows if row["split"] != "train")
    assert evaluate(words) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"] for row in summary["methods"]} >= {"target", "parse"}
    assert summary["pair"]["draft_layers"] == 4


@pytest.mark.slow
def test_without_references_the_target_says_what_is_right():
    """Its own answer is; so is what it calls the same, and what was cut off is not."""
    task = Rows([{"prompt": prompt} for prompt in draw_prompts(TASKS["ledger"], "test", 3, seed=2)], to_dict(Data()))
    prompts = [prompt for some in task.by_split.values() for prompt in some]
    engine = Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", compile=False)
    methods = {
        "target": {"method": "target"},
        "cut": {"method": "target", "max_new_tokens": 9},
        "draft": {"method": "draft", "max_new_tokens": 200},
    }
    asked = AskedTarget(engine)
    agreements = [Agreement(engine, 0, asked, threshold) for threshold in (0.0, 1.1)]
    everything, nothing = (compare(engine, task, prompts, methods, 0, agreement=one) for one in agreements)
    for outcomes in (everything, nothing):
        assert all(outcome.right for outcome in outcomes["target"])
        assert not any(outcome.right for outcome in outcomes["cut"])
        row = summarize("draft", outcomes["draft"], outcomes["target"], task)
        assert row["false_accept_rate"] is None  # nobody knows which of its sentences are right
    finished = [outcome.generation.finish_reason == "stop" for outcome in everything["draft"]]
    assert [outcome.right for outcome in everything["draft"]] == finished
    assert not any(outcome.right for outcome in nothing["draft"])
