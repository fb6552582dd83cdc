"""What the README names is there: files, commands, recipe keys; and the project speaks of itself alone."""

import dataclasses
import json
import re
import shlex
import subprocess

import pytest

from eval.tasks import ledger
from parse import Engine
from parse.__main__ import main
from recipes.schema import Recipe, load_recipe
from tests.conftest import MODELS, ROOT

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", README) + re.findall(r"^    (.+)$", README, re.M)
SNIPPET = re.search(r"```python\n(.*?)```", README, re.S)[1]
SHIPPED = {"draft-lora": str(MODELS / "ledger-draft"), "verifier": "prompt"}  # in place of what the quickstart makes
BLOCKS = "\n".join(re.findall(r"```(?:bash|python|yaml|text)?\n(.*?)```", README, re.S))


def tracked():
    return subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()


def test_every_file_that_is_named_is_there():
    named = set()
    for text in [*CODE, BLOCKS]:
        named |= set(re.findall(r"\b(?:parse|train|eval|recipes|tests)/[\w./-]*\w", text))
    made = {"eval/summary.json", "eval/report.html", "eval/transcripts.jsonl"}
    missing = {name for name in named if not (ROOT / name).exists()} - made
    assert named
    assert not missing


def test_the_file_tree_lists_every_module():
    tree = README.split("## File tree")[1]
    modules = [f for f in tracked() if f.endswith(".py") and f.split("/")[0] in ("parse", "recipes", "eval", "train")]
    absent = [f for f in modules if not f.endswith("__init__.py") and f.split("/")[-1] not in tree]
    assert not absent


def test_every_make_target_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"quickstart", "test"} <= named <= targets


@pytest.mark.parametrize("command", re.findall(r"-m (?:train|eval) (recipes/\S+[^\n`]*)", README))
def test_every_recipe_command_would_run(command):
    words = command.split("#")[0].split()
    load_recipe(words[0], [w for w in words[1:] if "=" in w])


def test_the_python_snippet_runs_and_its_answer_is_right(capsys):
    snippet = SNIPPET
    for made, shipped in SHIPPED.items():
        assert f"runs/quickstart/{made}" in snippet
        snippet = snippet.replace(f"runs/quickstart/{made}", shipped)
    names = {}
    exec(snippet, names)
    prompt, result = names["prompt"], names["result"]
    assert ledger.check(prompt, result.text)
    assert capsys.readouterr().out.startswith(f"{result.text} {result.stats.accepted_tokens} ")
    assert len(ledger.read_prompt(prompt)) in ledger.SIZES  # else no model of the pair has learnt to answer
    target = Engine.from_pretrained(MODELS / "ledger-target", compile=False)
    assert ledger.check(prompt, target.generate(prompt, method="target")[0].text)


def test_the_question_of_the_terminal_is_answered_rightly(capsys):
    (command,) = re.findall(r'-m parse (".+)', README)
    prompt, *options = shlex.split(command)
    assert options == ["--run", "runs/quickstart"]
    assert len(ledger.read_prompt(prompt)) in ledger.SIZES
    assert main([prompt, "--target", str(MODELS / "ledger-target"), "--method", "target", "--json"]) == 0
    assert ledger.check(prompt, json.loads(capsys.readouterr().out)["text"])


def test_every_row_that_is_shown_is_a_row():
    for block in re.findall(r"```json\n(.*?)```", README, re.S):
        for line in block.splitlines():
            assert {"prompt", "reference"} <= json.loads(line).keys()


def test_every_section_of_a_recipe_is_in_the_table():
    rows = re.findall(r"^\| (`[^|]+`) \|", README.split("## What is in a recipe")[1], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in dataclasses.fields(Recipe)} - {"name", "seed", "runs", "pretrain"}


@pytest.mark.parametrize(
    "override", [word for word in CODE if re.match(r"(answers|draft|distill|rollouts)[\w.]*=", word)]
)
def test_every_override_that_is_shown_is_accepted(override):
    load_recipe("recipes/custom_domain.yaml", [override])


def test_the_project_speaks_of_itself_alone():
    words = ["/wo" + "rk/", "lib" + "rary/search", "farm" + "-", "this ses" + "sion", "shared/" + "DESIGN"]
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".safetensors",) or not path.is_file():
            continue
        content = path.read_text(errors="ignore")
        assert not [word for word in words if word in content], name
