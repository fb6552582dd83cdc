"""What README and guides name is there: files, links, commands, recipe keys; and the project speaks of itself alone."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from eval.tasks import ledger
from parse import Engine
from parse.__main__ import main
from recipes import reference
from recipes.schema import load_recipe
from tests.conftest import MODELS, ROOT

README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
ALL = "\n".join(PAGES.values())
CODE = re.findall(r"`([^`\n]+)`", ALL) + re.findall(r"^    (.+)$", ALL, re.M)
SNIPPET = re.search(r"```python\n(.*?)```", README, re.S)[1]
SHIPPED = {"draft-lora": str(MODELS / "ledger-draft"), "verifier": "prompt"}  # in place of what the quickstart makes
BLOCKS = "\n".join(re.findall(r"```(?:bash|python|yaml|text)?\n(.*?)```", ALL, re.S))


def tracked():
    return subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()


def test_every_file_that_is_named_is_there():
    named = set()
    for text in [*CODE, BLOCKS]:
        named |= set(re.findall(r"\b(?:parse|train|eval|recipes|tests|docs)/[\w./-]*\w", text))
    made = {"docs/results", "eval/summary.json", "eval/summary.csv", "eval/report.html", "eval/transcripts.jsonl"}
    missing = {name for name in named if not (ROOT / name).exists()} - made
    assert named
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_a_newcomer_reads_the_readme_to_its_end():
    assert len(README.split()) <= 1300


def test_every_guide_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(page.removeprefix("docs/") in menu for page in PAGES if page.startswith("docs/"))


def test_the_recipe_reference_is_that_of_the_schema():
    assert reference.PAGE.read_text() == reference.page(), "run `python -m recipes.reference`"
    assert "| `verifier.max_accuracy_loss` | a number from 1e-06 to 0.999 | `0.01` |" in reference.page()


@pytest.mark.slow
def test_a_wheel_answers_without_the_sources(tmp_path):
    python = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for name in filter(lambda name: not name.startswith(("tests/", "docs/")), tracked()):  # a build leaves files behind
        copy = tmp_path / "sources" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    sources = tmp_path / "sources"
    subprocess.run([*python, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sources], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*python, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel], check=True)
    code = (
        "import parse, recipes, eval, train; from pathlib import Path; from parse import Engine;"
        f"assert parse.__file__.startswith({str(tmp_path)!r});"
        "assert Path(parse.__file__).with_name('py.typed').exists();"
        f"print(Engine.from_pretrained({str(MODELS / 'ledger-target')!r}, compile=False)"
        ".generate('list : #1 fig rome 4 .', 8, method='target')[0].text)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()


def test_every_make_target_is_there():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for words in CODE for name in re.findall(r"^make ([a-z0-9-]+)", words)}
    assert {"quickstart", "test"} <= named <= targets


@pytest.mark.parametrize("command", re.findall(r"-m (?:train|eval) (recipes/\S+[^\n`]*)", ALL))
def test_every_recipe_command_would_run(command):
    words = shlex.split(command, comments=True)
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
    for block in re.findall(r"```json\n(.*?)```", ALL, re.S):
        for line in block.splitlines():
            assert {"prompt", "reference"} <= json.loads(line).keys()


@pytest.mark.parametrize(
    "override",
    sorted(
        {
            word
            for word in (word.strip("'") for word in CODE)
            if re.match(r"(answers|draft|distill|rollouts)[\w.]*=", word)
        }
    ),
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
