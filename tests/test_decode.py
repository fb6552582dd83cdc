"""Token-level speculation: the target's own words, whoever proposes them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from parse import Engine
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.local.speculation import speculate
from parse.sampling import Sampling
from parse.scheduler import Scheduler, run, run_together
from parse.verifiers import Likelihood
from tests.conftest import random_model
from tests.test_cache import assert_same_cache

PROMPT = "list : #1 fig rome 4 ; #2 apple oslo 7 ."
MODELS = {
    "other": random_model("gpt2", 60, seed=1),
    "same": random_model("llama", 60),
}
TARGET = MODELS["same"]


def contexts(
    proposer: str, prompt: list[int], ends: frozenset[int] = frozenset()
) -> tuple[CachedSequence, CachedSequence]:
    target, draft = (CachedSequence(ModelRunner(model, ends)) for model in (TARGET, MODELS[proposer]))
    target.read(prompt)
    return target, draft


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 59), min_size=1, max_size=20),
    lookahead=st.integers(1, 6),
    limit=st.integers(1, 25),
    proposer=st.sampled_from(sorted(MODELS)),
    end=st.integers(0, 59),
    every=st.integers(2, 9),
)
def test_greedy_speculation_is_the_target_alone(prompt, lookahead, limit, proposer, end, every):
    """Its tokens, its end, its stop, and its cache, whatever is proposed."""
    ends = frozenset([end])
    stop = lambda ids: len(ids) % every == 0
    target, draft = contexts(proposer, prompt, ends)
    alone, _ = contexts(proposer, prompt, ends)
    told: list[tuple[int, int]] = []
    written = run(
        speculate(target, draft, limit, Sampling(), lookahead, stop, on_pass=lambda *counts: told.append(counts))
    )
    assert written == alone.write(limit, stop=stop)
    assert all(0 <= kept <= proposed <= lookahead for proposed, kept in told)
    of_target = len(written.ids) - sum(kept for _, kept in told)  # a token before each pass, or after the last
    assert len(told) <= of_target <= len(told) + 1
    if proposer == "same":  # whatever ends the text, nothing that it proposed was wrong
        assert all(kept == proposed for proposed, kept in told)
    assert target.ids == alone.ids
    torch.testing.assert_close(run(target.next_logits()), run(alone.next_logits()), atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(target.runner.cache.states(), alone.runner.cache.states(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", range(10, 16))
def test_an_end_that_both_write_is_no_proposal_that_was_wrong(first):
    prompt, told = [first, 6, 7], list[tuple[int, int]]()
    ids = contexts("same", prompt)[0].write(9).ids
    target, draft = contexts("same", prompt, frozenset(ids[1:]) - {ids[0]})
    written = run(speculate(target, draft, 9, Sampling(), 8, on_pass=lambda *counts: told.append(counts)))
    assert written.ended == (len({*ids}) > 1)
    assert all(kept == proposed for proposed, kept in told)


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 59), min_size=1, max_size=20),
    limit=st.integers(1, 25),
    end=st.integers(0, 59),
    read=st.booleans(),
    every=st.one_of(st.none(), st.integers(1, 9)),
)
def test_what_nobody_watches_is_written_at_once(prompt, limit, end, read, every):
    """The same words, logits and cache as token by token, whether the text was read or waits, up to what ends it."""
    stop = every and (lambda ids: len(ids) % every == 0)
    contexts = []
    for _ in range(2):
        contexts.append(CachedSequence(ModelRunner(TARGET, frozenset([end]))))
        if read:
            contexts[-1].read(prompt)
        else:
            run(contexts[-1].defer(prompt))
    alone, watched = contexts
    asked, forward = [], alone.runner.forward
    alone.runner.forward = lambda some, alone: asked.append(alone) or forward(some, alone)
    seen = []
    for _ in Scheduler().watch(watched.decode(limit, Sampling(), stop, lambda ids: seen.append(list(ids)))):
        pass
    written = alone.write(limit, Sampling(), stop)
    assert seen == [written.ids[: i + 1] for i in range(len(written.ids))]
    assert all(asked)
    assert len(asked) <= 2 - read
    assert alone.ids == watched.ids
    assert alone.deferred == watched.deferred
    torch.testing.assert_close(run(alone.next_logits()), run(watched.next_logits()), atol=1e-4, rtol=1e-4)
    assert_same_cache(alone, watched)


@pytest.mark.parametrize("runners", [1, 2])
def test_texts_that_run_together_write_on_to_where_one_of_them_stops(runners):
    """Each leaves when it is done. Those of two models write token by token, lest one be behind with its next pass."""
    runners = [ModelRunner(TARGET) for _ in range(runners)]
    stops = [(9, lambda ids: len(ids) == 4), (7, None), (12, None)]
    texts, asked = [CachedSequence(runners[i % len(runners)]) for i in range(3)], []
    for context in texts:
        run(context.defer([5, 6, 7]))
    for runner in runners:
        forward = runner.forward
        runner.forward = lambda some, alone, forward=forward: asked.append(len(some)) or forward(some, alone)
    writing = (context.decode(limit, stop=stop) for context, (limit, stop) in zip(texts, stops, strict=True))
    written = dict(run_together(writing, at_once=3))
    alone = CachedSequence(ModelRunner(TARGET))
    alone.read([5, 6, 7])
    ids = alone.write(12).ids
    assert [written[i].ids for i in range(3)] == [ids[:4], ids[:7], ids]
    assert [context.ids for context in texts] == [[5, 6, 7, *written[i].ids] for i in range(3)]
    assert asked == ([3, 2, 1] if len(runners) == 1 else [*[2, 1] * 4, *[1] * 6])


def test_proposals_that_are_kept_save_passes(monkeypatch):
    target, draft = contexts("same", [5, 6, 7])
    passes = []
    forward = ModelRunner.forward

    def counting(self, some, alone=None):
        if self is target.runner:
            passes.append(len(some[0].ids))
        return forward(self, some, alone)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    told: list[tuple[int, int]] = []
    run(speculate(target, draft, 20, Sampling(), 4, on_pass=lambda *counts: told.append(counts)))
    assert passes == [5, 5, 5, 5]  # a chosen token and four proposals each
    assert told == [(4, 4)] * 4


@pytest.mark.parametrize(
    ("options", "padding"), [({}, (0, 0)), ({"top_k": 6}, (0, 0)), ({"top_p": 0.8}, (0, 0)), ({}, (4, 0)), ({}, (0, 4))]
)
def test_sampled_speculation_is_distributed_as_the_target(options, padding):
    """A chi-square test at 1 in 10,000 of the token that is settled on, whatever another model proposes.

    Its vocabulary may be padded to another size than the target's, as those of Qwen2.5's smaller models are.
    """
    nothing = lambda logits, rows: torch.nn.functional.pad(logits, (0, rows), value=-40.0)
    prompt, trials, temperature = [5, 6, 7], 1000 if any(padding) else 4000, 4.0
    scale = lambda logits: logits / logits.std()  # random models are too sure of themselves
    sample = Sampling(temperature / 4, **options, seed=3)
    target, draft = contexts("other", prompt)
    target.last_logits = nothing(scale(target.last_logits), padding[0])
    draft.read(prompt)
    first_of_draft = nothing(scale(draft.last_logits), padding[1])
    counts = torch.zeros(60 + padding[0])
    for _ in range(trials):
        proposal = sample(first_of_draft)
        counts[sample.settle(proposal, first_of_draft, target.last_logits)] += 1
    expected = sample._probabilities(target.last_logits) * trials
    assert not counts[expected == 0].any()
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    terms = [(o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0]
    assert chi2.sf(math.fsum(terms), len(terms) - 1) > 1e-4


def test_whole_texts_are_sampled_as_by_the_target_alone():
    """Texts of up to three tokens, few likely ones at each place, with ends: a chi-square test of their counts."""
    ends, prompt, trials = frozenset(range(0, 60, 4)), [5, 6, 7], 1500
    ways = {"temperature": 3.0, "top_k": 3}

    def texts(seed, lookahead):
        sample = Sampling(**ways, seed=seed)
        counts: dict[tuple[int, ...], int] = {}
        target, draft = contexts("other", prompt, ends)
        logits = target.last_logits
        for _ in range(trials):
            target.rollback(len(prompt), logits)
            ahead = lambda: run(speculate(target, draft, 3, sample, lookahead))
            written = ahead() if lookahead else target.write(3, sample)
            key = (*written.ids, -1) if written.ended else tuple(written.ids)
            counts[key] = counts.get(key, 0) + 1
        return counts

    alone, together = texts(1, 0), texts(2, 2)
    keys = [key for key in alone.keys() | together.keys() if alone.get(key, 0) + together.get(key, 0) >= 10]
    pairs = [(alone.get(key, 0), together.get(key, 0)) for key in keys]
    assert len(pairs) >= 8
    assert any(-1 in key for key in keys)
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    assert chi2.sf(statistic, len(pairs) - 1) > 1e-4


@pytest.mark.parametrize("method", ["target", "parse"])
@pytest.mark.parametrize("ways", [{}, {"horizon": 7}, {"handback": "never"}])
def test_an_engine_that_looks_ahead_answers_the_same(target, draft, tokenizer, method, ways):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.05), segments=4)
    plain = engine.generate(PROMPT, 40, method=method, **ways)[0]
    ahead = engine.generate([PROMPT, "the fig"], 40, method=method, lookahead=3, **ways)[0]
    assert ahead.token_ids == plain.token_ids
    assert ahead.finish_reason == plain.finish_reason
    assert [(s.text, s.source) for s in ahead.segments] == [(s.text, s.source) for s in plain.segments]
    assert "".join(engine.stream(PROMPT, max_new_tokens=40, method=method, lookahead=3, **ways)) == plain.text


@pytest.mark.parametrize("method", ["target", "parse"])
@pytest.mark.parametrize("lookahead", [0, 3])
def test_an_end_that_is_ignored_is_a_token_like_others(target, draft, tokenizer, monkeypatch, method, lookahead):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.05), segments=4, compile=False)
    ways = {"method": method, "lookahead": lookahead}
    plain = engine.generate(PROMPT, 40, **ways)[0]
    for model in engine.models.values():
        monkeypatch.setattr(model.runner, "eos_ids", frozenset(plain.token_ids[5:9]))
    assert len(engine.generate(PROMPT, 40, **ways)[0].token_ids) < 9
    ignored = engine.generate(PROMPT, 40, ignore_eos=True, **ways)[0]
    assert (ignored.token_ids, ignored.finish_reason) == (plain.token_ids, plain.finish_reason)


@pytest.mark.parametrize("method", ["target", "parse"])
@pytest.mark.parametrize("ways", [{}, {"temperature": 0.7, "seed": 5}, {"stop": ["a", " t"]}])
def test_a_draft_with_other_tokens_proposes_as_text(smollm, target, tokenizer, method, ways):
    """Not a word changes, and where draws are the target's own, a seed draws the very same ones."""
    model, real = smollm
    engine = Engine(model, real, target, tokenizer, Likelihood("mean", "segment", 1.1), segments=4, compile=False)
    plain = engine.generate(PROMPT, 24, method=method, **ways)[0]
    ahead = engine.generate([PROMPT, "the fig"], 24, method=method, lookahead=3, **ways)[0]
    assert ahead.token_ids == plain.token_ids
    assert ahead.finish_reason == plain.finish_reason


