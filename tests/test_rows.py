"""Prompts of one's own: what rows may hold, to which split they belong, how answers are compared."""

import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from eval.tasks import draw_prompts, load_task
from eval.tasks.rows import Rows, key_of, load_rows
from recipes.schema import Data, to_dict

SETTINGS = to_dict(Data())
ROW = {"prompt": "What is the capital of Peru?", "reference": "Lima"}


def rows(*some, **settings):
    return Rows(some, SETTINGS | settings)


def all_of(task):
    return [prompt for split in task.by_split for prompt in task.by_split[split]]


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
        ([{"prompt": [{"role": "user", "content": "a"}]}], "name a list of turns `messages`"),
        ([{"prompt": "a\ud800"}], "row 1: `prompt` holds half a character"),
        ([{"prompt": "a", "system": "\udfff"}], "`system` holds half a character"),
        ([{"prompt": "a", "split": ""}], "split is ''; allowed"),
        ([{"prompt": "a", "split": 0}], "split is 0; allowed"),
        (
            [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"}],
            "keep one",
        ),
        ([{"prompt": "a", "system": 3}], "`system` must be text, and is int 3"),
        ([{"messages": []}], "`messages` must be a list of one turn or more, and is list"),
        ([{"messages": "a"}], "`messages` must be a list of one turn or more, and is str 'a'"),
        ([{"messages": {"role": "user"}}], "`messages` must be a list of one turn or more, and is dict"),
        ([{"messages": ["a"]}], "turn 1 is str 'a': messages are objects with `role` and `content`"),
        ([{"messages": [{"content": "a"}]}], "turn 1: `role` is null; allowed: system, developer, user"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "`role` is str 'bot'; allowed"),
        ([{"messages": [{"role": ["user"], "content": "a"}]}], "`role` is list .*; allowed"),
        ([{"messages": [{"role": "user"}]}], "turn 1: `content` must be text, and is null"),
        ([{"messages": [{"role": "user", "content": 3}]}], "turn 1: `content` must be text, and is int 3"),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], "turn 1: `content` holds half a character"),
        ([{"messages": [{"role": "user", "content": " "}]}], "the prompt is empty"),
        ([{"messages": [{"role": "user", "content": []}]}], "the prompt is empty"),
        ([{"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}], "is str 'image'; only"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "a part of `content` is str 'a'; only"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "a part of `content` must be text"),
        (
            [
                {
                    "messages": [
                        {"role": "assistant", "content": None, "tool_calls": [{}]},
                        {"role": "tool", "content": "a"},
                    ]
                }
            ],
            "turn 1 calls a tool, which is not supported",
        ),
        ([{"messages": [{"role": "system", "content": "a"}]}], "ends with the system's turn"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "ends with the assistant's turn"),
        ([ROW | {"split": ["train"]}], r"split is \['train'\]; allowed"),
        ([ROW | {"split": 1}], "split is 1; allowed"),
        ([ROW | {"split": "dev"}], "split is 'dev'; allowed: answers, train, calibration, test"),
        (
            [{"prompt": "a b", "split": "train"}, {"prompt": "A  b", "split": "test"}],
            "the same prompt is in the",
        ),
        ([ROW, ROW | {"split": "train"}, ROW | {"split": "test"}], "the same prompt is in the splits"),
        ([ROW, {"prompt": "b"}], "1 of 2 rows have a `reference`"),
        (
            [ROW, None, ROW | {"reference": "Cuzco"}],
            "row 3: the same prompt has the reference 'Lima' in an earlier row",
        ),
        ([ROW, ROW | {"reference": ["Lima", "Cuzco"]}], "'Lima' in an earlier row, and 'Lima' or 'Cuzco' here"),
        ([ROW, {"prompt": ROW["prompt"]}], "and none here"),
        ([ROW, ROW | {"prompt": "b", "reference": ""}], "row 2: `reference` is blank, and every answer would be right"),
        ([ROW | {"reference": " \u200b\n"}], "row 1: `reference` is blank"),
        ([ROW | {"reference": []}], "`reference` is an empty list"),
        ([ROW | {"reference": ["Lima", ""]}], "`reference` is blank"),
        ([ROW | {"reference": ["Lima", None]}], "`reference` is null: write it as text"),
        ([ROW | {"reference": True}], "`reference` is bool True: write it as text"),
        ([ROW | {"reference": {"a": 1}}], "`reference` is dict .*: write it as text"),
        ([ROW | {"reference": [["Lima"]]}], "`reference` is list .*: write it as text"),
        ([ROW | {"reference": float("nan")}], "`reference` is float nan"),
        ([ROW | {"reference": "a\ud800"}], "`reference` holds half a character"),
    ],
)
def test_bad_rows_are_refused(some, message):
    with pytest.raises(ValueError, match=message):
        rows(*some)


@pytest.mark.parametrize(("check", "message"), [("number", "holds no number"), ("math", "finds no formula")])
def test_a_reference_that_the_check_cannot_use_is_refused(check, message):
    with pytest.raises(ValueError, match=f"row 2: `reference` is '-', .*{message}"):
        rows({"prompt": "a", "reference": "3"}, {"prompt": "b", "reference": "-"}, check=check)


@pytest.mark.parametrize("shares", [{"train": 0, "test": 0}, {"train": -1, "test": 2}, {}])
def test_shares_that_share_nothing_out_are_refused(shares):
    with pytest.raises(ValueError, match="data.shares is .*: give shares of 0 or more"):
        rows(ROW, shares=shares)


@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=30))
def test_prompts_with_the_same_words_are_in_one_split_and_the_same_prompt_is_there_once(texts):
    task = rows(*({"prompt": text} for text in [*texts, *(f"\n{text.upper()} " for text in texts), *texts]))
    assert sorted(all_of(task)) == sorted({*texts, *(f"\n{text.upper()} " for text in texts)})
    assert task.duplicates == 3 * len(texts) - len(all_of(task))
    splits = [{" ".join(text.casefold().split()) for text in prompts} for prompts in task.by_split.values()]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_prompts_that_differ_in_case_or_indentation_are_two_with_references_of_their_own():
    code = "def f():\n  x = 1\n  print(X)", "def f():\n  x = 1\nprint(x)", "Def f():\n  x = 1\n  print(x)"
    task = rows(*({"prompt": text, "reference": str(i)} for i, text in enumerate(code)))
    assert sorted(all_of(task)) == sorted(code)
    assert task.duplicates == 0
    assert [task.check(text, str(i)) for i, text in enumerate(code)] == [True, True, True]


