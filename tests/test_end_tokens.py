"""End tokens: one event, however many; either model's, in a shared vocabulary; and the one that a draft learns."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer

from eval.checks import check_models, check_prompts
from parse import Engine
from parse.local.compiled import Compiled
from parse.local.evidence import token_divergence, token_evidence
from parse.local.loading import load_model, warn_of_unheeded
from parse.prompts import end_of_answer
from parse.scheduler import run
from parse.text import eos_ids
from parse.verifiers import Divergence, Likelihood
from recipes.pair import draft_tokenizer, first_draft
from recipes.schema import RecipeError, load_recipe
from tests.conftest import MODELS, fresh_context, random_model, runners_of, verify_prefixes
from tests.test_engine import PROMPT
from train.__main__ import main as train

QUESTION = "What is the capital of France? Answer briefly."


@pytest.mark.parametrize("ends", [[2], [2, 0], [0, 2], [2, 0, 1]])
def test_that_the_text_ends_counts_whichever_token_ends_it(smollm, ends):
    """SmolLM2 drafts for itself: it is sure that the answer ends, by its token 2, however many others may end it."""
    model, tokenizer = smollm
    engine = Engine(model, tokenizer, model, tokenizer, Likelihood("lowest", "segment"), compile=False)
    for runner in runners_of(engine).values():
        runner.eos_ids = frozenset(ends)
    result = engine.generate(QUESTION, 24, threshold=0.0)[0]
    assert result.finish_reason == "stop"
    context = fresh_context(engine)
    context.read(engine.encode(QUESTION))
    evidence, _ = run(verify_prefixes(engine, context, result.token_ids, [len(result.token_ids)], ended=True))
    with torch.inference_mode():
        logits = model(torch.tensor([[*engine.encode(QUESTION), *result.token_ids]])).logits[0, -1]
    log_probs = logits.log_softmax(-1)
    assert evidence.log_prob[-1].item() == pytest.approx(log_probs[ends].logsumexp(0).item(), abs=1e-3)
    assert evidence.margin[-1].item() == pytest.approx(0, abs=1e-3)  # nothing is likelier than that it ends
    assert result.segments[-1].confidence > 0.3  # 1e-6 where the least of the ends is asked for alone


def test_end_tokens_are_one_outcome_for_evidence_and_divergence():
    torch.manual_seed(0)
    logits, other = torch.randn(5, 9), torch.randn(4, 9)
    log_prob, _, margin = token_evidence(logits[0], logits[1:], torch.tensor([4, 5, 6]), [1, 2])
    assert len(log_prob) == 4
    end = logits[3].log_softmax(-1)[[1, 2]].logsumexp(0)
    torch.testing.assert_close(log_prob[3], end)
    torch.testing.assert_close(margin[3], torch.maximum(logits[3].log_softmax(-1).max(), end) - end)
    assert len(token_evidence(logits[0], logits[1:], torch.tensor([4, 5, 6]))[0]) == 3
    merged = token_divergence(logits[:4], other, [1, 2])
    both = [torch.cat([x[:, [0, *range(3, 9)]], x[:, [1, 2]].logsumexp(-1, keepdim=True)], -1) for x in (logits, other)]
    torch.testing.assert_close(merged, token_divergence(both[0][:4], both[1]))
    swapped = logits.clone()
    swapped[:, [1, 2]] = logits[:, [2, 1]]  # the same but for which of its ends a model prefers
    assert token_divergence(logits, swapped, [1, 2]).abs().max() < 1e-6
    assert token_divergence(logits, swapped).max() > 1e-3


def test_the_targets_end_tokens_end_a_draft_that_names_others(smollm):
    """A base model under a chat model: its own end is another, and it has learnt the chat model's too."""
    model, tokenizer = smollm
    base = copy.copy(model)
    base.generation_config = copy.deepcopy(model.generation_config)
    base.generation_config.eos_token_id = 0  # <|endoftext|>
    engine = Engine(model, tokenizer, base, tokenizer, Likelihood(), compile=False)
    assert engine.models["draft"].runner.eos_ids == {0, 2}
    assert engine.models["target"].runner.eos_ids == {2}
    alone = engine.generate(QUESTION, 40, method="target")[0]
    for ways in ({"threshold": 0.0}, {"method": "draft"}):
        result = engine.generate(QUESTION, 40, **ways)[0]
        assert result.finish_reason == "stop"
        assert result.token_ids == alone.token_ids


