"""Verifiers: what each kind reads, what is saved, and what is refused."""

import copy
import dataclasses
import json

import pytest
import torch

from eval.verifier_metrics import Draft, all_needs, examine
from parse import Engine
from parse.local.evidence import token_divergence, token_evidence
from parse.scheduler import run
from parse.verifiers import Calibration, Divergence, Evidence, Likelihood, Probe, PromptVerifier, label_scores
from parse.verifiers.heads import AttentiveHead, HazardHead, token_inputs
from parse.verifiers.saved import fingerprint, load, save
from tests.conftest import facts_of, fresh_context, peak_bytes, random_model, verify_prefixes


def evidence(ended=True, n=6, width=4):
    m = n + ended
    return Evidence(
        ends=[2, 4, n],
        log_prob=-torch.arange(1.0, m + 1),
        entropy=torch.ones(m),
        margin=torch.zeros(m),
        states=torch.randn(n, width),
        layers=(1,),
    )


def test_the_end_of_sequence_counts_in_the_last_segment():
    assert evidence(ended=True).bounds == [(0, 2), (2, 4), (4, 7)]
    assert evidence(ended=False).bounds == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize(
    ("rule", "scope", "expected"),
    [
        ("mean", "segment", [-1.5, -3.5, -6.0]),
        ("mean", "prefix", [-1.5, -2.5, -4.0]),
        ("lowest", "segment", [-2.0, -4.0, -7.0]),
        ("lowest", "prefix", [-2.0, -4.0, -7.0]),
    ],
)
def test_likelihood_rules(rule, scope, expected):
    confidences = Likelihood(rule, scope).confidences(evidence())
    torch.testing.assert_close(confidences, torch.tensor(expected).exp())


def test_lowest_so_far_never_rises():
    given = evidence()
    object.__setattr__(given, "log_prob", torch.tensor([-1.0, -9.0, -1.0, -1.0, -1.0, -1.0, -1.0]))
    confidences = Likelihood("lowest", "prefix").confidences(given)
    assert len(set(confidences.tolist())) == 1
    assert Likelihood("lowest", "segment").confidences(given)[1] > confidences[1]


