"""What the README names is there: files, commands, recipe keys; and the project speaks of itself alone."""

import re
import subprocess

import pytest

from tests.conftest import ROOT
from train.recipe import load_recipe

README = (ROOT / "README.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", README) + re.findall(r"^    (.+)$", README, re.M)
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
    modules = [f for f in tracked() if f.endswith(".py") and f.split("/")[0] in ("parse", "train", "eval")]
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


def test_the_project_speaks_of_itself_alone():
    words = ["/wo" + "rk/", "lib" + "rary/search", "farm" + "-", "this ses" + "sion", "shared/" + "DESIGN"]
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".safetensors",) or not path.is_file():
            continue
        content = path.read_text(errors="ignore")
        assert not [word for word in words if word in content], name
