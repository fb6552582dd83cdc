"""The engine's invariants, on random models and on a real chat model; its rounds, its sampling and its memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from eval.bench.fakes import endless
from parse import Engine
from parse.generation import accept
from parse.local.model import LocalModel, LocalSequence
from parse.local.runner import ModelRunner
from parse.sampling import Sampling
from parse.scheduler import run
from parse.verifiers import Likelihood, Probe, PromptVerifier
from parse.verifiers.heads import AttentiveHead, HazardHead
from tests.conftest import fresh_context, peak_bytes, random_adapter, runners_of, verify_prefixes
from tests.test_cache import assert_same_cache

PROMPT = "list : #1 fig rome 4 ; #2 apple oslo 7 ."


@pytest.fixture(scope="module", params=["prompt", "likelihood", "probe", "attentive probe", "adapter"])
def engine(request, target, draft, tokenizer) -> Engine:
    verifier = {
        "prompt": lambda: PromptVerifier.of(tokenizer),
        "likelihood": Likelihood,
        "probe": lambda: Probe(HazardHead(2 * 48, 4).eval(), (2, 3)),
        "attentive probe": lambda: Probe(AttentiveHead(2 * 48, 4).eval(), (2, 3)),
        "adapter": lambda: random_adapter(target, [7, 8]),
    }[request.param]()
    return Engine(target, tokenizer, draft, tokenizer, verifier, segments=4)


@pytest.mark.parametrize("policy", ["first_fail", "longest", "whole"])
@pytest.mark.parametrize("handback", ["segment", "never"])
@pytest.mark.parametrize("horizon", [None, 7, "segment"])
def test_accepting_nothing_is_the_target_and_everything_the_draft(engine, policy, handback, horizon):
    ways = {"policy": policy, "handback": handback, "horizon": horizon, "max_new_tokens": 30}
    target = engine.generate(PROMPT, 30, method="target")[0]
    draft = engine.generate(PROMPT, 30, method="draft")[0]
    assert engine.generate(PROMPT, threshold=1.1, **ways)[0].token_ids == target.token_ids
    everything = engine.generate(PROMPT, threshold=0.0, **ways)[0]
    assert everything.token_ids == draft.token_ids
    assert everything.finish_reason == draft.finish_reason
    assert everything.stats.target_tokens == 0


@pytest.mark.parametrize("ways", [{}, {"horizon": 6}, {"temperature": 1.0, "seed": 2}, {"lookahead": 2}])
@pytest.mark.parametrize("long", [False, True])
def test_a_probe_with_attention_reads_the_states_of_the_whole_text(target, draft, tokenizer, monkeypatch, ways, long):
    """In every round: of the prompt, of what was accepted, and of repairs, which the target has read step by step."""
    monkeypatch.setattr("parse.local.sequence.SHORT", 3 if long else 512)
    verifier = Probe(AttentiveHead(2 * 48, 4).eval(), (1, 3))
    engine = Engine(target, tokenizer, draft, tokenizer, verifier, segments=4, compile=False)
    seen = []

    class Watched(Probe):
        def confidences(self, evidence):
            seen.append(evidence)
            chances = super().confidences(evidence)
            return torch.where(torch.arange(len(chances)) < len(seen) % 3, 1.0, 0.0)  # some are refused

    engine.verifier = Watched(verifier.head, verifier.layers)
    texts = []
    verify = LocalSequence.verify

    def noting(self, ids, written, *others):
        texts.append(([*self.prompt_ids, *ids], [*written.ids]))
        return verify(self, ids, written, *others)

    monkeypatch.setattr(LocalSequence, "verify", noting)
    with endless(engine):
        engine.generate(PROMPT, 40, threshold=0.5, **ways)
    assert len(seen) == len(texts) > 3
    for evidence, (before, drafted) in zip(seen, texts, strict=True):
        with torch.inference_mode():
            states = target(torch.tensor([[*before, *drafted]]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[1][0], states[3][0]], dim=-1)  # [C + N, width]
        mine = torch.cat([evidence.context_states, evidence.states])
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)


def test_accepting_nothing_is_transformers_greedy_text(engine):
    ids = engine.encode(PROMPT)
    expected = engine.target.generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=1
    )[0, len(ids) :].tolist()
    mine = engine.generate(PROMPT, 40, threshold=1.1)[0].token_ids
    assert mine == [token for token in expected if token != 1]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_verify_equals_one_pass_a_prefix(target, draft, tokenizer, data):
    verifier = PromptVerifier.of(tokenizer)
    engine = Engine(target, tokenizer, draft, tokenizer, verifier)
    tokens = st.lists(st.integers(5, len(tokenizer) - 1), min_size=1, max_size=30)
    prompt, drafted = data.draw(tokens), data.draw(tokens)
    n = len(drafted)
    ends = sorted(data.draw(st.sets(st.integers(1, n))) | {n})
    confidences = engine.verify(prompt, drafted, ends)
    assert confidences.shape == (len(ends),)
    with torch.inference_mode():
        for end, confidence in zip(ends, confidences.tolist(), strict=True):
            logits = target(torch.tensor([prompt + drafted[:end] + verifier.suffix_ids])).logits[0, -1]
            yes = logits[verifier.yes_ids].logsumexp(0)
            assert confidence == pytest.approx(
                torch.sigmoid(yes - logits[verifier.no_ids].logsumexp(0)).item(), abs=1e-4
            )


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_after_any_accept_the_cache_is_that_of_a_plain_prefill(target, draft, tokenizer, data):
    engine = Engine(target, tokenizer, draft, tokenizer, PromptVerifier.of(tokenizer))
    tokens = st.lists(st.integers(5, len(tokenizer) - 1), min_size=1, max_size=30)
    prompt, drafted = data.draw(tokens), data.draw(tokens)
    end = data.draw(st.integers(1, len(drafted)))
    context = fresh_context(engine)
    context.read(prompt)
    _, logits = run(verify_prefixes(engine, context, drafted, [end], ended=False))
    context.rollback(len(prompt) + end, logits[1])
    plain = fresh_context(engine)
    plain.read([*prompt, *drafted[:end]])
    assert context.ids == plain.ids
    assert_same_cache(context, plain)
    torch.testing.assert_close(context.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(threshold=st.floats(0, 1), horizon=st.none() | st.integers(1, 20), limit=st.integers(1, 40))
def test_any_threshold_keeps_the_books(target, draft, tokenizer, threshold, horizon, limit):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3)
    result = engine.generate(PROMPT, limit, threshold=threshold, horizon=horizon)[0]
    stats = result.stats
    assert len(result.token_ids) == stats.accepted_tokens + stats.target_tokens <= limit
    assert stats.accepted_tokens <= stats.draft_tokens
    assert "".join(s.text for s in result.segments if s.accepted) == tokenizer.decode(result.token_ids)
    assert result.finish_reason == "stop" or len(result.token_ids) == limit
    for segment in result.segments:
        if segment.source == "draft":
            assert segment.accepted == (segment.confidence >= threshold) or not segment.accepted


def test_the_target_goes_on_as_it_would_by_itself(target, draft, tokenizer):
    """After a prefix of several accepted segments its words are those of a plain reading of that text."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3)
    several = 0
    for text in (PROMPT, "the fig", "list : #1 apple oslo 7 .", "right ?", "coins so far", "tea ; tea"):
        prompt = engine.encode(text)
        everything = engine.generate(text, 40, threshold=0.0)[0].segments
        threshold = sorted(segment.confidence for segment in everything)[2]  # two segments are refused
        result = engine.generate(text, 40, threshold=threshold)[0]
        before, run = [], 0
        for segment in (s for s in result.segments if s.accepted):
            ids = tokenizer.encode(segment.text.strip(), add_special_tokens=False)
            if segment.source == "target":
                alone = fresh_context(engine)
                alone.read([*prompt, *before])
                assert alone.write(len(ids)).ids == ids
                several += run > 1
            run = run + 1 if segment.source == "draft" else 0
            before += ids
        assert before == result.token_ids
    assert several


