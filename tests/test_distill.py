"""How a draft is made: where it begins, the ways to distil and to align, guards, and going on after a kill."""

import importlib
import json
import math

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

import train.align
import train.distill
from eval.checks import check_models
from parse import Engine
from parse.local.loading import load_model
from parse.prompts import encode_prompt
from recipes.pair import _texts, first_draft, with_layers
from recipes.schema import RecipeError, load_recipe
from recipes.vocabulary import byte_level_tokenizer
from tests.conftest import LEDGER_PROMPTS, MODELS, QUICK, open_run, random_model, told
from train.logits import collate, divergence, likely_tokens, unpack
from train.trainers import AnswerTrainer
from train.trial import try_distill

STEPS = ["distill.trainer={max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1e-3, logging_steps: 1}"]


def finished(stage, recipe):
    """The folder that a stage writes."""
    torch.manual_seed(recipe.seed)
    with open_run(recipe) as run:
        importlib.import_module(f"train.{stage}").run(recipe, run)
        return run.path(stage)


def distilled(recipe):
    return finished("distill", recipe)


def losses(folder):
    return [log["loss"] for log in json.loads((folder / "losses.json").read_text())]


def weights(source):
    return dict(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).named_parameters())


def changed(one, other):
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.mark.parametrize("method", ["sequence", "logits", "on_policy"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_every_method_gives_a_plain_folder(begin, method, lora):
    folder = distilled(begin(*STEPS, f"distill.method={method}", f"distill.lora={json.dumps(lora)}"))
    files = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "losses.json"} <= files
    assert not [name for name in files if name.endswith(".bin") or "adapter" in name or name.startswith(".")]
    assert all(math.isfinite(loss) for loss in losses(folder))
    assert len(losses(folder)) == 6
    moved = changed(weights(MODELS / "ledger-draft"), weights(folder))
    assert moved if lora is None else moved and not [name for name in moved if "wte" in name or "norm" in name]


def test_sequence_and_logits_learn(begin):
    for method in ("sequence", "logits"):
        words = ["distill.trainer={max_steps: 30, learning_rate: 2e-3, logging_steps: 5, save_strategy: 'no'}"]
        found = losses(distilled(begin(*words, f"distill.method={method}", f"name={method}")))
        assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("count", [None, 40])
def test_on_a_cpu_the_loss_is_that_of_trl(begin, count):
    """Rows of several lengths, of which each learns its end: with logits of the answers' tokens alone."""
    recipe = begin(*STEPS)
    model, tokenizer = first_draft(recipe)
    answers = load_from_disk(recipe.folder / "answers")
    losses = []
    for kind in (AnswerTrainer, SFTTrainer):
        rows = train.distill.examples(recipe, answers, tokenizer)
        config = train.distill.trainer_config(recipe, str(recipe.folder / "out"))
        trainer = kind(model=model, args=config, processing_class=tokenizer, train_dataset=rows)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        losses.append(trainer.compute_loss(model, batch, num_items_in_batch=count))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_a_lora_that_is_not_merged_is_a_peft_folder(begin):
    recipe = begin(*STEPS, "distill.lora={r: 2}", "distill.merge=false")
    folder = distilled(recipe)
    files = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "losses.json"} <= files
    assert "model.safetensors" not in files
    merged = distilled(begin(*STEPS, "distill.lora={r: 2}", "name=merged"))
    torch.testing.assert_close(dict(load_model(folder).named_parameters()), dict(load_model(merged).named_parameters()))