@pytest.mark.parametrize("ways", [{}, {"temperature": 0.2, "seed": 5}, {"stop": ["not said"]}])
def test_proposals_that_cross_as_text_are_kept_and_save_passes(smollm, monkeypatch, ways):
    """The target drafts for itself, with a word more in its tokenizer."""
    model, real = smollm
    other = copy.deepcopy(real)
    other.add_tokens(["unheard-of"])
    engine = Engine(model, real, model, other, compile=False)
    assert not engine.same_tokens
    plain = engine.generate(PROMPT, 24, method="target", **ways)[0]
    passes = []
    forward = ModelRunner.forward

    def counting(self, some, alone=None):
        passes.append(self is engine.models["target"].runner)
        return forward(self, some, alone)

    monkeypatch.setattr(ModelRunner, "forward", counting)
    ahead = engine.generate(PROMPT, 24, method="target", lookahead=5, **ways)[0]
    assert ahead.token_ids == plain.token_ids
    assert sum(passes) <= (14 if "seed" in ways else 7)  # the prompt, then a chosen token and up to five proposals each


def test_where_the_drafts_context_ends_the_target_goes_on_without_proposals(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, compile=False)
    plain = engine.generate(PROMPT, 40, method="target")[0]
    engine.models["draft"].runner.longest = len(engine.encode(PROMPT)) + 7
    assert engine.generate(PROMPT, 40, method="target", lookahead=4)[0].token_ids == plain.token_ids


def test_looking_ahead_needs_a_draft(target, tokenizer):
    with pytest.raises(ValueError, match="no draft model"):
        Engine(target, tokenizer).generate(PROMPT, 5, method="target", lookahead=3)


def test_a_pass_keeps_the_logits_of_its_last_token_unless_told(target):
    runner = ModelRunner(target)
    assert Pass(runner, 0, [5, 6, 7]).kept == [2]
    assert list(Pass(runner, 0, [5, 6, 7], keep=[0, 1]).kept) == [0, 1]
