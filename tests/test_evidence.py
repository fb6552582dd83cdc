"""The evidence that verifiers learn from: what is read back from the disk is what the passes told."""

import torch

from eval.verifier_metrics import Draft, examine
from parse import Engine
from parse.verifiers import Needs
from train.evidence import gather

DRAFTS = [
    Draft(list(range(5, 17)), list(range(20, 33)), [4, 9, 13], False, [True] * 3, number=0),
    Draft(list(range(8, 13)), list(range(40, 47)), [3, 7], True, [True] * 2, number=1),
    Draft(list(range(5, 17)), list(range(25, 33)), [8], True, [False], number=0),
]


NEEDS = Needs(token_logprobs=True, layers=(1, 3), context_states=True)


def engine_of(target, tokenizer):
    return Engine(target, tokenizer, compile=False)


def same(mine, theirs):
    assert mine.draft == theirs.draft
    for name in ("log_prob", "entropy", "margin"):
        assert torch.equal(getattr(mine.evidence, name), getattr(theirs.evidence, name))
    for name in ("states", "context_states"):
        kept, told = getattr(mine.evidence, name), getattr(theirs.evidence, name)
        assert kept.dtype == torch.float16
        assert torch.equal(kept, told.half())


def test_what_is_kept_is_what_the_passes_told(target, tokenizer, tmp_path):
    engine = engine_of(target, tokenizer)
    told = {tuple(one.draft.ids): one for one in examine(engine, DRAFTS, NEEDS)}
    kept = gather(engine, DRAFTS, NEEDS, tmp_path, "evidence")
    assert [one.draft for one in kept] == DRAFTS
    for one in kept:
        same(one, told[tuple(one.draft.ids)])


def test_drafts_after_the_same_text_are_judged_as_each_alone(target, tokenizer):
    engine = engine_of(target, tokenizer)
    together = {tuple(one.draft.ids): one.evidence for one in examine(engine, DRAFTS, NEEDS)}
    for draft in DRAFTS:
        alone = next(examine(engine, [draft], NEEDS)).evidence
        for name in ("log_prob", "states", "context_states"):
            mine, theirs = getattr(together[tuple(draft.ids)], name), getattr(alone, name)
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_what_stands_before_several_drafts_is_kept_once(target, tokenizer, tmp_path):
    gather(engine_of(target, tokenizer), DRAFTS, NEEDS, tmp_path, "evidence")
    (states,) = tmp_path.glob("*.f16")
    tokens = sum(len(draft.ids) for draft in DRAFTS) + 12 + 5
    assert states.stat().st_size == tokens * 2 * target.config.hidden_size * 2


def test_a_start_goes_on_after_what_was_kept(target, tokenizer, tmp_path, monkeypatch):
    """A line without its states, or half a line, is none; what is whole is not read again."""
    engine = engine_of(target, tokenizer)
    whole = gather(engine, DRAFTS, NEEDS, tmp_path / "whole", "evidence")
    gather(engine, DRAFTS[:2], NEEDS, tmp_path / "cut", "evidence")
    (states,), (index,) = (tmp_path / "cut").glob("*.f16"), (tmp_path / "cut").glob("*.jsonl")
    states.write_bytes(states.read_bytes()[:-2])  # the second draft's last state
    index.write_text(index.read_text() + '["half a l')
    asked = []
    monkeypatch.setattr(
        "train.evidence.examine", lambda *rest, **options: asked.extend(rest[1]) or examine(*rest, **options)
    )
    again = gather(engine, DRAFTS, NEEDS, tmp_path / "cut", "evidence")
    assert asked == DRAFTS[1:]
    for mine, theirs in zip(again, whole, strict=True):
        for name in ("states", "context_states"):
            torch.testing.assert_close(getattr(mine.evidence, name), getattr(theirs.evidence, name))


def test_without_layers_there_are_no_states(target, tokenizer, tmp_path):
    kept = gather(engine_of(target, tokenizer), DRAFTS, Needs(token_logprobs=True), tmp_path, "evidence")
    assert all(one.evidence.states is None and one.evidence.context_states is None for one in kept)
    assert len(kept[1].evidence.log_prob) == 8  # and the end