@pytest.mark.parametrize("texts", [("a\n  B", "A b"), ("\u00c9t\u00e9", "e\u0301TE\u0301"), ("stra\u00dfe", "STRASSE")])
def test_conversations_with_the_same_words_are_in_one_split(texts):
    for system in (None, "Be brief."):
        for i in range(20):
            some = [{"prompt": f"{text} {i}"} if system else {"messages": turns_of(f"{text} {i}")} for text in texts]
            task = rows(*some, system=system)
            assert sorted(len(prompts) for prompts in task.by_split.values()) == [0, 0, 0, 2]


def turns_of(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}, {"role": "user", "content": text}]


def test_a_reference_may_be_a_list_or_a_number():
    task = rows({"prompt": "a", "reference": ["Lima", "Ciudad de los Reyes"]}, {"prompt": "b", "reference": ["Oslo"]})
    assert task.check("a", "It is Lima.")
    assert task.check("a", "ciudad de los reyes")
    assert not task.check("a", "Oslo")
    assert not task.check("b", "Lima")
    for number, answer in ((5, "5"), (5.0, "5"), (0.5, "0.5"), (12345678901234567890, "12345678901234567890")):
        for check in ("contains", "equal", "number", "math"):
            assert rows({"prompt": "a", "reference": number}, check=check).check("a", answer)
    numbers = rows({"prompt": "a", "reference": [3, "4"]}, check="number")
    assert [numbers.check("a", answer) for answer in ("so 3", "so 4.0", "so 34")] == [True, True, False]
    same = {"prompt": "a", "reference": ["x", "y"]}, {"prompt": "a", "reference": ["y", "x"]}
    assert rows(*same).duplicates == 1


def test_content_may_be_given_in_parts():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
    ]
    told = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]
    assert all_of(rows({"messages": turns}, system="Be long.")) == [told]


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "b", "name": "Ada"}]},
        {"messages": [{"content": [{"type": "text", "text": "b"}], "role": "user", "tool_calls": None}]},
        {"prompt": "b", "system": "Be brief."},
    ],
)
def test_prompts_of_one_task_have_one_type(other):
    some = [{"prompt": "a", "reference": "1"}, other | {"reference": "2"}, {"prompt": "c", "reference": "3"}]
    task = rows(*some)
    prompts = sorted(all_of(task), key=lambda turns: turns[-1]["content"])
    assert prompts[0] == [{"role": "user", "content": "a"}]
    assert [turn.keys() for turns in prompts for turn in turns] == [{"role", "content"}] * sum(map(len, prompts))
    assert Dataset.from_list([{"prompt": prompt} for prompt in prompts])["prompt"][0] == prompts[0]
    assert [task.check(prompt, f"so {i}") for i, prompt in enumerate(prompts, 1)] == [True, True, True]
    assert set(task.references) == set(map(key_of, prompts))


