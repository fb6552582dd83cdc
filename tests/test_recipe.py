"""Recipes are strict: what cannot be run is refused at once, with its name and the remedy."""

import copy
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from parse.models import load_model
from train.__main__ import main
from train.checks import check_models
from train.recipe import Recipe, RecipeError, load_recipe, to_dict

BASE = {"name": "x", "target": "t", "draft": "d", "task": "ledger"}


@pytest.fixture
def write(tmp_path):
    def _write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}))
        return path

    return _write


def test_every_shipped_recipe_loads():
    from tests.conftest import ROOT

    for path in (ROOT / "recipes").glob("*.yaml"):
        assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tresholds": 1}, "unknown key 'tresholds' in the recipe"),
        ({"rollouts": {"trian": 3}}, "unknown key 'trian' in section 'rollouts'; did you mean 'train'"),
        ({"rollouts": {"train": "many"}}, r"rollouts.train must be int, and is 'many' \(str\)"),
        ({"rollouts": {"train": True}}, "rollouts.train must be int"),
        ({"rollouts": {"train": 0}}, "rollouts.train is 0: give a positive number"),
        ({"segments": 1.5}, "segments must be str or int"),
        ({"eval": {"methods": ["target", "pares"]}}, "eval.methods names 'pares'; did you mean 'parse'"),
        ({"eval": {"methods": ["parse"]}}, "eval.methods lacks 'target'"),
        ({"verifier": {"max_accuracy_loss": 2}}, "max_accuracy_loss is 2.0: give a fraction"),
        ({"verifier": ["probe"]}, "section 'verifier' must hold keys and values"),
        (
            {"verifier": {"probe": {"layer": [3]}}},
            "unknown key 'layer' in section 'verifier.probe'; did you mean 'layers'",
        ),
        ({"verifier": {"adapter": {"suffix": 0}}}, "verifier.adapter.suffix is 0: give a positive number"),
        ({"rollouts": {"labels": "bisection"}}, "rollouts.labels names 'bisection'; did you mean 'bisect'"),
        ({"rollouts": {"labeller": "judge"}}, "rollouts.labeller names 'judge'"),
        ({"logging": {"wandb": "on"}}, "logging.wandb names 'on' Allowed: online, offline"),
        ({"stages": ["answer"]}, "stages names 'answer'; did you mean 'answers'"),
        ({"engine": {"policy": "first"}}, "engine.policy names 'first'"),
        ({"engine": {"target_options": {"tp_plan": "auto"}}}, "target_options holds tp_plan, .* use {device_map"),
        ({"pretrain": {"target": {"output": "o"}}}, "lacks the key 'speaker'"),
    ],
)
def test_what_cannot_be_run_is_named(write, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(**changes))


def test_pickled_weights_are_refused(tmp_path, target):
    target.save_pretrained(tmp_path / "m")
    recipe = Recipe(**{**BASE, "target": str(tmp_path / "m"), "draft": str(tmp_path / "m")})
    check_models(recipe)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"target: .* holds pickled weights \(pytorch_model.bin\).*save_pretrained"):
        check_models(recipe)
    with pytest.raises(ValueError, match="loading a pickle runs whatever code is in it"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": {"probe": {"layers": [4]}}}, r"probe.layers is \[4\]: the target has hidden states 0 .* to 3"),
        ({"verifier": {"probe": {"layers": []}}}, r"probe.layers is \[\]"),
        ({"verifier": {"kind": "prompt"}}, "verifier.kind asks the target in words: .*no chat template"),
        ({"rollouts": {"labeller": "agreement"}}, "rollouts.labeller asks the target in words: .*no chat template"),
        ({"engine": {"target_options": {"revision": "v2"}}}, "target_options holds revision, .* name the folder"),
    ],
)
def test_what_the_target_cannot_give_is_refused_before_any_work(write, tmp_path, target, tokenizer, changes, message):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for part in (target, plain):
        part.save_pretrained(tmp_path / "m")
    folders = {"target": str(tmp_path / "m"), "draft": str(tmp_path / "m")}
    check_models(load_recipe(write(**folders)))
    with pytest.raises(RecipeError, match=message):
        check_models(load_recipe(write(**folders, **changes)))


