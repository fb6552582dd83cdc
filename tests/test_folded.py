"""The folded probe: what it learns, and that two rows of the LM head tell what it tells."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eval.verifier_metrics import Draft, Example, Scored, measure
from parse import Engine
from parse.__main__ import main
from parse.remote.fold import fold
from parse.verifiers import Evidence, Folded
from parse.verifiers.heads import LinearHead, survival
from parse.verifiers.saved import load, save, tokenizer_hash
from recipes.verifier_schema import FoldedSection
from train.verifier_training import FoldedModule, fit

PROMPT, DRAFT, ENDS = list(range(5, 15)), list(range(20, 32)), [3, 7, 12]
KINDS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "tied": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
    "gpt2": {"model_type": "gpt2"},  # its embedding and head are one weight, by other names
    "phi": {"model_type": "phi"},  # its head has a bias
}


def model_of(kind, tokenizer):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    own = dict(KINDS[kind])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **sizes, **ends, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A target's folder and that of a folded verifier for it."""

    def make(kind="llama", **options):
        model = model_of(kind, tokenizer)
        target, verifier = tmp_path / "target", tmp_path / "verifier"
        model.save_pretrained(target, **options)
        tokenizer.save_pretrained(target)
        head = LinearHead(32)
        torch.nn.init.normal_(head.weight, std=0.5)
        torch.nn.init.constant_(head.bias, 0.7)
        depth, rows = model.config.num_hidden_layers, len(tokenizer)
        calibration = {"handback": "segment", "horizon": None}
        facts = {"tokenizer": tokenizer_hash(tokenizer), "end_ids": [2], "segments": "sentence", "thresholds": {}}
        loaded = AutoModelForCausalLM.from_pretrained(target)
        save(verifier, Folded(head, depth, (rows, rows + 1)), loaded, facts | {"calibration": calibration})
        return target, verifier

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_of_the_head_tell_what_the_probe_tells(kind, saved, tokenizer, tmp_path):
    target, verifier = saved(kind)
    fold(str(target), verifier, tmp_path / "folded")
    ours = Engine.from_pretrained(target, verifier=verifier)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert theirs.config.folded_labels == [len(tokenizer), len(tokenizer) + 1]
    served = Engine(theirs, AutoTokenizer.from_pretrained(tmp_path / "folded"))
    told = ours.verify(PROMPT, DRAFT, ENDS)
    assert torch.allclose(told, served.verify(PROMPT, DRAFT, ENDS, replace(ours.verifier, served=True)), atol=1e-5)
    assert 0 < told.min() < told.max() < 1
    ids = torch.tensor([PROMPT])
    plain = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    assert torch.allclose(theirs(ids).logits[..., : plain.shape[-1]], plain, atol=1e-5)  # all else is as it was


def test_only_the_files_of_the_head_are_written_anew(saved, tmp_path):
    target, verifier = saved(max_shard_size="20KB")
    fold(str(target), verifier, tmp_path / "folded")
    index = json.loads((tmp_path / "folded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    changed = {index["model.embed_tokens.weight"], index["lm_head.weight"]}
    for file in {*index.values()}:
        assert os.path.samefile(target / file, tmp_path / "folded" / file) == (file not in changed)
        assert (target / file).stat().st_mode == (tmp_path / "folded" / file).stat().st_mode
    assert len({*index.values()} - changed) > 2
    assert len(load_file(target / index["lm_head.weight"])["lm_head.weight"]) == len(
        AutoTokenizer.from_pretrained(target)
    )  # the target's own is as it was


def test_the_command_folds_the_runs_verifier_beside_the_chosen_one(saved, tmp_path, capsys):
    target, verifier = saved()
    run = tmp_path / "run"
    (run / "verifier" / "others").mkdir(parents=True)
    verifier.rename(run / "verifier" / "others" / "folded")
    (run / "verifier" / "verifier.json").write_text(
        json.dumps({"kind": "probe", "base": "", "tokenizer": "", "threshold": 0})
    )
    (run / "recipe.yaml").write_text(f"target: {target}\nstages: [verifier]\nengine: {{}}\n")
    assert main(["fold", str(run), str(tmp_path / "folded")]) == 0
    assert "serve this folder" in capsys.readouterr().out
    assert main(["fold", str(run), str(tmp_path / "folded")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("quantised", r"hold no lm_head.weight but lm_head.qweight .*quantised head"),
        ("scaled", "its logits are changed by final_logit_softcapping"),
        ("other rows", "it was made for another target"),
        ("pickled", "a folder with safetensors is needed"),
    ],
)
def test_a_head_that_cannot_hold_the_rows_is_refused(damage, message, saved, tmp_path):
    from safetensors.torch import save_file

    target, verifier = saved()
    weights, config = target / "model.safetensors", json.loads((target / "config.json").read_text())
    tensors = load_file(weights)
    if damage == "quantised":
        tensors["lm_head.qweight"] = tensors.pop("lm_head.weight").clone()
        save_file(tensors, weights)
    if damage == "scaled":
        (target / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    if damage == "other rows":
        record = json.loads((verifier / "verifier.json").read_text())
        (verifier / "verifier.json").write_text(json.dumps(record | {"labels": [3, 4]}))
    if damage == "pickled":
        weights.rename(target / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        fold(str(target), verifier, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_folded_probe_is_loaded_as_it_was_saved(saved, tokenizer):
    target, folder = saved()
    verifier = load(folder, AutoModelForCausalLM.from_pretrained(target), tokenizer)
    assert verifier.labels == (len(tokenizer), len(tokenizer) + 1)
    assert verifier.needs.layers == (3,)
    assert replace(verifier, served=True).needs.labels == ((len(tokenizer),), (len(tokenizer) + 1,))


def planted(count, seed):
    """Drafts of three segments; the state at a segment's end tells by one of its numbers whether it went wrong."""
    random, examples = torch.Generator().manual_seed(seed), []
    for number in range(count):
        wrong = number % 4 if number % 4 < 3 else None
        states = torch.randn(6, 8, generator=random) * torch.arange(1, 9) + 5  # [N, D]
        for k, end in enumerate((2, 4, 6)):
            states[end - 1, 2] = -20.0 if k == wrong else 20.0
        valid = [wrong is None or k < wrong for k in range(3)]
        draft = Draft([1], [1] * 6, [2, 4, 6], True, valid, True, number, 0)
        nothing = torch.zeros(7)
        examples.append(Example(draft, Evidence([2, 4, 6], nothing, nothing, nothing, states=states, layers=(3,))))
    return examples


def test_what_a_folded_probe_learns():
    train_set, held_out = planted(40, 1), planted(12, 2)
    untrained = FoldedModule.of(train_set)
    make = lambda: FoldedModule(untrained.mean, untrained.deviation)
    section = FoldedSection(epochs=40, learning_rate=0.05)
    module = fit(make, train_set, held_out, section, 0.01, "folded").module
    with torch.no_grad():
        folded = Folded(module.head(), 3, (9, 10))
        scored = [Scored(one.draft, folded.confidences(one.evidence).tolist()) for one in held_out]
        assert measure(scored, 0.5)["auc"] == 1.0
        for one in held_out:  # the head for states as they are tells what the trained module tells
            told = survival(module(*module.collate([one])))
            assert torch.allclose(folded.confidences(one.evidence), told, atol=1e-4)