def test_text_and_a_conversation_that_are_the_same_prompt_are_one():
    task = rows({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]})
    assert all_of(task) == ["a"]
    assert task.duplicates == 1
    assert all(isinstance(prompt, str) for prompt in all_of(rows({"prompt": "a"}, {"prompt": "b", "system": ""})))


def test_shares_decide_how_many_a_split_gets():
    task = rows(*({"prompt": f"number {i}"} for i in range(2000)), shares={"answers": 1, "test": 3})
    assert len(task.by_split["answers"]) == pytest.approx(500, abs=80)
    assert len(task.by_split["test"]) == 2000 - len(task.by_split["answers"])


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
    with pytest.raises(ValueError, match="line 1 is list: write one object per line"):
        load_task(str(file), SETTINGS)
    with pytest.raises(ValueError, match="is not there"):
        load_task("nowhere.jsonl", SETTINGS)
    with pytest.raises(ValueError, match="task 'ledgr' is not known; tasks: ledger"):
        load_task("ledgr", SETTINGS)
    with pytest.raises(ValueError, match=r"org/name \(gsm8k is openai/gsm8k\)"):
        load_task("gsm8k", SETTINGS)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl cannot be read"):
        load_task(str(tmp_path / "folder.jsonl"), SETTINGS)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "\r"])
def test_a_line_ends_at_its_newline_only(tmp_path, mark):
    file = tmp_path / "mine.jsonl"
    texts = [f"a{mark}b", "c"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=mark == "\x0c" or mark < " ") for text in texts]
    file.write_bytes("\r\n".join(lines).encode())
    assert sorted(all_of(load_rows(str(file), SETTINGS))) == texts


def test_a_file_may_begin_with_a_byte_order_mark_and_be_one_array(tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert all_of(load_rows(str(file), SETTINGS)) == [ROW["prompt"]]
    file.write_text(json.dumps([ROW, {"prompt": "b", "reference": "c"}], indent=1))
    assert sorted(all_of(load_rows(str(file), SETTINGS))) == [ROW["prompt"], "b"]
    file.write_text(json.dumps([ROW, 3]))
    with pytest.raises(ValueError, match="row 2 is int"):
        load_rows(str(file), SETTINGS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a"}\n\n \n{"prompt": 3}\n', "row 4: `prompt` must be text"),
        (b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        (b'\n{"prompt": "a\\ud800"}\n', "row 2: `prompt` holds half a character"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2 is not UTF-8 .*: save the file as UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1 is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": ' + b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"prompt": "a", "reference": NaN}', "line 1 is not JSON .NaN is no value"),
        (b'{"prompt": "a", "reference": -Infinity}', "line 1 is not JSON .-Infinity is no value"),
        (b'{"prompt": "a", "reference": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"\\ud800": "a"}', "row 1 must hold `prompt` or `messages`, one of them; it holds '.ud800'"),
        (b"\n\n", "holds no row"),
        (b"", "holds no row"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path, data, message):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"mine.jsonl.*{message}") as refused:
        load_rows(str(file), SETTINGS)
    assert str(refused.value).encode()  # can be printed


def test_the_hub_is_read_by_its_library(tmp_path, monkeypatch):
    """Where a folder of that name is there, `datasets` reads it as it does the hub's."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(tmp_path)
    assert all_of(load_task("org/name", SETTINGS)) == [ROW["prompt"]]
    for setting in ("config", "split"):
        with pytest.raises(ValueError, match=f"task 'org/name' cannot be read .*data.{setting}=nowhere"):
            load_task("org/name", SETTINGS | {setting: "nowhere"})
    with pytest.raises(ValueError, match="has the columns prompt, reference, and neither `question` nor `messages`"):
        load_task("org/name", SETTINGS | {"fields": {"prompt": "question"}})


def test_a_data_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="task 'nobody/nothing' cannot be read from the hub"):
        load_task("nobody/nothing", SETTINGS)


def test_the_questions_of_mt_bench_are_read_as_they_are(tmp_path):
    """Of a row's turns the first is asked; references, which only some have, are left out."""
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write a post about Hawaii.", "Rewrite it."]},
        {
            "question_id": 121,
            "category": "coding",
            "turns": ["Count the words.", "In parallel."],
            "reference": ["x", "y"],
        },
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_rows(str(file), SETTINGS)
    assert sorted(prompt for some in task.by_split.values() for prompt in some) == [
        "Count the words.",
        "Write a post about Hawaii.",
    ]
    assert not task.checks
    for turns in ([], "Write.", [3]):
        file.write_text(json.dumps({"turns": turns}) + "\n")
        with pytest.raises(ValueError, match="row 1: `(turns` must be a list of the user's texts|prompt`)"):
            load_rows(str(file), SETTINGS)