def test_a_lora_goes_on_learning(begin):
    """It begins with what the first one learnt, and ends as one LoRA of the same rank over the same model."""
    steps = "distill.trainer={max_steps: 8, learning_rate: 2e-3, logging_steps: 1, save_strategy: 'no'}"
    first = distilled(begin(steps, "distill.lora={r: 4}", "distill.merge=false", "name=first"))
    more = distilled(begin(steps, f"distill.lora_from={first}", "distill.merge=false", "name=more"))
    assert losses(more)[0] < losses(first)[0]
    read = lambda folder: load_file(folder / "adapter_model.safetensors")
    before, after = read(first), read(more)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((more / "adapter_config.json").read_text())["inference_mode"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill.lora_from=recipes/models/ledger-draft"], "is no PEFT folder"),
        (["distill.lora_from=nowhere"], "is no PEFT folder"),
        (["distill.lora_from=nowhere", "distill.lora={r: 2}"], "keep one of them"),
    ],
)
def test_a_lora_that_cannot_go_on_is_refused(words, said):
    with pytest.raises(RecipeError, match=said):
        try_distill(load_recipe(QUICK, words))


def test_a_lora_of_a_model_of_other_sizes_is_refused(begin, tmp_path):
    folder = distilled(begin("distill.trainer={max_steps: 1}", "distill.lora={r: 4}", "distill.merge=false"))
    try_distill(load_recipe(QUICK, [f"distill.lora_from={folder}"]))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor[:, :3].contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(RecipeError, match="was learnt on another model than the draft: its .* has the shape"):
        try_distill(load_recipe(QUICK, [f"distill.lora_from={folder}"]))


def test_kept_logits_are_the_targets(tmp_path, begin):
    recipe = begin()
    answers = load_from_disk(recipe.folder / "answers")
    target = load_model(recipe.target)
    kept = likely_tokens(tmp_path / "likely", target, answers, k=5)
    row = kept[3]
    ids, start = torch.tensor(row["input_ids"]), row["completion_mask"].index(1)
    with torch.inference_mode():
        expected = target(ids[None]).logits[0, start - 1 : -1].float().log_softmax(-1)  # [C, V]
    tokens, log_probs = unpack(row["likely"], sum(row["completion_mask"]))
    assert torch.equal(tokens, expected.topk(5).indices)
    torch.testing.assert_close(log_probs, expected.topk(5).values, atol=2e-3, rtol=2e-3)
    batch = collate([kept[3], kept[4]], pad=0)
    assert batch["likely_ids"].shape == (*batch["labels"].shape, 5)
    learnt = batch["labels"][0, 1:] != -100  # position t holds what follows token t
    assert torch.equal(batch["likely_ids"][0, :-1][learnt], tokens)


