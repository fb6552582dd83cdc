"""Many requests at once: the same answers, fewer forward passes, and a finished one leaves at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parse import Engine
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.scheduler import run, run_together
from parse.verifiers import Likelihood, PromptVerifier
from tests.conftest import fresh_context, random_adapter, verify_prefixes

PROMPTS = [
    "list : #1 fig rome 4 ; #2 apple oslo 7 .",
    "the fig",
    "right ?",
    "coins so far tea ; tea bread",
    "list : #1 tea oslo 9 .",
]
WAYS = [
    {"threshold": 0.05},
    {"threshold": 0.05, "policy": "longest", "horizon": 7},
    {"threshold": 0.05, "handback": "never"},
    {"threshold": 0.0, "horizon": "segment"},
    {"threshold": 1.1},
    {"method": "target"},
    {"method": "draft"},
    {"threshold": 0.05, "temperature": 1.0, "seed": 3},
]


@pytest.fixture
def engine(target, draft, tokenizer) -> Engine:
    return Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)


def test_an_adapter_acts_on_its_own_suffixes_alone(target, tokenizer, forwards):
    """Packed passes of several widths and a plain one, run as one pass: the same states and caches as each alone."""
    adapter = random_adapter(target, [7, 8])
    engine = Engine(target, tokenizer, verifier=adapter, compile=False)
    runner = fresh_context(engine).runner

    async def reading(draft, ends):
        context = CachedSequence(runner)
        await context.prefill([11, 12, 13])
        if ends:
            evidence, _ = await verify_prefixes(engine, context, draft, ends, ended=False)
            states = evidence.suffix_states
        else:
            output = await Pass(runner, context.row, draft)
            states = output.logits
            context.has_read(draft)
        output = await Pass(runner, context.row, [14])  # shows what the cache holds
        context.close()
        return states, output.logits

    texts = [(range(20, 20 + n), ends) for n, ends in ((6, [2, 4, 6]), (9, [3, 9]), (12, []), (8, [8]))]
    alone = [run(reading(list(draft), ends)) for draft, ends in texts]
    together = dict(run_together((reading(list(draft), ends) for draft, ends in texts), at_once=4))
    assert forwards[-3:] == [4, 4, 4]
    for i, results in enumerate(alone):
        for mine, single in zip(together[i], results, strict=True):
            torch.testing.assert_close(mine, single, atol=1e-4, rtol=1e-4)


@pytest.fixture
def forwards(monkeypatch):
    """The number of texts in each forward pass of any model."""
    texts = []
    run = ModelRunner._run

    def counted(self, passes, *rest):
        texts.append(len(passes))
        return run(self, passes, *rest)

    monkeypatch.setattr(ModelRunner, "_run", counted)
    return texts


def assert_same_answers(mine, theirs):
    """Equal in all that answers say of themselves but for their seconds; confidences nearly."""
    for own, other in zip(mine, theirs, strict=True):
        for name in ("text", "token_ids", "finish_reason"):
            assert getattr(own, name) == getattr(other, name)
        stats = [{k: v for k, v in vars(r.stats).items() if "seconds" not in k} for r in (own, other)]
        assert stats[0] == stats[1]
        for a, b in zip(own.segments, other.segments, strict=True):
            assert (a.text, a.source, a.accepted) == (b.text, b.source, b.accepted)
            assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_batch_answers_as_each_prompt_alone(engine, ways, batch_size):
    together = engine.generate(PROMPTS, 30, batch_size=batch_size, **ways)
    alone = [engine.generate(prompt, 30, **ways)[0] for prompt in PROMPTS]
    assert_same_answers(together, alone)


@settings(max_examples=10, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(5, 150), min_size=1, max_size=30), min_size=1, max_size=6),
    batch_size=st.integers(1, 6),
    horizon=st.none() | st.integers(1, 12),
    threshold=st.floats(0.01, 0.2),
)
def test_any_batch_answers_as_each_prompt_alone(target, draft, tokenizer, prompts, batch_size, horizon, threshold):
    engine = Engine(target, tokenizer, draft, tokenizer, PromptVerifier.of(tokenizer), segments=3)
    texts = [tokenizer.decode(ids) for ids in prompts]
    ways = {"threshold": threshold, "horizon": horizon, "max_new_tokens": 20}
    together = engine.generate(texts, batch_size=batch_size, **ways)
    assert [r.token_ids for r in together] == [engine.generate(text, **ways)[0].token_ids for text in texts]


def test_texts_that_write_at_the_same_time_share_their_passes(engine, forwards):
    engine.generate(PROMPTS[:1] * 4, 20, method="target")
    assert set(forwards) == {4}
    together = len(forwards)
    forwards.clear()
    engine.generate(PROMPTS[0], 20, method="target")
    assert together == len(forwards)


def test_a_finished_request_leaves_at_once_and_the_next_takes_its_place(engine, forwards):
    """Texts of 2, 6, 2 and 2 tokens, two at a time: the second one's 6 passes are all that it takes."""
    runner = ModelRunner(engine.target)

    async def writing(count):
        context = CachedSequence(runner)
        for token in range(count):
            await Pass(runner, context.row, [5 + token])
        context.close()
        return count

    finished = list(run_together((writing(count) for count in (2, 6, 2, 2)), at_once=2))
    assert forwards == [2, 2, 2, 2, 2, 2]
    assert finished[0] == (0, 2)
    assert sorted(finished) == [(0, 2), (1, 6), (2, 2), (3, 2)]


def test_a_row_is_clean_for_its_next_text(target):
    runner = ModelRunner(target)
    first = CachedSequence(runner)
    first.read([7, 8, 9, 10])
    first.close()
    second = CachedSequence(runner)
    second.read([11, 12])
    alone = CachedSequence(ModelRunner(target))
    alone.read([11, 12])
    torch.testing.assert_close(second.last_logits, alone.last_logits)


def test_wide_and_narrow_passes_are_not_padded_to_one_width(target, forwards):
    runner = ModelRunner(target)
    rows = [runner.open() for _ in range(3)]
    widths = [40, 30, 1]
    outputs = runner.forward([Pass(runner, row, range(5, 5 + width)) for row, width in zip(rows, widths, strict=True)])
    assert forwards == [2, 1]
    assert all(output.logits.shape[0] == 1 for output in outputs)


def test_an_answer_without_text_leaves_the_others_alone(engine):
    """An engine whose draft ends at once, in a batch."""
    engine.models["draft"].runner.eos_ids = frozenset(range(len(engine.tokenizer)))
    together = engine.generate(PROMPTS[:3], 10, threshold=0.0)
    assert [result.token_ids for result in together] == [[], [], []]


def test_a_batch_of_none_is_refused(engine):
    with pytest.raises(ValueError, match="batch_size=0: use a whole number from 1 on"):
        engine.generate(PROMPTS, 5, batch_size=0)
    assert engine.generate([], 5) == []
