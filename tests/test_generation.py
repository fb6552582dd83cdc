"""Texts for data: kept one by one, whichever process wrote them and however often it was killed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.decode import Context
from parse.passes import Reader
from train.generation import finish_all, going_on, together, write_all


def making(made, fatal=None):
    def steps(item):
        if item == fatal:
            raise KeyboardInterrupt
        made.append(item)
        return {"item": item}
        yield

    return steps


def test_rows_come_in_the_order_of_the_items(tmp_path):
    rows = finish_all(tmp_path, "abcde", together(making([]), 2), what="letters")
    assert [row["item"] for row in rows] == list("abcde")


@given(kills=st.lists(st.integers(0, 9), max_size=4), torn=st.booleans())
def test_a_killed_start_is_gone_on_from(tmp_path_factory, kills, torn):
    folder, made = tmp_path_factory.mktemp("kept"), []
    for fatal in kills:
        if fatal not in made:
            with pytest.raises(KeyboardInterrupt):
                finish_all(folder, range(10), together(making(made, fatal), 1), what="numbers")
    files = sorted(folder.glob("*.jsonl"))
    if torn and files and (text := files[-1].read_text()):
        files[-1].write_text(text[:-3])  # the kill came in the middle of a line
        made.pop()
    rows = finish_all(folder, range(10), together(making(made), 3), what="numbers")
    assert [row["item"] for row in rows] == list(range(10))
    assert sorted(made) == list(range(10))  # nothing is made twice


def test_what_a_model_writes_is_what_it_writes_alone(target):
    reader = Reader(target, frozenset([1]))
    prompts = [[5, 9, 13], [7], [20, 21, 22, 23]]
    written = write_all(reader, prompts, limit=6, at_once=2, what="texts")
    for ids, text in zip(prompts, written, strict=True):
        context = Context(Reader(target, frozenset([1])))
        context.read(ids)
        assert context.write(6) == text


def test_a_text_makes_room_when_it_is_done(target):
    reader = Reader(target, frozenset([1]))
    steps = going_on(reader, [5, 6], limit=3)
    reader.forward([next(steps)])
    steps.close()
    assert reader.open() == 0
