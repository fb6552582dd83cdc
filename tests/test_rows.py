"""Prompts of one's own: what rows may hold, to which split they belong, how answers are compared."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.tasks import draw_prompts, load_task
from eval.tasks.rows import Rows
from train.recipe import Data, to_dict

SETTINGS = to_dict(Data())
ROW = {"prompt": "What is the capital of Peru?", "reference": "Lima"}


def rows(*some, **settings):
    return Rows(some, SETTINGS | settings)


def all_of(task):
    return [prompt for split in task.prompts for prompt in task.prompts[split]]


def test_a_prompt_is_text_or_messages():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert all_of(rows({"prompt": "a"})) == ["a"]
    assert all_of(rows({"messages": turns})) == [turns]
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert all_of(rows({"prompt": "a", "system": "Be brief."})) == [told]
    assert all_of(rows({"prompt": "a"}, system="Be brief.")) == [told]
    assert all_of(rows({"messages": told}, system="Be long.")) == [told]


def test_fields_may_have_other_names():
    task = rows({"question": "a", "answer": "b"}, fields={"prompt": "question", "reference": "answer"})
    assert all_of(task) == ["a"]
    assert task.check("a", "it is b")


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([], "holds no row"),
        ([{}], "row 1 must hold `prompt` or `messages`, one of them; it holds nothing"),
        ([ROW | {"messages": []}], "one of them"),
        ([{"prompt": 3}], "`prompt` must be text, and is int"),
        ([{"prompt": " "}], "the prompt is empty"),
        ([{"messages": ["a"]}], "list of objects with `role` and `content`"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "ends with the assistant's turn"),
        ([ROW | {"split": "dev"}], "split is 'dev'; allowed: answers, train, calibration, test"),
        (
            [{"prompt": "a b", "split": "train"}, {"prompt": "A  b", "split": "test"}],
            "the same prompt is in the",
        ),
        ([ROW, {"prompt": "b"}], "1 of 2 rows have a `reference`"),
    ],
)
def test_bad_rows_are_refused(some, message):
    with pytest.raises(ValueError, match=message):
        rows(*some)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=30))
def test_every_prompt_is_in_one_split_once(texts):
    task = rows(*({"prompt": text} for text in [*texts, *(f" {text.upper()} " for text in texts)]))
    found = [" ".join(text.casefold().split()) for text in all_of(task)]
    assert len(set(found)) == len(found)
    assert set(found) == {" ".join(text.casefold().split()) for text in [*texts, *map(str.upper, texts)]}


def test_shares_decide_how_many_a_split_gets():
    task = rows(*({"prompt": f"number {i}"} for i in range(2000)), shares={"answers": 1, "test": 3})
    assert len(task.prompts["answers"]) == pytest.approx(500, abs=80)
    assert len(task.prompts["test"]) == 2000 - len(task.prompts["answers"])


def test_prompts_are_drawn_by_seed_and_no_more_than_there_are():
    task = rows(*({"prompt": str(i), "split": "test"} for i in range(20)))
    assert draw_prompts(task, "test", 30, seed=1) == draw_prompts(task, "test", 20, seed=1)
    assert draw_prompts(task, "test", 5, seed=1) == draw_prompts(task, "test", 20, seed=1)[:5]
    assert draw_prompts(task, "test", 20, seed=1) != draw_prompts(task, "test", 20, seed=2)
    assert draw_prompts(task, "train", 5, seed=1) == []


def test_max_rows_counts_prompts():
    assert len(all_of(rows(*({"prompt": str(i)} for i in (1, 1, 2, 3)), max_rows=2))) == 2


@pytest.mark.parametrize(
    ("check", "reference", "right", "wrong"),
    [
        ("contains", "Lima", "It is  LIMA.", "It is Limassol."),
        ("equal", "a  B", " A b ", "a b c"),
        ("number", "He pays 12. #### 1,200", "so 3 and 4 make 1200.0", "1200 in 3 years"),
        ("math", "$\\frac{1}{2}$", "so it is $0.5$", "so it is $0.25$"),
    ],
)
def test_answers_are_compared_with_references(check, reference, right, wrong):
    task = rows({"prompt": "a", "reference": reference}, check=check)
    assert task.checks
    assert task.check("a", right)
    assert not task.check("a", wrong)


def test_a_file_is_read_and_its_errors_name_the_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "prompt": "Näxt?"}) + "\n")
    task = load_task(str(file), SETTINGS)
    assert sorted(all_of(task)) == ["Näxt?", ROW["prompt"]]
    file.write_text("{}\n{'a'}\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        load_task(str(file), SETTINGS)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is list: write one object a line"):
        load_task(str(file), SETTINGS)
    with pytest.raises(ValueError, match="is not there"):
        load_task("nowhere.jsonl", SETTINGS)
    with pytest.raises(ValueError, match="task 'ledgr' is not known; tasks: ledger"):
        load_task("ledgr", SETTINGS)


def test_the_hub_is_read_by_its_library(tmp_path, monkeypatch):
    """Where a folder of that name is there, `datasets` reads it as it does the hub's."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(tmp_path)
    assert all_of(load_task("org/name", SETTINGS)) == [ROW["prompt"]]
