"""`python -m parse --run`: a run folder's models, verifier and settings."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from parse.__main__ import main
from parse.local.loading import load_model
from parse.verifiers import Likelihood
from parse.verifiers.saved import save
from recipes.schema import load_recipe, to_dict
from tests.conftest import MODELS, ROOT, adopt, facts_of
from tests.test_cli import ALONE, QUESTION

# run folders


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project's folder whose run has been trained, with a verifier that accepts all."""
    folder = tmp_path_factory.mktemp("project")
    run = folder / "runs" / "quickstart"
    (folder / "recipes").mkdir()
    (folder / "recipes" / "models").symlink_to(MODELS)
    shutil.copytree(MODELS / "ledger-draft", run / "draft")
    settings = ["engine.max_new_tokens=24", "engine.horizon=6", "engine.target_options={trust_remote_code: true}"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [*settings, "stages=[answers,distill,rollouts,verifier]"])
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    target, tokenizer = load_model(MODELS / "ledger-target"), AutoTokenizer.from_pretrained(MODELS / "ledger-target")
    save(
        run / "verifier",
        Likelihood("mean", "segment", 0.0),
        target,
        facts_of(tokenizer, 2, thresholds=dict.fromkeys(("first_fail", "longest", "whole"), 0.0), horizon=6),
    )
    lora = get_peft_model(load_model(run / "draft"), LoraConfig(r=2, target_modules="all-linear"))
    lora.save_pretrained(str(run / "draft-lora"))
    return folder


def changed(project: Path, folder: Path, change) -> str:
    """A copy of the run, of which something is changed, in a project of its own."""
    shutil.copytree(project, folder / "project", symlinks=True)
    run = folder / "project" / "runs" / "quickstart"
    change(run)
    return str(run)


def with_recipe(**keys: object):
    """A change of keys of a run's recipe; those of the engine's section are merged."""

    def change(run: Path) -> None:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        engine = recipe["engine"] | keys.pop("engine", {})
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"engine": engine} | keys))

    return change


