"""Draft and target with different tokenizers: the answer crosses as text, and no byte of it is lost."""

import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.bench.fakes import endless
from eval.tasks import TASKS, draw_prompts
from parse import Engine
from parse.text import encode_text, text_after, text_of
from parse.verifiers import Likelihood
from tests.conftest import random_model

TEXTS = [
    "👩‍🚀 é e\u0301 ❤️",
    "नमस्ते  दुनिया",
    " leading",
    "trailing \n\n",
    "a<|im_end|>b",
    "</s>",
    "<s> <|im_start|>user\n",
    "x = [1,  2]\t#",
]


@pytest.fixture(scope="session")
def bpe(smollm):
    """SmolLM2's: bytes, merged."""
    return smollm[1]


@pytest.fixture(scope="session")
def unigram():
    """Of the kind of Llama 2's and Gemma's: pieces with a mark for spaces, one put in front of a text, and bytes."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.train_from_iterator(draw_prompts(TASKS["restaurants"], "train", 400, seed=1), trainer)
    learnt = [(piece, score) for piece, score in json.loads(raw.to_str())["model"]["vocab"]]
    every_byte = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    raw.model = models.Unigram(learnt + every_byte, unk_id=0, byte_fallback=True)
    raw.pre_tokenizer = None
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names, additional_special_tokens=["<|im_end|>"])


@pytest.fixture(scope="session")
def crossing(bpe, unigram):
    """Engines whose target and draft speak differently, one each way."""
    pairs = []
    for mine, other in ((bpe, unigram), (unigram, bpe)):
        target, draft = (random_model("llama", len(t), layers=1, seed=len(t)) for t in (mine, other))
        pairs.append(Engine(target, mine, draft, other, Likelihood("mean", "segment"), segments=6, compile=False))
    return pairs


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=12)), min_size=1, max_size=4))
@example(parts=TEXTS)
@example(parts=["ab", "cd", " ef", "  gh"])
def test_text_crosses_piece_by_piece_without_loss(crossing, parts):
    """Each piece goes on from those before it, in words and in the middle of words."""
    parts = [part.encode("utf-8", "ignore").decode() for part in parts]
    for engine in crossing:  # SmolLM2's vocabulary lacks some bytes
        assume(all(part in text_after(encode_text(part, engine.tokenizer), engine.tokenizer) for part in parts))
    for engine in crossing:
        pieces = [encode_text(part, engine.draft_tokenizer) for part in parts]
        whole = [token for piece in pieces for token in engine.pair.to_target(piece)]
        expected = "".join(text_after(piece, engine.draft_tokenizer) for piece in pieces)
        assert text_after(whole, engine.tokenizer) == expected
        assert "".join(parts).replace(" ", "") == expected.replace(" ", "")  # but for spaces put in front


def test_what_looks_like_a_special_token_is_text(crossing):
    for engine in crossing:
        for look in ("<|im_end|>", "</s>", "<s>"):
            assert not set(engine.pair.to_target(encode_text(look, engine.draft_tokenizer))) & set(
                engine.tokenizer.all_special_ids
            )


@pytest.mark.parametrize("ways", [{"threshold": 0.0}, {"threshold": 1e-6}, {"threshold": 1e-6, "horizon": 7}])
def test_answers_keep_their_books_across_tokenizers(crossing, ways):
    for engine in crossing:
        result = engine.generate("Two colours?", 40, **ways)[0]
        assert len(result.token_ids) <= 40
        assert result.text == text_of(result.token_ids, engine.tokenizer)
        assert "".join(s.text for s in result.segments if s.accepted) == result.text
    assert all(r.text for r in (engine.generate("x", 10, threshold=0.0)[0] for engine in crossing))


def test_a_draft_stops_at_its_own_contexts_end(bpe, unigram):
    """Of 512 positions, which are learnt; the same words are other tokens to it than to the target."""
    target, draft = random_model("llama", len(bpe), layers=1), random_model("gpt2", len(unigram), layers=1)
    target.config.max_position_embeddings = 2048
    engine = Engine(target, bpe, draft, unigram, Likelihood(), segments=6, compile=False)
    for words, drafts in (("x = [1,  2] 👩‍🚀 " * 20, True), ("x = [1,  2] 👩‍🚀 " * 30, False)):
        room = 512 - len(engine.encode_for_draft(words))
        assert (0 < room < 100) == drafts
        with endless(engine):
            result = engine.generate(words, 300, threshold=0.0)[0]
        assert len(result.token_ids) == 300
        assert bool(result.stats.draft_tokens) == drafts