def test_the_token_after_the_accepted_prefix_needs_no_pass_of_its_own(target, draft, tokenizer, monkeypatch):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.0), segments=4)
    passes = []
    forward = type(target).forward

    def counted(self, *args, **kwargs):
        passes.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "forward", counted)
    engine.generate(PROMPT, 24, threshold=0.0)
    prompt = len(engine.encode(PROMPT))
    assert passes == [prompt + 24]  # the prompt and the whole draft, once
    passes.clear()
    monkeypatch.setattr("parse.local.sequence.SHORT", prompt - 1)
    engine.generate(PROMPT, 24, threshold=0.0)
    assert passes == [prompt, 24]  # a long one by itself, where it needs no mask


def test_no_token_is_read_twice_and_the_last_ones_of_a_repair_with_the_next_draft(
    target, draft, tokenizer, monkeypatch
):
    """Of a repair's 4 tokens the first comes from the packed pass before, and the last is read in the one after."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4, compile=False)
    everything = engine.generate(PROMPT, 40, threshold=0.0)[0].segments
    threshold = sorted(segment.confidence for segment in everything)[2]  # two segments are refused
    read = []
    run = ModelRunner._run
    monkeypatch.setattr(
        ModelRunner,
        "_run",
        lambda self, passes, *rest: (
            (read.append(len(passes[0].ids)) if self.model is target else 0) or run(self, passes, *rest)
        ),
    )
    stats = engine.generate(PROMPT, 40, threshold=threshold)[0].stats
    repairs = stats.target_tokens // 4
    assert repairs
    assert read.count(1) == 3 * repairs  # steps
    wide = [width for width in read if width > 1]
    assert len(wide) == stats.verify_passes
    assert sum(wide) == len(engine.encode(PROMPT)) + stats.draft_tokens + (stats.verify_passes - 1)


@pytest.mark.parametrize(
    ("policy", "confidences", "expected"),
    [
        ("first_fail", [0.9, 0.4, 0.9], 1),
        ("first_fail", [0.9, 0.9, 0.9], 3),
        ("first_fail", [0.1, 0.9, 0.9], 0),
        ("longest", [0.9, 0.4, 0.9, 0.2], 3),
        ("longest", [0.1, 0.2], 0),
        ("whole", [0.6], 1),
        ("whole", [0.4, 0.9, 0.6], 3),
        ("whole", [0.9, 0.9, 0.4], 0),
        ("first_fail", [], 0),
    ],
)
def test_acceptance_policies(policy, confidences, expected):
    assert accept(confidences, 0.5, policy) == expected


def test_a_draft_that_ends_at_once_leaves_the_answer_to_the_target(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood())
    engine.models["draft"].runner.eos_ids = frozenset(range(len(tokenizer)))  # whatever it writes ends its answer
    alone = engine.generate(PROMPT, 20, method="target")[0]
    assert engine.generate(PROMPT, 20, threshold=0.5)[0].token_ids == alone.token_ids
    assert engine.generate(PROMPT, 20, threshold=0.0)[0].token_ids == []


@settings(max_examples=12, deadline=None)
@given(
    threshold=st.floats(0, 0.2),
    horizon=st.none() | st.just("segment") | st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
    batch_size=st.sampled_from([1, 3]),
    handback=st.sampled_from(["segment", "never"]),
)
def test_drafting_ahead_changes_no_answer(target, draft, tokenizer, batch_size, **ways):
    """What was drafted for nothing leaves no trace: neither in the draft's text nor in what is sampled next."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3, compile=False)
    assert not engine.pair.apart  # on one device nothing would be gained
    results = []
    for engine.pair.apart in (False, True):
        results.append(engine.generate([PROMPT, "the fig"], 14, seed=5, batch_size=batch_size, **ways))
    for one, other in zip(*results, strict=True):
        assert one.token_ids == other.token_ids
        assert [s.text for s in one.segments] == [s.text for s in other.segments]
        for name in ("rounds", "draft_tokens", "accepted_tokens", "target_tokens", "verify_passes"):
            assert getattr(one.stats, name) == getattr(other.stats, name)