def test_missing_keys_files_and_broken_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="is not there; recipes found: recipes/custom_domain.yaml"):
        load_recipe(path)
    path.write_text("name: x\n")
    with pytest.raises(RecipeError, match="lacks the key 'target'"):
        load_recipe(path)
    path.write_text("name: [x\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(path)
    path.write_text("- x\n")
    with pytest.raises(RecipeError, match="must hold keys and values"):
        load_recipe(path)


def test_overrides(write):
    recipe = load_recipe(write(), ["rollouts.train=7", "engine.horizon=segment", "distill.trainer.max_steps=5"])
    assert recipe.rollouts.train == 7
    assert recipe.engine.horizon == "segment"
    assert recipe.distill.trainer == {"max_steps": 5}
    with pytest.raises(RecipeError, match=r"must read section.key=value"):
        load_recipe(write(), ["rollouts.train"])
    with pytest.raises(RecipeError, match="'name' is a value"):
        load_recipe(write(), ["name.x=1"])
    with pytest.raises(RecipeError, match="unknown key 'trainer'"):
        load_recipe(write(), ["rollouts.trainer=1"])


@given(
    train=st.integers(1, 10**6),
    loss=st.floats(0.0001, 0.99),
    horizon=st.none() | st.integers(1, 999),
    segments=st.sampled_from(["sentence", "line"]) | st.integers(1, 99),
)
def test_a_resolved_recipe_loads_to_itself(tmp_path_factory, train, loss, horizon, segments):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    content = {
        **BASE,
        "segments": segments,
        "rollouts": {"train": train},
        "verifier": {"max_accuracy_loss": loss},
        "engine": {"horizon": horizon},
    }
    path.write_text(yaml.safe_dump(content))
    recipe = load_recipe(path)
    path.write_text(yaml.safe_dump(to_dict(recipe)))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("mamba", {}, "recurrent state"),
        ("t5", {}, "encoder-decoder"),
        ("openai-gpt", {}, "no key-value cache"),
        ("vit", {}, "not a causal language model"),
        ("bloom", {}, "takes no positions"),
        ("falcon", {"alibi": True}, "takes no positions"),
        ("llama4_text", {}, "layers of type chunked_attention"),
        ("gpt_neo", {}, "by their places in the cache, not by their positions"),
        ("minimax_m3_vl_text", {}, "by their places in the cache, not by their positions"),
    ],
)
def test_a_draft_that_cannot_be_rolled_back_is_refused(write, tmp_path, kind, options, reason):
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "target")
    AutoConfig.for_model(kind, **options).save_pretrained(tmp_path / "draft")
    recipe = load_recipe(write(target=str(tmp_path / "target"), draft=str(tmp_path / "draft")))
    with pytest.raises(RecipeError, match=f"draft: .*{reason}"):
        check_models(recipe)


def test_a_model_that_is_not_there(write, tmp_path):
    with pytest.raises(RecipeError, match="target: ./nowhere is not a folder here"):
        check_models(load_recipe(write(target="./nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="cannot be read as a model"):
        check_models(load_recipe(write(target=str(tmp_path / "empty"))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verifier.kind=prob"], "verifier.kind names 'prob'; did you mean 'probe'"),
        (["verify"], "unknown stage 'verify'"),
        (["distill.trainer.learning_rates=1"], "did you mean 'learning_rate'"),
        (["draft=./nowhere"], "draft: ./nowhere"),
    ],
)
def test_the_command_refuses_and_names(capsys, words, message):
    assert main(["recipes/quickstart.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_runs_nothing(capsys, tmp_path):
    assert main(["recipes/quickstart.yaml", f"runs={tmp_path}", "--dry-run"]) == 0
    assert "all checks passed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_a_message_and_no_traceback():
    command = [sys.executable, "-m", "train", "recipes/quickstart.yaml", "rollout.train=3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "did you mean 'rollouts'" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_distribution_called_parse_is_noticed(tmp_path):
    (tmp_path / "parse.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import train"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another distribution is called parse" in result.stderr.replace("\n", " ")
