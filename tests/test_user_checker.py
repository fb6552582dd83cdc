"""A user's own checker: found in the working directory, called as documented, refused in words where it is wrong."""

import sys
from itertools import count
from pathlib import Path

import pytest

from eval.judges import Checked
from eval.tasks import content_of_task
from eval.tasks.rows import Rows
from recipes.schema import Data, RecipeError, load_recipe, to_dict
from tests.conftest import ROOT
from train.rollouts import labels_of

NUMBERS = count()  # of modules: each is imported once
PLAIN = """
def check(prompt, answer):
    return prompt.split()[-1] in answer
"""
WITH_REFERENCE = """
import numpy

def check(prompt, answer, reference):
    return numpy.bool_(answer.strip() == reference)
"""
KNOWS = (
    PLAIN
    + """
def first_wrong(prompt, answer):
    return None if "bad" not in answer else 0

def corrupted(prompt, answer, rng):
    return answer + " bad"
"""
)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def write(text):
        name = f"checks_of_mine_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def rows(check, references=False):
    given = [{"prompt": f"Say {word}", **({"reference": [word, word.upper()]} if references else {})} for word in "ab"]
    return Rows(given, to_dict(Data(check=check)), "mine.jsonl")


def test_a_checker_without_references(written):
    task = rows(f"{written(PLAIN)}:check")
    assert task.checks
    assert task.check("Say a", "an a") is True
    assert task.check("Say b", "nothing") is False
    assert task.first_wrong is None
    assert task.corrupted is None


def test_a_checker_with_references_is_given_each_of_them(written):
    task = rows(f"{written(WITH_REFERENCE)}:check", references=True)
    assert task.check("Say a", " A ") is True
    assert task.check("Say a", "b") is False


def test_a_checker_that_knows_the_first_wrong_sentence_gives_labels_that_cost_nothing(written):
    recipe = load_recipe(Path(__file__).parents[1] / "recipes/quickstart.yaml")
    task = rows(f"{written(KNOWS)}:check")
    assert task.first_wrong("Say a", "bad") == 0
    assert task.corrupted("Say a", "a", None) == "a bad"
    assert labels_of(recipe, task, "train") == "checker"
    assert labels_of(recipe, rows(f"{written(PLAIN)}:check"), "train") == "bisect"


def test_another_checker_is_another_task(written, tmp_path):
    name = written(PLAIN)
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {word}"}}\n' for word in "abcdefghij"))
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"task={prompts}", f"data.check={name}:check"])
    before = content_of_task(recipe)
    (tmp_path / f"{name}.py").write_text(PLAIN + "# stricter\n")
    assert content_of_task(recipe) != before


def task_data(name):
    return Data(check=f"{name}:check")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (PLAIN, "nowhere_at_all:check", "there is no module nowhere_at_all in .*start where nowhere_at_all.py lies"),
        (PLAIN, "{}:chek", "has no function 'chek'; it has: check"),
        ("import nothing_like_it", "{}:check", "cannot be imported: No module named 'nothing_like_it'"),
        ("1 / 0", "{}:check", "cannot be imported: ZeroDivisionError: division by zero"),
        ("check = 3", "{}:check", "has no function 'check'; it has: none"),
        ("def check(answer): ...", "{}:check", r"check is called with \(prompt, answer\), and takes \(answer\)"),
        (WITH_REFERENCE, "{}:check", "missing a required argument: 'reference'"),
        (PLAIN + "def first_wrong(p): ...", "{}:check", r"first_wrong is called with \(prompt, answer\)"),
    ],
)
def test_a_checker_that_cannot_be_used_is_refused(written, text, name, message):
    with pytest.raises(ValueError, match=message):
        rows(name.format(written(text)))


def test_an_answer_that_is_neither_true_nor_false_is_refused(written):
    task = rows(f"{written('def check(prompt, answer): return 0.5')}:check")
    with pytest.raises(ValueError, match=r"gives 0.5 \(float\) for the prompt \'Say a\': return True or False"):
        task.check("Say a", "a")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(
        RecipeError, match="data.check is 'contian': give contains, .*or a function of your own as module"
    ):
        load_recipe(Path(__file__).parents[1] / "recipes/quickstart.yaml", ["data.check=contian"])


@pytest.mark.parametrize("said", ["False", "-1", "'0'"])
def test_a_first_wrong_that_is_no_index_is_refused(written, said):
    task = rows(f"{written(PLAIN + f'def first_wrong(prompt, answer): return {said}')}:check")
    with pytest.raises(ValueError, match=rf"first_wrong gives {said} for the prompt 'Say a': return the index"):
        task.first_wrong("Say a", "a")


def test_what_was_thought_is_not_shown_to_the_checker(written):
    """A fault goes into the answer after it; what `check` still calls right is no fault."""
    checked = Checked(rows(f"{written(KNOWS)}:check"))
    assert checked.first_wrong("Say a", "<think>bad</think>\n\na") is None
    assert checked.first_wrong("Say a", "<think>bad") is None
    assert checked.first_wrong("Say a", "<think>fine</think>\n\nbad") == 0
    assert checked.corrupted("Say a", "<think>fine</think>\n\na", None) is None  # it still has an a
    strict = Checked(rows(f"{written(KNOWS.replace('[-1] in answer', '[-1] == answer'))}:check"))
    assert strict.corrupted("Say a", "<think>fine</think>\n\na", None) == "<think>fine</think>\n\na bad"
