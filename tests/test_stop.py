"""Stop strings: every method ends where the first of them begins, also across the borders of tokens and segments."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parse import Engine
from parse.text import find_stop, undecided
from parse.verifiers import Likelihood
from tests.test_engine import PROMPT

WAYS = [
    {"threshold": 0.05},
    {"threshold": 0.0},
    {"threshold": 1.1},
    {"threshold": 0.05, "handback": "never"},
    {"threshold": 0.05, "policy": "whole"},
    {"threshold": 0.05, "horizon": 5},
    {"method": "target"},
    {"method": "draft"},
    {"method": "target", "lookahead": 3},
    {"method": "target", "temperature": 1.0, "seed": 4},
]


@pytest.fixture(scope="module")
def engine(target, draft, tokenizer):
    return Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3, compile=False)


@pytest.mark.parametrize("ways", WAYS, ids=str)
@settings(max_examples=6, deadline=None)
@given(place=st.floats(0, 1), length=st.integers(1, 9), batch=st.booleans())
def test_an_answer_ends_where_a_stop_string_begins(engine, ways, place, length, batch):
    """Whatever a piece of the answer without it is cut out of, in characters: the same words up to its first place."""
    (plain,) = engine.generate(PROMPT, 24, **ways)
    start = int(place * max(len(plain.text) - length, 0))
    stop = plain.text[start : start + length]
    if not stop:
        return
    prompts = [PROMPT, "the fig"] if batch else PROMPT
    result = engine.generate(prompts, 24, stop=["never said", stop], **ways)[0]
    assert result.text == plain.text[: plain.text.find(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == plain.token_ids[: len(result.token_ids)]
    assert stop in engine.tokenizer.decode(result.token_ids)
    assert stop not in engine.tokenizer.decode(result.token_ids[:-1])
    assert "".join(segment.text for segment in result.segments if segment.accepted) == result.text
    written = result.stats.accepted_tokens + result.stats.target_tokens
    assert written >= len(result.token_ids)
    assert "".join(engine.stream(PROMPT, max_new_tokens=24, stop=stop, **ways)) == result.text


def test_what_may_be_a_stop_string_is_shown_once_it_is_none(engine):
    (plain,) = engine.generate(PROMPT, 24, method="target")
    stop = plain.text[8:12] + "\N{SNOWMAN}"  # begins as the answer goes on, and never comes
    shown = ""
    for piece in engine.stream(PROMPT, max_new_tokens=24, method="target", stop=stop):
        shown += piece
        assert plain.text.startswith(shown)
    assert shown == plain.text


@given(text=st.text("ab"), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), more=st.text("ab"))
def test_what_is_not_held_back_cannot_belong_to_a_stop_string(text, stops, more):
    """A stop string that appears later never begins in what was shown before."""
    if find_stop(text, stops) is None and (place := find_stop(text + more, stops)) is not None:
        assert place >= len(text) - undecided(text, stops)


@pytest.mark.parametrize("stop", [3, "", ["a", ""], [b"x"]])
def test_stop_strings_that_are_none(engine, stop):
    with pytest.raises(ValueError, match="stop="):
        engine.generate(PROMPT, 8, method="target", stop=stop)


def test_a_draft_stops_at_the_first_cut_after_a_stop_string(target, draft, tokenizer):
    """However long its sentence goes on: what follows would be written and judged for nothing."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=20, compile=False)
    (plain,) = engine.generate(PROMPT, 60, threshold=0.0)
    stop = engine.tokenizer.decode(plain.token_ids[:2])[-3:]
    (result,) = engine.generate(PROMPT, 60, threshold=0.0, stop=stop)
    assert len(plain.token_ids) > 40
    assert result.stats.draft_tokens == 20
    assert result.text == plain.text[: plain.text.find(stop)]
