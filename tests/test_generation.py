"""Texts for data: kept one by one, whichever process wrote them and however often it was killed."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.generation import FAILED, TooManyFailed, batched, finish_all, in_threads, write_after, write_all
from parse.local.model import LocalModel
from parse.local.runner import ModelRunner
from parse.local.sequence import CachedSequence
from recipes.schema import RecipeError


def making(made, fatal=None):
    async def steps(item):
        if item == fatal:
            raise KeyboardInterrupt
        made.append(item)
        return {"item": item}

    return steps


def test_rows_come_in_the_order_of_the_items(tmp_path):
    rows = finish_all(tmp_path, "abcde", batched(making([]), 2), what="letters")
    assert [row["item"] for row in rows] == list("abcde")


@given(kills=st.lists(st.integers(0, 9), max_size=4), torn=st.booleans())
def test_a_killed_start_is_gone_on_from(tmp_path_factory, kills, torn):
    folder, made = tmp_path_factory.mktemp("kept"), []
    for fatal in kills:
        if fatal not in made:
            with pytest.raises(KeyboardInterrupt):
                finish_all(folder, range(10), batched(making(made, fatal), 1), what="numbers")
    files = sorted(folder.glob("*.jsonl"))
    if torn and files and (text := files[-1].read_text()):
        files[-1].write_text(text[:-3])  # the kill came in the middle of a line
        made.pop()
    rows = finish_all(folder, range(10), batched(making(made), 3), what="numbers")
    assert [row["item"] for row in rows] == list(range(10))
    assert sorted(made) == list(range(10))  # nothing is made twice


def test_other_items_before_them_do_not_move_kept_rows(tmp_path):
    made = []
    finish_all(tmp_path, [{"q": "b"}, {"q": "c"}], batched(making(made), 2), what="rows")
    rows = finish_all(tmp_path, [{"q": "a"}, {"q": "c"}, {"q": "b"}], batched(making(made), 2), what="rows")
    assert [row["item"]["q"] for row in rows] == ["a", "c", "b"]
    assert [item["q"] for item in made] == ["b", "c", "a"]


@pytest.mark.parametrize("line", ["no json", '{"a": 1}', "[1]", '["key", 2, 3]', "\udcff"])
def test_a_damaged_line_is_made_again(tmp_path, line):
    finish_all(tmp_path, "ab", batched(making([]), 1), what="letters")
    file = next(tmp_path.glob("*.jsonl"))
    first, second = file.read_text().splitlines()
    file.write_bytes(f"{first}\n{line}\n".encode(errors="surrogateescape"))
    made = []
    rows = finish_all(tmp_path, "ab", batched(making(made), 1), what="letters")
    assert [row["item"] for row in rows] == ["a", "b"]
    assert made == ["b"]
    assert second


def failing(fails):
    """Work of which some items fail."""

    def work(items):
        for place, item in enumerate(items):
            yield place, ({FAILED: "sick"} if item in fails else {"item": item})

    return work


def test_few_failures_are_rows_and_many_are_an_error(tmp_path):
    rows = finish_all(tmp_path / "few", range(200), failing({7, 150}), what="numbers")
    assert [i for i, row in enumerate(rows) if FAILED in row] == [7, 150]
    with pytest.raises(TooManyFailed, match="3 of 200 failed; what is finished is kept, .* The reason: sick"):
        finish_all(tmp_path / "many", range(200), failing({7, 8, 150}), what="numbers")
    rows = finish_all(tmp_path / "many", range(200), failing({8}), what="numbers")  # asked again
    assert [i for i, row in enumerate(rows) if FAILED in row] == [8]


def test_where_all_fails_nothing_more_is_asked(tmp_path):
    asked = []

    def work(items):
        for place, _ in enumerate(items):
            asked.append(place)
            yield place, {FAILED: "sick"}

    with pytest.raises(TooManyFailed, match="the last 20 of 1000 failed"):
        finish_all(tmp_path, range(1000), work, what="numbers")
    assert len(asked) == 20


def test_what_a_model_writes_is_what_it_writes_alone(target):
    model = LocalModel.of(target, eos_ids=frozenset([1]))
    prompts = [[5, 9, 13], [7], [20, 21, 22, 23]]
    written = write_all(model, prompts, limit=6, at_once=2, what="texts")
    for ids, text in zip(prompts, written, strict=True):
        context = CachedSequence(ModelRunner(target, frozenset([1])))
        context.read(ids)
        assert context.write(6) == text


def test_a_text_makes_room_when_it_is_done(target):
    model = LocalModel.of(target, eos_ids=frozenset([1]))
    steps = write_after(model, [5, 6], limit=3)
    model.runner.forward([steps.send(None)])
    steps.close()
    assert model.runner.open() == 0


def test_nobody_waits_for_a_thread_that_hangs(tmp_path):
    """Where one request fails for good, or the user stops, the others may wait for a server for an hour."""
    hanging, started = threading.Event(), threading.Event()

    def make(item):
        if item:
            started.set()
            hanging.wait(60)
        elif started.wait(60):
            raise RecipeError("refused")
        return {"item": item}

    with pytest.raises(RecipeError, match="refused"):
        finish_all(tmp_path, range(5), in_threads(make, 2), what="numbers")
    assert not hanging.is_set()
    hanging.set()