def test_an_end_token_of_the_same_spelling_ends_a_draft_with_other_tokens(smollm, target, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    draft = random_model("llama", len(other))
    engine = Engine(smollm[0], smollm[1], draft, other, Likelihood(), compile=False)
    assert other.convert_tokens_to_ids("<|im_end|>") in engine.models["draft"].runner.eos_ids
    assert other.eos_token_id in engine.models["draft"].runner.eos_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_survives_an_end_that_is_the_drafts_alone(target, draft, tokenizer, temperature):
    """What ends the draft is a token like others to the target: proposed and kept, it is written, and read later."""
    engine = Engine(target, tokenizer, target, tokenizer, compile=False)
    plain = engine.generate(PROMPT, 30, method="target", temperature=temperature, seed=3)[0]
    engine.models["draft"].runner.eos_ids = frozenset([*plain.token_ids[2:20:3], tokenizer.eos_token_id])
    result = engine.generate(PROMPT, 30, method="target", lookahead=4, temperature=temperature, seed=3)[0]
    assert len(result.token_ids) == len(plain.token_ids)
    if not temperature:
        assert result.token_ids == plain.token_ids


def test_the_draft_never_says_what_the_target_cannot_read(target, tokenizer):
    """Vocabularies padded to other sizes, as Qwen2.5's: 151,936 rows of 0.5B, 152,064 of 7B."""
    wide = random_model("llama", len(tokenizer) + 7, seed=5)
    with torch.no_grad():
        wide.lm_head.weight[len(tokenizer) :] *= 50  # it would say nothing else
    for compile in (False, True):
        engine = Engine(target, tokenizer, wide, tokenizer, Likelihood(), compile=compile)
        if compile:
            engine.models["draft"].runner.compiled = Compiled(wide, lambda graph, _, **__: graph, width=len(tokenizer))
        for ways in ({"threshold": 0.0}, {"threshold": 0.0, "temperature": 1.0, "seed": 1}, {"method": "draft"}):
            result = engine.generate(PROMPT, 12, **ways)[0]
            assert max(result.token_ids, default=0) < len(tokenizer)
    narrow = Engine(wide, tokenizer, target, tokenizer, Likelihood(), compile=False)  # and the other way round
    narrow.generate(PROMPT, 12, threshold=1.1)


def test_stop_strings_and_their_like_are_said_to_be_ignored(target):
    named = copy.copy(target)
    for field, value in (("stop_strings", ["###"]), ("sequence_bias", {(3,): 1.0}), ("num_beams", 4)):
        named.generation_config = copy.deepcopy(target.generation_config)
        setattr(named.generation_config, field, value)
        with pytest.warns(UserWarning, match=f"asks for {field}="):
            warn_of_unheeded(named)


def test_the_end_that_is_learnt_is_the_chat_templates(smollm):
    tokenizer = copy.deepcopy(smollm[1])
    assert end_of_answer({0, 2}, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"  # as Gemma 3's, whose turns end otherwise
    assert end_of_answer({0, 2}, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = None
    assert end_of_answer({0, 2}, tokenizer) == 0
    assert end_of_answer({1, 2}, tokenizer) == 1


@pytest.fixture
def pair(tmp_path, smollm):
    """Folders of a chat target with two end tokens, and of a base draft with the same tokens and no template."""
    _, tokenizer = smollm
    small = random_model("llama", len(tokenizer))
    base = copy.deepcopy(tokenizer)
    base.chat_template, base.eos_token = None, "<|endoftext|>"
    for name, own, ends in (("target", tokenizer, [2, 0]), ("draft", base, 0)):
        small.generation_config.eos_token_id = ends
        small.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    return [f"target={tmp_path / 'target'}", f"draft={tmp_path / 'draft'}"]


def test_a_draft_learns_with_the_targets_template_and_end(pair):
    """On-policy too: TRL renders the prompts with the draft's tokenizer."""
    recipe = load_recipe("recipes/quickstart.yaml", pair)
    model, tokenizer = first_draft(recipe)
    target = AutoTokenizer.from_pretrained(recipe.target)
    assert tokenizer.chat_template == target.chat_template
    assert tokenizer.eos_token_id == 2
    assert model.config.eos_token_id == 2
    assert model.generation_config.eos_token_id == [2, 0]
    assert eos_ids(model) == {0, 2}


def test_a_distilled_draft_names_the_end_that_it_learnt(tmp_path):
    """In its configuration, its generation configuration and its tokenizer, whatever the first one named."""
    draft = load_model(MODELS / "ledger-draft")
    draft.config.eos_token_id = draft.generation_config.eos_token_id = 4
    draft.save_pretrained(tmp_path / "draft")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ledger-draft")
    tokenizer.save_pretrained(tmp_path / "draft")
    words = ["answers.prompts=4", "answers.batch_size=4", "distill.trainer={max_steps: 1}", f"runs={tmp_path / 'runs'}"]
    words += ["engine.max_new_tokens=180"]
    assert train(["recipes/quickstart.yaml", "answers", "distill", *words, f"draft={tmp_path / 'draft'}"]) == 0
    folder = tmp_path / "runs" / "quickstart" / "draft"
    learnt = tokenizer.eos_token_id
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == learnt
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert learnt in (ends if isinstance(ends, list) else [ends])
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == learnt


def test_a_draft_that_names_no_end_is_refused_before_any_work(pair, tmp_path):
    """With tokens of its own, which the target's end is not among."""
    folder = tmp_path / "draft"
    endless = AutoTokenizer.from_pretrained(MODELS / "ledger-draft")
    endless.eos_token = None
    endless.save_pretrained(folder)
    with pytest.raises(RecipeError, match=f"draft: the tokenizer of {folder} names no end-of-sequence token"):
        draft_tokenizer(load_recipe("recipes/quickstart.yaml", pair))
    with pytest.raises(RecipeError, match="names no end-of-sequence token"):
        check_models(load_recipe("recipes/quickstart.yaml", pair))


def test_one_token_may_be_the_end_the_beginning_and_unknown(pair, tmp_path):
    """Granite's and OLMo 2's: it stands in every rendered prompt, and no word is unknown."""
    folder = tmp_path / "target"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is it?", "split": "answers"}\n')
    check_prompts(load_recipe("recipes/quickstart.yaml", [*pair, f"task={rows}"]), ["answers"])


def test_a_divergence_counts_ends_of_either_model_as_one(smollm):
    model, tokenizer = smollm
    engine = Engine(model, tokenizer, model, tokenizer, Divergence(), compile=False)
    engine.models["draft"].runner.eos_ids = frozenset([0, 2])
    ids = engine.encode(QUESTION)
    written = engine.generate(QUESTION, 24, method="draft")[0].token_ids
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 :]  # [N + 1, V]
    other = logits.clone()
    other[:, [0, 2]] = logits[:, [2, 0]]  # a draft that prefers another of the ends
    context = fresh_context(engine)
    context.read(ids)
    evidence, _ = run(verify_prefixes(engine, context, written, [len(written)], ended=True, draft_logits=other))
    assert evidence.divergence.abs().max() < 1e-3