def test_divergence_is_kl_over_the_kept_tokens_and_the_rest():
    target, draft = torch.randn(4, 9), torch.randn(4, 9)
    p, q = target.softmax(-1), draft.softmax(-1)
    every = divergence(draft, torch.arange(8).expand(4, 8), p.log()[:, :8])  # the ninth is the rest
    torch.testing.assert_close(every, (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-4)
    assert divergence(target, *reversed(p.log().topk(3))).abs().max() < 1e-5
    some, ids = p.log().topk(3)
    assert (divergence(draft, ids, some) <= every + 1e-6).all()  # joining outcomes never adds


def test_a_draft_can_be_the_target_with_fewer_layers(begin):
    target = load_model(MODELS / "ledger-target")
    recipe = begin("draft={layers: 3}", *STEPS)
    draft, _ = first_draft(recipe)
    assert draft.config.num_hidden_layers == len(draft.model.layers) == 3
    for own, index in zip(draft.model.layers, (0, 6, 11), strict=True):
        assert torch.equal(own.mlp.up_proj.weight, target.model.layers[index].mlp.up_proj.weight)
    folder = distilled(recipe)
    engine = Engine.from_pretrained(recipe.target, folder, "likelihood", compile=False)
    assert engine.generate(LEDGER_PROMPTS[0], 20, method="draft")[0].token_ids


def test_every_layer_kept_is_the_model_itself():
    model = random_model("llama", 40, layers=3)
    ids = torch.arange(2, 12)[None]
    expected = model(ids).logits
    torch.testing.assert_close(with_layers(model, 3)(ids).logits, expected)


def test_a_draft_can_be_new(begin):
    config = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    recipe = begin(f"draft={{config: {config}}}", *STEPS)
    draft, tokenizer = first_draft(recipe)
    assert draft.config.vocab_size == len(tokenizer)
    assert draft.config.eos_token_id == tokenizer.eos_token_id
    assert len(losses(distilled(recipe))) == 6


def test_a_new_draft_may_learn_a_vocabulary_of_its_own(begin, monkeypatch):
    """From prompts and answers, the same each time; its answers cross as text."""
    config = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    recipe = begin(f"draft={{config: {config}, tokenizer: {{vocab_size: 300}}}}", *STEPS)
    check_models(recipe)
    try_distill(recipe)
    folder = distilled(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert (
        byte_level_tokenizer(_texts(load_from_disk(recipe.folder / "answers")), 300).get_vocab()
        == tokenizer.get_vocab()
    )
    for text in (told(LEDGER_PROMPTS[0]), "  Ünïcode,\n tabs\t and 🙂 "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    prompt = encode_prompt("a <|end|> b", tokenizer)  # a control token in a prompt is text
    assert tokenizer.eos_token_id not in prompt
    assert tokenizer.decode(prompt) == "<|user|>a <|end|> b<|assistant|>"
    engine = Engine.from_pretrained(recipe.target, folder, "likelihood", compile=False)
    assert not engine.same_tokens
    result = engine.generate(LEDGER_PROMPTS[0], 20, threshold=0.0)[0]
    assert result.stats.draft_tokens
    with pytest.raises(RecipeError, match="draft.tokenizer is for a draft with a `config`"):
        begin("draft={layers: 3, tokenizer: {vocab_size: 300}}")
    with pytest.raises(RecipeError, match="vocab_size"):
        begin(f"draft={{config: {config}, tokenizer: {{vocab_size: 100}}}}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draft={layers: 13}"], "draft.layers is 13: the target has 12 layers"),
        (["draft={config: {hidden_size: 8}}"], "draft.config is refused"),
        (["draft={config: {model_type: lama}}"], "draft.config is refused"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(begin, words, message):
    with pytest.raises(RecipeError, match=message):
        first_draft(begin(*words))


def test_other_tokens_are_learnt_from_the_text(begin, smollm):
    recipe = begin()
    answers = load_from_disk(recipe.folder / "answers")
    tokenizer = smollm[1]
    row = train.distill.examples(recipe, answers, tokenizer)[0]
    learnt = [id for id, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(learnt) == told(LEDGER_PROMPTS[0]) + tokenizer.eos_token
    same = train.distill.examples(recipe, answers, AutoTokenizer.from_pretrained(recipe.draft))
    assert same[0]["input_ids"] == answers[0]["input_ids"]


def test_a_begun_answer_is_one_message_of_a_conversation():
    asked = [{"role": "user", "content": "q"}]
    whole = [*asked, {"role": "assistant", "content": "It is 4"}]
    assert train.distill.conversation([*asked, {"role": "assistant", "content": "It is"}], " 4") == whole
    assert train.distill.conversation("q", "It is 4") == whole


@pytest.mark.slow
def test_a_draft_with_other_tokens_learns_by_gold(begin, smollm, tmp_path):
    """Two small models with random weights; the target has SmolLM2's tokens, the draft fewer, made from the answers."""
    words = ["distill.method=gold", "distill.trainer={max_steps: 2, per_device_train_batch_size: 2, max_length: 400}"]
    tokenizer = smollm[1]
    model = random_model("llama", len(tokenizer))
    model.save_pretrained(tmp_path / "smollm")
    tokenizer.save_pretrained(tmp_path / "smollm")
    other = tokenizer.train_new_from_iterator([told(prompt) for prompt in LEDGER_PROMPTS], 600)
    draft = random_model("llama", len(other))
    draft.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    recipe = begin(*words, f"target={tmp_path}/smollm", f"draft={tmp_path}/other")
    assert all(math.isfinite(loss) for loss in losses(distilled(recipe)))
    with pytest.raises(RecipeError, match=r"use distill.method=sequence or gold"):
        distilled(begin("distill.method=logits", f"target={tmp_path}/smollm", f"draft={tmp_path}/other", "name=b"))