def test_divergence_is_how_far_the_draft_is_from_the_target():
    target, draft = torch.randn(70, 30) * 2, torch.randn(70, 30) * 2
    own = torch.nn.functional.kl_div(target.log_softmax(-1), draft.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(token_divergence(target, draft), own.sum(-1))
    assert token_divergence(target, target).abs().max() < 1e-5
    padded = torch.nn.functional.pad(draft, (0, 4))  # rows of nothing, as some models have more of them than others
    torch.testing.assert_close(token_divergence(target, padded), own.sum(-1))
    given = dataclasses.replace(evidence(), divergence=torch.tensor([0.5, 0.1, 2.0, 1.0, 0.0, 0.0, 3.0]))
    mean, most = Divergence("mean", "segment"), Divergence("lowest", "prefix")
    torch.testing.assert_close(mean.confidences(given), torch.tensor([-0.3, -1.5, -1.0]).exp())
    torch.testing.assert_close(most.confidences(given), torch.tensor([-0.5, -2.0, -3.0]).exp())


def test_the_engine_reads_the_drafts_distribution_where_the_tokens_are_the_same(target, draft, tokenizer):
    """The divergence of each token, the end of sequence among them, from separate plain passes."""
    engine = Engine(target, tokenizer, target, tokenizer, Divergence(), compile=False)
    one = Draft(list(range(5, 12)), list(range(20, 26)), [2, 6], True, [True, True])
    same = next(examine(engine, [one], all_needs(engine), with_draft=True)).evidence
    assert same.divergence.shape == (7,)
    assert same.divergence.abs().max() < 1e-4
    engine = Engine(target, tokenizer, draft, tokenizer, Divergence(), compile=False)
    evidence = next(examine(engine, [one], all_needs(engine), with_draft=True)).evidence
    ids = torch.tensor([[*one.context_ids, *one.ids]])
    with torch.inference_mode():
        expected = token_divergence(target(ids).logits[0, 6:], draft(ids).logits[0, 6:])
    torch.testing.assert_close(evidence.divergence, expected, atol=1e-4, rtol=1e-4)


def test_yes_is_weighed_against_no():
    logits = torch.randn(3, 10)
    yes = torch.softmax(logits, -1)[:, [3, 4]].sum(-1)
    no = torch.softmax(logits, -1)[:, 5]
    scores = label_scores(logits, PromptVerifier([1], yes_ids=[3, 4], no_ids=[5]).labels)
    torch.testing.assert_close(scores, yes / (yes + no))


def test_prompt_asks_in_the_chat_template(tokenizer):
    verifier = PromptVerifier.of(tokenizer)
    assert tokenizer.decode(verifier.suffix_ids) == "<|end|> <|user|> right ? <|end|> <|assistant|>"
    assert [tokenizer.decode(i) for i in verifier.yes_ids] == ["yes"]
    assert [tokenizer.decode(i) for i in verifier.no_ids] == ["no"]


def test_prompt_needs_a_chat_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        PromptVerifier.of(plain)


def test_prompt_on_a_real_chat_model(smollm):
    verifier = PromptVerifier.of(smollm[1])
    text = smollm[1].decode(verifier.suffix_ids)
    assert text.startswith("<|im_end|>\n<|im_start|>user\nIs the answer above correct so far")
    assert text.endswith("<|im_start|>assistant\n")
    assert len(verifier.yes_ids) > 1


def test_the_probe_is_a_chance_of_survival():
    torch.manual_seed(0)
    head = HazardHead(4, 4).eval()
    given = evidence()
    confidences = Probe(head, (1,)).confidences(given)
    states, columns = token_inputs(given)
    assert states.shape == (7, 4)
    assert columns[:, 3].tolist() == [0] * 6 + [1]
    torch.testing.assert_close(states[6], states[5])
    chances = torch.exp(-head(states, columns))  # of getting past each token
    torch.testing.assert_close(confidences, chances.cumprod(0)[[1, 3, 6]])
    assert confidences.tolist() == sorted(confidences.tolist(), reverse=True)


@pytest.fixture(params=[HazardHead, AttentiveHead])
def saved(request, tmp_path, target, tokenizer):
    torch.manual_seed(1)
    probe = Probe(request.param(96, 4).eval(), (2, 3), threshold=0.7)
    save(tmp_path, probe, target, facts_of(tokenizer))
    return tmp_path, probe


def test_what_is_saved_loads_to_the_same_verdicts(saved, target, tokenizer, draft):
    folder, probe = saved
    loaded = load(folder, target, tokenizer)
    assert loaded.calibration.segments == "sentence"
    assert loaded.threshold == 0.7
    engine = Engine(target, tokenizer, draft, tokenizer, probe)
    ids = list(range(5, 40))
    mine = engine.verify(ids, ids, [3, 35])
    engine.verifier = loaded
    torch.testing.assert_close(engine.verify(ids, ids, [3, 35]), mine)


def test_the_engine_takes_the_segmenter_from_the_verifier(saved, target, tokenizer, draft):
    make = lambda **options: Engine.from_pretrained(target, draft, saved[0], tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match="was trained on 'sentence'"):
        make(draft_tokenizer=tokenizer, segments=7)
    assert make(draft_tokenizer=tokenizer).segments == "sentence"


def test_another_base_or_tokenizer_is_refused(saved, target, draft, tokenizer):
    with pytest.raises(ValueError, match="was trained on .* and the target is"):
        load(saved[0], draft, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "other"
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        load(saved[0], target, other)


def test_a_verifier_that_is_not_there(tmp_path, target, tokenizer):
    with pytest.raises(FileNotFoundError, match='no such verifier; use "prompt"'):
        load(tmp_path, target, tokenizer)


@pytest.mark.parametrize("verifier", [Likelihood("mean", "segment", 0.3), "prompt"])
def test_untrained_kinds_are_saved_with_their_threshold(tmp_path, target, tokenizer, verifier):
    verifier = PromptVerifier.of(tokenizer, 0.3) if verifier == "prompt" else verifier
    save(tmp_path, verifier, target, facts_of(tokenizer, 4))
    assert json.loads((tmp_path / "verifier.json").read_text())["kind"] == verifier.kind
    loaded = load(tmp_path, target, tokenizer)
    assert dataclasses.replace(loaded, calibration=None) == verifier


def test_the_fingerprint_survives_a_cast_and_notices_a_change(target):
    cast = copy.deepcopy(target).to(torch.bfloat16)
    rounded = copy.deepcopy(cast).float()
    assert fingerprint(target) == fingerprint(cast) == fingerprint(rounded)
    with torch.no_grad():
        next(rounded.parameters()).add_(0.5)
    assert fingerprint(rounded) != fingerprint(target)


def test_token_evidence_is_that_of_the_whole_distribution():
    """Row by row against log-softmax over everything; more rows than are worked on at a time."""
    logits, tokens = torch.randn(150, 40) * 3, torch.randint(0, 40, (150,))
    log_prob, entropy, margin = token_evidence(logits[0], logits[1:], tokens)
    expected = torch.log_softmax(logits, -1)
    own = expected.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_prob, own)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(margin, expected.amax(-1) - own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize(("verifier", "rows"), [(Likelihood(), 300), (PromptVerifier([7, 8], [9], [10]), 2 * 3 + 2)])
def test_no_more_logits_are_made_than_are_read(verifier, rows, read_before, tokenizer):
    """The peak of a packed pass over 300 draft tokens: the logits that are read, and a third more at most.

    Of a prompt that it reads as well, those after its last token.
    """
    vocabulary = 30_000
    model = random_model("llama", vocabulary)
    engine = Engine(model, tokenizer, verifier=verifier, compile=False)
    context = fresh_context(engine)
    prompt = [token % 50 + 5 for token in range(200)]
    run(context.prefill(prompt) if read_before else context.defer(prompt))
    peak = peak_bytes(lambda: run(verify_prefixes(engine, context, list(range(30, 330)), [100, 200, 290], ended=False)))
    others = 8e6  # hidden states, masks, keys and values
    assert peak <= 4 * vocabulary * rows * 4 / 3 + others


def test_a_threshold_holds_for_what_it_was_calibrated_for(tmp_path, target, draft, tokenizer):
    facts = facts_of(tokenizer, 4, thresholds={"longest": 0.6}, handback="never", horizon=8)
    save(tmp_path, Likelihood(threshold=0.4), target, facts)
    engine = Engine.from_pretrained(target, draft, tmp_path, tokenizer=tokenizer, draft_tokenizer=tokenizer)
    met = {"handback": "never", "horizon": 8}
    assert engine.settings(**met).threshold == 0.5
    assert engine.settings(**met, policy="longest").threshold == 0.6
    assert engine.settings(policy="whole", horizon=8).threshold == 0.5  # lets the target write to the end anyway
    for other in ({"handback": "segment"}, {"horizon": None}, {"horizon": 9}, {"horizon": "segment"}):
        with pytest.raises(ValueError, match="and the verifier's threshold was calibrated for"):
            engine.settings(**(met | other))
        assert engine.settings(**(met | other), threshold=0.7).threshold == 0.7  # the user's own
    with pytest.raises(ValueError, match="calibrated for"):
        engine.settings(policy="whole")


def test_other_end_tokens_are_refused(tmp_path, target, tokenizer):
    save(tmp_path, Likelihood(), target, facts_of(tokenizer) | {"end_ids": [0, 1]})
    with pytest.raises(
        ValueError, match=r"answers that end with the tokens \[0, 1\], and the target's now end with \[1\]"
    ):
        load(tmp_path, target, tokenizer)


@pytest.mark.parametrize("damage", ["json", "key", "list", "head cut", "head missing", "head of another size"])
def test_a_damaged_verifier_is_named(saved, target, tokenizer, damage):
    folder, _ = saved
    record = json.loads((folder / "verifier.json").read_text())
    text = {"json": "{", "key": json.dumps({"kind": "probe"}), "list": "[]"}.get(damage)
    if damage == "head of another size":
        text = json.dumps(record | {"head": {"width": 8, "evidence": 4, "hidden": 128}})
    if text is not None:
        (folder / "verifier.json").write_text(text)
    head = folder / "head.safetensors"
    if damage == "head cut":
        head.write_bytes(head.read_bytes()[:-50])
    if damage == "head missing":
        head.unlink()
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"(?s)is damaged .* run the stage `verifier` again|head.safetensors"
    ):
        load(folder, target, tokenizer)


def test_calibrations_are_plain_data():
    calibration = Calibration({"first_fail": 0.5}, "segment", None, "line")
    assert calibration.threshold("first_fail", "segment", None, "line") == 0.5
    with pytest.raises(
        ValueError, match=r"^horizon=8 and segments='sentence', and .* calibrated for horizon=None and segm"
    ):
        calibration.threshold("first_fail", "segment", 8, "sentence")