def test_a_run_gives_models_and_settings_from_any_folder(project, capsys, monkeypatch, tmp_path):
    run = str(project / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    assert main([QUESTION, "--run", run, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "note: the run's trust_remote_code is left out: no model's own code is run\n"
    line = json.loads(printed.out)
    assert line["stats"]["draft_tokens"] == 24
    assert line["stats"]["rounds"] == 4  # by the recipe's horizon
    assert len(line["segments"]) == 12  # by the verifier's segmenter
    assert (
        main([QUESTION, "--run", run, "--json", "--max-new-tokens", "30", "--horizon", "none", "--threshold", "0"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["stats"]["rounds"] == 1
    monkeypatch.chdir(project / "runs")
    assert main([QUESTION, "--run", "quickstart", "--method", "draft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == line["text"]


def test_in_a_process_of_its_own_nothing_precedes_the_answer(project, tmp_path):
    run = changed(
        project, tmp_path, with_recipe(stages=["distill", "align", "verifier"], engine={"target_options": {}})
    )
    result = subprocess.run(
        [sys.executable, "-m", "parse", QUESTION, "--run", run, "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    assert json.loads(result.stdout)["stats"]["accepted_tokens"] == 24


@pytest.mark.parametrize(
    ("engine", "words", "segments", "rounds"),
    [
        ({"policy": "whole"}, [], 4, 4),
        ({"policy": "whole"}, ["--policy", "longest"], 12, 4),
        ({"handback": "never"}, ["--threshold", "2"], 4, 1),
        ({"handback": "never"}, ["--threshold", "2", "--handback", "segment", "--segments", "2"], None, 12),
        ({"horizon": "segment"}, ["--threshold", "0"], 12, 12),
    ],
)
def test_settings_of_a_run_and_over_it(project, tmp_path, capsys, engine, words, segments, rounds):
    run = changed(project, tmp_path, with_recipe(engine=engine))
    assert main([QUESTION, "--run", run, "--json", *words]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["stats"]["rounds"] == rounds
    assert segments is None or len(line["segments"]) == segments


def test_a_run_is_asked_for_no_more_than_the_method_needs(project, tmp_path, capsys):
    def change(run: Path) -> None:
        with_recipe(engine={"lookahead": 2})(run)
        shutil.rmtree(run / "verifier")
        shutil.rmtree(run / "draft")

    run = changed(project, tmp_path, change)
    assert main([QUESTION, "--run", run, "--method", "target", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["target_tokens"] == 24
    words = ["--draft", str(MODELS / "ledger-draft"), "--verifier", "likelihood"]
    assert main([QUESTION, "--run", run, *words, "--threshold", "0"]) == 0


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda run: shutil.rmtree(run / "verifier"), ["no verifier/ there", "stage `verifier`", "--verifier"]),
        (lambda run: shutil.rmtree(run / "draft"), ["no draft/ there", "stage `distill`", "--draft"]),
        (
            lambda run: [with_recipe(stages=["align"])(run), shutil.rmtree(run / "draft-lora")],
            ["no draft-lora/ there", "stage `align`"],
        ),
        (lambda run: (run / "draft" / "config.json").unlink(), ["its draft", "no config.json"]),
        (
            lambda run: (run / "verifier" / "verifier.json").write_text("{"),
            ["its verifier", "verifier.json is damaged"],
        ),
        (lambda run: (run / "verifier" / "verifier.json").write_text("[]"), ["verifier.json is damaged"]),
        (lambda run: (run / "verifier" / "verifier.json").write_text("{}"), ["verifier.json is damaged"]),
        (with_recipe(target="models/of/another"), ["its target 'models/of/another'", "give --target a folder"]),
        (with_recipe(target=3), ["recipe.yaml is damaged (target of the wrong type)"]),
        (with_recipe(engine={"draft_options": 3}), ["damaged (engine.draft_options of the wrong type)"]),
        (with_recipe(engine={"policy": 3}), ["policy=3"]),
        (with_recipe(engine={"draft_options": {"nonsense": 1}}), ["quickstart/draft", "'nonsense'"]),
        (with_recipe(engine={"max_new_tokens": "many"}), ["max_new_tokens"]),
        (lambda run: (run / "recipe.yaml").write_text(""), ["recipe.yaml is damaged (no keys and values)"]),
        (lambda run: (run / "recipe.yaml").write_text("- a\n- b\n"), ["recipe.yaml is damaged (no keys and values)"]),
        (lambda run: (run / "recipe.yaml").write_text("a: [1"), ["recipe.yaml is damaged (no valid YAML"]),
        (lambda run: (run / "recipe.yaml").write_text("[" * 5000), ["recipe.yaml is damaged (no valid YAML"]),
        (lambda run: (run / "recipe.yaml").write_text("a: 2020-99-99"), ["recipe.yaml is damaged (no valid YAML"]),
        (lambda run: (run / "recipe.yaml").write_bytes(b"\xff\xfe\x00"), ["recipe.yaml is damaged (no valid YAML"]),
        (lambda run: (run / "recipe.yaml").write_text("target: x"), ["recipe.yaml is damaged (the key 'engine'"]),
        (lambda run: (run / "recipe.yaml").unlink(), ["no recipe.yaml there"]),
    ],
)
def test_a_run_that_is_not_whole_is_named(project, tmp_path, capsys, change, messages):
    run = changed(project, tmp_path, change)
    assert main(["q", "--run", run]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: ")
    for message in messages:
        assert message in printed


def test_a_template_that_refuses_is_a_line(tmp_path, capsys):
    folder = tmp_path / "target"
    shutil.copytree(MODELS / "ledger-target", folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    assert main([QUESTION, "--target", str(folder), "--method", "target"]) == 2
    said = capsys.readouterr().err
    assert "refuses the turns user" in said
    assert "not today" in said
    assert "Traceback" not in said


def test_raw_prompts(capsys):
    assert main(["<|user|> right ? <|end|> <|assistant|>", "--raw", *ALONE]) == 0
    assert capsys.readouterr().out


def test_what_was_calibrated_for_other_settings_is_refused(project, tmp_path, capsys):
    run = changed(project, tmp_path, with_recipe(engine={"horizon": "segment"}))
    assert main([QUESTION, "--run", run]) == 2
    assert "horizon='segment', and the verifier's threshold was calibrated for horizon=6" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["draft/tokenizer.json", "draft/chat_template.jinja", "draft/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_of_a_run_is_named(project, tmp_path, capsys, file, damage):
    def change(run: Path) -> None:
        with_recipe(engine={"target_options": {}})(run)
        recipe = load_recipe(run / "recipe.yaml")
        adopted = replace(recipe, runs=str(tmp_path / "adopted"))
        adopt(adopted, distill=run / "draft", verifier=run / "verifier")
        shutil.rmtree(run)
        shutil.copytree(adopted.folder, run)

    run = changed(project, tmp_path, change)
    assert main([QUESTION, "--run", run, "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    path = Path(run) / file
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-9])
    assert main([QUESTION, "--run", run, "--max-new-tokens", "4"]) == 2
    said = capsys.readouterr().err
    assert f"{file.split('/')[1]} is {'missing' if damage == 'gone' else 'damaged'}; remove the folder" in said
