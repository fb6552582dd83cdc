"""Recipe files that are broken, and commands that refuse: a message that names what was given, and no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from eval.__main__ import main as evaluate
from eval.checks import check_models
from recipes.schema import RecipeError, load_recipe, to_dict
from recipes.strict import dump
from tests.conftest import BASE
from tests.test_schema import FIELDS
from train.__main__ import main

NASTY = [
    *("null", "true", "yes", "0", "-1", "1", "7", "-0.0", "1.5", "1e-400", "1e999", ".nan", ".inf", "-.inf", "0x1F"),
    *("5:50", "017", "1_000", "2026-07-01", "=", "<<", "''", "' '", "x", "'../x'", "/etc/x", "'1e4'", "'08'", "'y'"),
    *("9" * 18, "9" * 19, "-" + "9" * 5000, "x" * 300, "'a: b'", "'#'", r'"\0"', r'"\n"', r'"\u2028"', r'"\ud800"'),
    *("[]", "{}", "[1, 2]", "[x, x]", "[[1]]", "{a: 1}", "{a: 1, a: 2}", "{1: 2}", "{x: {}}", "{'': ''}", "&a [*a]"),
    *("!!set {a}", "!!binary aGk=", "[" * 15 + "]" * 15, "[" * 3000 + "]" * 3000, "{a: " * 15 + "1" + "}" * 15),
    *("sentence", "segment", "target", "[target]", "[align]", "dpo", "logits", "{layers: 2}", "{config: {}}"),
]
SHIPPED = {path.stem: path.read_text() for path in sorted(Path("recipes").glob("*.yaml"))}


def places(content):
    """Every mapping and list in plain data, with each key or index."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def mutate(data, content):
    """Replace, delete, double or add one node; replaced ones are named so that any text can take their place."""
    holder, key = data.draw(st.sampled_from(list(places(content))))
    what = data.draw(st.sampled_from(["replace", "replace", "delete", "double", "add"]))
    if what == "delete":
        del holder[key]
    elif what == "double":
        holder.append(holder[key]) if isinstance(holder, list) else holder.update({f"{key}2": holder[key]})
    elif what == "add" and isinstance(holder, dict):
        holder[data.draw(st.sampled_from(FIELDS))] = f"@{data.draw(st.integers(0, len(NASTY) - 1))}@"
    else:
        holder[key] = f"@{data.draw(st.integers(0, len(NASTY) - 1))}@"


def loads_or_is_refused(path):
    """Whether a recipe is refused in few words, or loads, stays in its folder and loads again as it was written."""
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return len(str(error)) < 1500
    path.write_text(dump(to_dict(recipe)))
    return load_recipe(path) == recipe and recipe.folder.resolve().parent == Path(recipe.runs).resolve()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SHIPPED)))
def test_a_mutated_recipe_loads_or_is_refused(tmp_path, data, name):
    content = yaml.safe_load(SHIPPED[name])
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            mutate(data, content)
    text = yaml.safe_dump(content, width=10**6)
    for number, nasty in enumerate(NASTY):
        text = text.replace(f"'@{number}@'", nasty)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert loads_or_is_refused(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SHIPPED)))
def test_mutated_bytes_load_or_are_refused(tmp_path, data, name):
    content = "".join(line for line in SHIPPED[name].splitlines(keepends=True) if line[0] != "#").encode()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    put = data.draw(
        st.binary(max_size=8) | st.text(max_size=8).map(lambda text: text.encode()) | st.just(content[start:stop] * 2)
    )
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content[:start] + put + content[stop if data.draw(st.booleans()) else start :])
    assert loads_or_is_refused(path)


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
    path.write_text(dump(to_dict(recipe)))
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


@pytest.mark.parametrize("place", range(4))
def test_dry_run_runs_nothing_wherever_it_stands(capsys, tmp_path, place):
    words = ["recipes/quickstart.yaml", f"runs={tmp_path}", "answers"]
    words.insert(place, "--dry-run")
    assert main(words) == 0
    assert "all checks passed; stages: answers;" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["align", "relabel", "pretrain"])
def test_a_stage_that_would_do_nothing_is_refused(capsys, stage):
    chain = "stages=[answers, distill, rollouts, verifier]"
    assert main(["recipes/quickstart.yaml", chain, stage]) == 2
    assert f"error: stage {stage!r}: " in capsys.readouterr().err
    if stage != "align":
        assert main(["recipes/quickstart.yaml", f"stages=[{stage}]"]) == 2
        assert f"error: stage {stage!r}: " in capsys.readouterr().err


def test_the_evaluation_refuses_and_names(capsys):
    assert evaluate(["recipes/quickstart.yaml", "eval.prompts=0"]) == 2
    assert "error: eval.prompts is 0: give a number from 1" in capsys.readouterr().err
    assert evaluate(["recipes/quickstart.yaml", "verifier"]) == 2
    assert "override 'verifier' must read section.key=value" in capsys.readouterr().err


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
