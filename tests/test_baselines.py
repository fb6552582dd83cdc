"""transformers' own generate and assisted generation, as the evaluation times them."""

import pytest

from eval.baselines import TransformersGenerate
from eval.tasks import TASKS, draw_prompts
from parse import Engine
from tests.conftest import MODELS

PROMPTS = draw_prompts(TASKS["ledger"], "test", 3, seed=2)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", compile=False)


@pytest.mark.parametrize("assisted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_words_are_the_targets_own(engine, assisted, batch_size):
    expected = engine.generate(PROMPTS, 200, method="target")
    answers = TransformersGenerate(engine, assisted).generate(PROMPTS, 200, batch_size=batch_size)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert {answer.finish_reason for answer in [*answers, *expected]} == {"stop"}
    for answer in answers:
        assert 0 < answer.stats.first_token_seconds < answer.stats.seconds["target"]
        assert answer.stats.target_tokens == len(answer.token_ids)


@pytest.mark.parametrize("assisted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stop_string_ends_an_answer_as_in_the_engine(engine, assisted, batch_size):
    stop = [". #3", "never said"]
    expected = engine.generate(PROMPTS, 200, method="target", stop=stop)
    answers = TransformersGenerate(engine, assisted).generate(PROMPTS, 200, batch_size, stop)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert all("#2" in answer.text and "#3" not in answer.text for answer in answers)
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_an_answer_without_an_end_is_cut_at_its_limit(engine):
    (answer,) = TransformersGenerate(engine).generate(PROMPTS[:1], 5)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 5)


def test_the_assistant_may_have_other_tokens(smollm):
    """transformers aligns the texts of two tokenizers; the words stay the target's."""
    target, tokenizer = smollm
    draft = Engine.from_pretrained(MODELS / "ledger-draft", compile=False)
    engine = Engine(target, tokenizer, draft.target, draft.tokenizer, compile=False)
    prompt = "Name the capital of France."
    expected = engine.generate([prompt], 12, method="target")
    answers = TransformersGenerate(engine, assisted=True).generate([prompt], 12)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_what_a_generation_config_asks_for_is_left_out_as_by_the_engine(engine, monkeypatch):
    expected = engine.generate(PROMPTS[:1], 40, method="target")
    monkeypatch.setattr(engine.target.generation_config, "repetition_penalty", 3.0)
    for assisted in (False, True):
        answers = TransformersGenerate(engine, assisted).generate(PROMPTS[:1], 40)
        assert answers[0].token_ids == expected[0].token_ids
    assert engine.target.generation_config.repetition_penalty == 3.0
