"""The folded probe: what it learns, and that rows of the LM head tell what it tells."""

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
from parse.local.model import LocalModel
from parse.remote.fold import fold
from parse.sampling import Written
from parse.scheduler import run
from parse.verifiers import Evidence, Folded, Likelihood, Needs
from parse.verifiers.heads import RiseHead, survival
from parse.verifiers.saved import load, save, tokenizer_hash
from recipes.verifier_schema import FoldedSection
from tests.vllm_like import VllmLike
from train.verifier_training import MAY_RISE, TOO_HIGH, FoldedModule, fit

ROWS = 3
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
        head = RiseHead(32, ROWS)
        torch.nn.init.normal_(head.rows, std=1.2)
        torch.nn.init.normal_(head.body[0].weight, std=0.3)
        torch.nn.init.constant_(head.body[-1].bias, -2.0)
        depth, labels = model.config.num_hidden_layers, labels_of(tokenizer)
        calibration = {"handback": "segment", "horizon": None}
        facts = {"tokenizer": tokenizer_hash(tokenizer), "end_ids": [2], "segments": "sentence", "thresholds": {}}
        loaded = AutoModelForCausalLM.from_pretrained(target)
        save(verifier, Folded(head, depth, labels), loaded, facts | {"calibration": calibration})
        return target, verifier

    return make


def labels_of(tokenizer):
    return tuple(range(len(tokenizer), len(tokenizer) + ROWS))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_head_tell_what_the_probe_tells(kind, saved, tokenizer, tmp_path):
    """Through a server of vLLM's interface, whose target has the rows."""
    target, verifier = saved(kind)
    fold(str(target), verifier, tmp_path / "folded")
    ours = Engine.from_pretrained(target, verifier=verifier, compile=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert theirs.config.folded_labels == list(labels_of(tokenizer))
    told = ours.verify(PROMPT, DRAFT, ENDS)
    record = json.loads((verifier / "verifier.json").read_text())
    check = {"prompt_ids": PROMPT, "draft_ids": DRAFT, "ended": False, "ends": ENDS, "confidences": told.tolist()}
    (verifier / "verifier.json").write_text(json.dumps(record | {"checks": [check]}))
    server = VllmLike(LocalModel.of(theirs, tokenizer, frozenset([2])), str(tmp_path / "folded"))
    try:
        served = Engine.from_pretrained(f"{server.url}#tiny", target, verifier)
        assert served.models["target"].provides == {"label_scores", "rises"}
        assert torch.allclose(told, served.verify(PROMPT, DRAFT, ENDS), atol=1e-4)
        assert 0 < told.min() < told.max() < 1
        for ended in (False, True):
            given = [], Written(DRAFT, ended), ENDS
            mine, rises = (
                run(one.models["target"].open(PROMPT).verify(*given, one.verifier.needs)) for one in (ours, served)
            )
            assert 0.05 < float((rises.rises > 0).float().mean()) < 0.95
            assert torch.allclose(mine.margin, rises.margin, atol=1e-4)
            assert torch.allclose(ours.verifier.confidences(mine), served.verifier.confidences(rises), atol=1e-4)
        assert served.generate("tea", 12, method="target")[0].token_ids == (
            ours.generate("tea", 12, method="target")[0].token_ids
        )  # rows are not written
        with pytest.raises(ValueError, match="'likelihood' needs token_logprobs"):
            served.verifier = Likelihood()
    finally:
        server.close()
    ids = torch.tensor([PROMPT])
    plain = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    assert torch.allclose(theirs(ids).logits[..., : plain.shape[-1]], plain, atol=1e-5)  # all else is as it was


def test_a_served_target_without_the_verifiers_rows_is_refused(saved, tokenizer, tmp_path):
    target, verifier = saved()
    fold(str(target), verifier, tmp_path / "folded")
    record = json.loads((verifier / "verifier.json").read_text())
    for folder, labels, message in (
        (target, record["labels"], "has no rows of a folded verifier, as .*python -m parse fold"),
        (
            tmp_path / "folded",
            [*record["labels"], record["labels"][-1] + 1],
            "has 3 rows of a folded verifier, and .* 4",
        ),
    ):
        (verifier / "verifier.json").write_text(json.dumps(record | {"labels": labels}))
        model = AutoModelForCausalLM.from_pretrained(folder)
        server = VllmLike(LocalModel.of(model, tokenizer, frozenset([2])), str(folder))
        try:
            with pytest.raises(ValueError, match=message):
                Engine.from_pretrained(f"{server.url}#tiny", target, verifier)
        finally:
            server.close()


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
    assert verifier.labels == labels_of(tokenizer)
    assert verifier.needs == Needs(token_logprobs=True, layers=(3,))
    assert replace(verifier, served=True).needs == Needs(rows=labels_of(tokenizer))


def planted(count, seed):
    """Drafts of three segments; one token of a wrong one has a state that is high in one number, and a high margin."""
    random, examples = torch.Generator().manual_seed(seed), []
    for number in range(count):
        wrong = number % 4 if number % 4 < 3 else None
        states = torch.randn(6, 8, generator=random) * torch.arange(1, 9)  # [N, D]
        margin = torch.rand(7, generator=random) * 3  # [M]
        states[:, 2] = torch.where(torch.rand(6, generator=random) < 0.3, 9.0, -3.0)
        for k, end in enumerate((2, 4, 6)):
            high = states[end - 2 : end, 2] > 0
            margin[end - 2 : end][high] = 0.1  # of no importance
            if k == wrong:
                states[end - 1, 2], margin[end - 1] = 9.0, 2.5
        valid = [wrong is None or k < wrong for k in range(3)]
        draft = Draft([1], [1] * 6, [2, 4, 6], True, valid, True, number, 0)
        top = 5 + states[:, 0] / 4  # [N]
        evidence = Evidence([2, 4, 6], -margin, margin, margin, states=states, layers=(3,), top=top)
        examples.append(Example(draft, evidence))
    return examples


def test_what_a_folded_probe_learns():
    """That a row rises says nothing by itself, nor does a margin: both together do."""
    torch.manual_seed(0)
    train_set, held_out = planted(120, 1), planted(40, 2)
    starts = FoldedModule.starts(train_set)
    make = lambda: FoldedModule(*starts, ROWS, 16, 0.0)
    section = FoldedSection(epochs=60, learning_rate=0.02)
    module = fit(make, train_set, held_out, section, 0.01, "folded").module
    with torch.no_grad():
        folded = Folded(module.folded(), 3, (9, 10, 11))
        scored = [Scored(one.draft, folded.confidences(one.evidence).tolist()) for one in held_out]
        assert measure(scored, 0.5)["auc"] > 0.97
        for one in held_out:  # the head for states as they are tells what the trained module tells
            told = survival(module(*module.collate([one])))
            assert torch.allclose(folded.confidences(one.evidence), told, atol=1e-4)


def test_a_row_that_would_be_written_costs():
    """A server forbids a token by a hundred at most, so no row may rise so far."""
    module = FoldedModule(torch.zeros(4), torch.ones(4), 2, 4, 0.0)
    with torch.no_grad():
        module.directions[:] = 20.0
    inputs = torch.zeros(3, dtype=torch.long), torch.ones(3, 4), torch.zeros(3), torch.zeros(3, 2)
    rising = module.train()(*inputs) - module.eval()(*inputs)
    assert rising[0].item() == pytest.approx(TOO_HIGH * (80 - MAY_RISE) ** 2)