def test_the_next_draft_is_written_before_the_verdicts_are_waited_for(target, draft, tokenizer, monkeypatch):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=3, compile=False)
    engine.pair.apart = True
    events = []

    def noting(name, call):
        return lambda *arguments: (events.append(name), call(*arguments))[1]

    for role, runner in runners_of(engine).items():
        monkeypatch.setattr(runner, "_run", noting(role, runner._run))
        monkeypatch.setattr(runner, "eos_ids", frozenset())
    monkeypatch.setattr("parse.round.accept", noting("accept", accept))
    engine.generate(PROMPT, 12, threshold=0.0, horizon=4)
    # prompts, 4 tokens (the last waits), the packed pass, 4 ahead of its verdicts, ...; nothing ahead of the last ones
    drafted = ["draft"] * 4
    assert events == [
        "target",
        *drafted,
        "target",
        *drafted,
        "accept",
        "target",
        *drafted,
        "accept",
        "target",
        "accept",
    ]


def test_sampling_repeats_by_its_seed(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)

    def answer(seed):
        return engine.generate(PROMPT, 20, threshold=0.2, temperature=1.0, seed=seed)[0].token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(5)}) > 1


def test_a_seed_gives_the_same_answer_whatever_the_other_prompts(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)
    ways = {"threshold": 0.2, "temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 3}
    alone = engine.generate(PROMPT, 20, **ways)[0].token_ids
    others = engine.generate(["the fig", PROMPT, "tea ; tea"], 20, **ways)
    assert others[1].token_ids == alone


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.9}])
def test_what_follows_an_accepted_prefix_is_distributed_as_the_targets(target, draft, tokenizer, options):
    """A chi-square test at 1 in 10,000 of the target's first own token after an accepted draft segment."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)
    context = fresh_context(engine)
    context.read(engine.encode(PROMPT))
    drafted = [9, 30, 51, 72]
    logits = run(verify_prefixes(engine, context, drafted, [2, 4], ended=False))[1][1]  # [V] after the first end
    logits = logits / logits.std() * 1.5
    temperature = 0.8
    plain = torch.softmax(logits / temperature, -1)
    order = plain.argsort(descending=True)
    kept = torch.zeros_like(plain, dtype=torch.bool)
    kept[order[: options.get("top_k") or len(order)]] = True
    expected = torch.where(kept, plain, 0) / plain[kept].sum()
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= options.get("top_p", 1.0)]] = 0
    expected /= expected.sum()
    sample = Sampling(temperature, **options, seed=11)
    counts = torch.bincount(torch.tensor([sample(logits) for _ in range(4000)]), minlength=len(plain))
    assert not counts[expected == 0].any()
    common = expected * 4000 >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    wanted = [*(expected[common] * 4000).tolist(), float(expected[~common].sum() * 4000)]
    terms = [(o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0]
    assert chi2.sf(sum(terms), len(terms) - 1) > 1e-4


def test_another_tokenizer_crosses_as_text(target, tokenizer, smollm):
    """The draft writes real text in real tokens; the target reads the same text in its own."""
    model, real = smollm
    engine = Engine(model, real, target, tokenizer, Likelihood())
    result = engine.generate("Say something.", 24, threshold=0.0)[0]
    alone = engine.generate("Say something.", 24, method="draft")[0]
    assert result.text[:20] == alone.text[:20]
    assert real.decode(result.token_ids) == result.text


QUESTIONS = ["What is the capital of France? Answer briefly.", "Name two primary colours."]


@pytest.mark.parametrize("question", QUESTIONS)
def test_invariants_on_a_real_chat_model(smollm, question):
    model, tokenizer = smollm
    engine = Engine(model, tokenizer, model, tokenizer, PromptVerifier.of(tokenizer))
    ids = engine.encode(question)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    expected = [token for token in expected if token not in engine.models["target"].runner.eos_ids]
    assert engine.generate(question, 24, threshold=1.1, horizon=12)[0].token_ids == expected
    assert engine.generate(question, 24, threshold=0.0)[0].token_ids == expected
    ends = [len(expected) // 2, len(expected)]
    confidences = engine.verify(ids, expected, ends)
    verifier = engine.verifier
    with torch.inference_mode():
        for end, confidence in zip(ends, confidences.tolist(), strict=True):
            logits = model(torch.tensor([ids + expected[:end] + verifier.suffix_ids])).logits[0, -1]
            yes, no = logits[verifier.yes_ids].logsumexp(0), logits[verifier.no_ids].logsumexp(0)
            assert confidence == pytest.approx(torch.sigmoid(yes - no).item(), abs=1e-4)
    context, plain = fresh_context(engine), fresh_context(engine)
    context.read(ids)
    run(verify_prefixes(engine, context, expected, ends, ended=False))
    plain.read([*ids, *expected])
    assert_same_cache(context, plain, tolerance=1e-3)


@pytest.mark.slow
def test_an_answer_takes_the_weights_the_caches_and_little_more(smollm, monkeypatch):
    """150 tokens from the draft, judged by all free evidence and a probe's states: the logits are 30 MB of it."""
    model, tokenizer = smollm
    probe = Probe(HazardHead(2 * model.config.hidden_size, 4).eval(), (10, 20))
    engine = Engine(model, tokenizer, model, tokenizer, probe, segments=10, compile=False)
    for runner in runners_of(engine).values():
        monkeypatch.setattr(runner, "eos_ids", frozenset())
    peak = peak_bytes(lambda: engine.generate("Tell me of the sea.", 150, threshold=0.0))
    caches = sum(t.nbytes for runner in runners_of(engine).values() for pair in runner.cache.buffers() for t in pair)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert peak + weights <= (weights + caches) * 1.15


def test_a_verifier_that_needs_what_the_target_cannot_give_is_refused(target, tokenizer, monkeypatch):
    """As a target behind a server gives no hidden states."""
    engine = Engine(target, tokenizer, verifier=Likelihood(), compile=False)
    monkeypatch.setattr(LocalModel, "provides", frozenset({"token_logprobs", "label_scores"}))
    engine.verifier = PromptVerifier.of(tokenizer)
    message = "the verifier 'probe' needs states, and this target gives label_scores, token_logprobs: use another kind"
    for verifier in (Probe(HazardHead(32, 4), (2,)), Probe(AttentiveHead(32, 4), (2,))):
        with pytest.raises(ValueError, match=message):
            engine.verifier = verifier
        with pytest.raises(ValueError, match=message):
            Engine(target, tokenizer, verifier=verifier, compile=False)
    assert isinstance(engine.verifier, PromptVerifier)
