"""After any accept the cache equals, tensor by tensor, that of a plain prefill of the accepted text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parse.local.cache import PrefixCache
from parse.local.runner import ModelRunner
from parse.local.sequence import CachedSequence
from parse.scheduler import run
from tests.conftest import random_model

MODEL = random_model("llama", 60)


def assert_same_cache(mine: CachedSequence, theirs: CachedSequence, tolerance: float = 1e-4) -> None:
    """Both texts' keys and values, tensor by tensor."""
    states = [context.runner.cache.states(context.row) for context in (mine, theirs)]
    for own, others in zip(*states, strict=True):
        for a, b in zip(own, others, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def fresh() -> CachedSequence:
    return CachedSequence(ModelRunner(MODEL))


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, 59), min_size=1, max_size=90), st.floats(0.05, 1)),
        min_size=1,
        max_size=6,
    )
)
def test_reading_and_rolling_back_equals_reading_what_is_left(steps):
    context = fresh()
    for ids, keep in steps:
        context.read(ids)
        context.rollback(max(1, int(keep * len(context.ids))))
    plain = fresh()
    plain.read(context.ids)
    assert_same_cache(context, plain)


def test_a_cache_that_outgrows_its_buffers_keeps_what_it_holds():
    context = fresh()
    for start in (0, 20, 40):  # more than 256 tokens, and than 512 would be more than the model's context holds
        context.read([(start + i) % 60 for i in range(170)])
    plain = fresh()
    plain.read(context.ids)
    assert_same_cache(context, plain)


def test_keeping_more_than_there_is_is_refused():
    cache = PrefixCache()
    with pytest.raises(ValueError, match="cannot keep 3 of 0"):
        cache.truncate(3)


def test_more_than_the_context_holds_is_refused():
    context = fresh()
    context.read([7] * 510)
    assert len(context.write(2).ids) == 2
    with pytest.raises(ValueError, match="a text of 513 tokens, and the model's context holds 512"):
        context.read([7])
    assert len(context.ids) == 512
    context = fresh()
    context.read([7] * 500)
    with pytest.raises(ValueError, match="a text of 513 tokens, and the model's context holds 512"):
        context.write(20)


@pytest.mark.parametrize("after", [[1, 2, 3, 4], [1, 2, 9, 9, 9], [1, 2], [7], [1, 2, 3, 4, 5, 6]])
def test_becoming_another_text_equals_reading_it(after):
    context = fresh()
    context.read([1, 2, 3, 4])
    run(context.set_prefix(after))
    plain = fresh()
    plain.read(after)
    assert context.ids == after
    torch.testing.assert_close(context.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)
    assert_same_cache(context, plain)


def test_becoming_a_text_reads_only_what_is_new(monkeypatch):
    context = fresh()
    context.read(list(range(20)))
    read = []
    original = ModelRunner.forward
    counted = lambda self, some, alone: (read.extend(len(one.ids) for one in some), original(self, some, alone))[1]
    monkeypatch.setattr(ModelRunner, "forward", counted)
    run(context.set_prefix([*range(15), 40, 41]))
    assert read == [2]


def test_writing_without_known_logits_is_refused():
    context = fresh()
    context.read([1, 2, 3])
    context.rollback(2)
    with pytest.raises(RuntimeError, match="not known"):
        context.write(1)
