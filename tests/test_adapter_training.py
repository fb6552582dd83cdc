"""Training an adapter: which layers learn, what stays as it was, and for whom it is."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eval.tasks import TASKS, draw_prompts
from eval.verifier_metrics import Draft, Scored, examine, measure
from parse import Engine
from parse.local.model import packed_evidence
from parse.sampling import Written
from parse.scheduler import run
from parse.segments import cut
from parse.verifiers import Adapter, Needs
from parse.verifiers.adapter import adapt
from parse.verifiers.saved import fingerprint, load, save, tokenizer_hash
from recipes.verifier_schema import AdapterSection
from tests.conftest import MODELS, facts_of, fresh_context, random_adapter, random_model
from train.evidence import gather, up_to_first_invalid
from train.verifier import train_adapter


def test_only_the_last_layers_are_adapted(target):
    adapted = adapt(target, [7, 8], 4, 1)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".layers.2." in name for name in trained)
    assert not any("lora" in name for name, _ in target.named_parameters())
    weight = target.model.layers[0].self_attn.q_proj.weight
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.weight is weight  # no second copy


@pytest.mark.parametrize("other", ["weights", "tokenizer", "segments"])
def test_an_adapter_for_something_else_is_refused(tmp_path, target, draft, tokenizer, other):
    facts = facts_of(tokenizer)
    save(tmp_path, random_adapter(target, [7, 8]), target, facts)
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "verifier.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    load_with = lambda model, **options: Engine.from_pretrained(model, None, tmp_path, tokenizer=tokenizer, **options)
    assert isinstance(load_with(target).verifier, Adapter)
    record = json.loads((tmp_path / "verifier.json").read_text())
    if other == "weights":
        changed = random_model("llama", len(tokenizer), layers=3, seed=5)
        with pytest.raises(ValueError, match=f"{record['base'][:12]}.*{fingerprint(changed)[:12]}"):
            load_with(changed)
    elif other == "tokenizer":
        (tmp_path / "verifier.json").write_text(json.dumps({**record, "tokenizer": "0" * 64}))
        with pytest.raises(ValueError, match=f"000000000000, the target's is {tokenizer_hash(tokenizer)[:12]}"):
            load_with(target)
    else:
        with pytest.raises(ValueError, match="segments=4, but .* was trained on 'sentence'"):
            load_with(target, segments=4)


def check_training(engine, drafts, folder, section):
    """Train on labelled drafts, save, load, and judge in the packed pass as the trained one does."""
    examples = gather(
        engine, [*map(up_to_first_invalid, drafts)], Needs(token_logprobs=True), folder / "evidence", "train"
    )
    before = fingerprint(engine.target)
    adapter = train_adapter(engine, examples, examples, section, 0.01)
    assert fingerprint(engine.target) == before
    weights = [p for name, p in adapter.adapted.named_parameters() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in weights)
    save(folder, adapter, engine.target, facts_of(engine.tokenizer, engine.segments))
    assert set(load_file(folder / "head.safetensors")) == set(adapter.head.state_dict())
    loaded = load(folder, engine.target, engine.tokenizer)
    one = drafts[0]
    verdicts = []
    for verifier in (adapter, loaded):
        engine.verifier = verifier
        verdicts.append(engine.verify(one.context_ids, one.ids, one.ends))
    torch.testing.assert_close(*verdicts)
    return adapter


def assert_base_is_untouched(engine, adapter, draft):
    """After the packed pass the cache holds what the same pass leaves without the LoRA."""
    plain = Needs(token_logprobs=True, layers=(1,), suffix_ids=adapter.needs.suffix_ids)
    states = []
    for needs in (adapter.needs, plain):
        context = fresh_context(engine)
        context.read(draft.context_ids)
        run(packed_evidence(context, Written(draft.ids, draft.ended), draft.ends, needs))
        states.append([part for layer in context.runner.cache.states(context.row) for part in layer])
    for mine, theirs in zip(*states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)  # in few rows rounded otherwise


@pytest.mark.slow
def test_an_adapter_on_a_real_chat_model(smollm, tmp_path):
    """Right answers to small questions, and the same with another question's answer in the second sentence."""
    engine = Engine(*smollm, compile=False)
    things = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    drafts = []
    for number, (thing, colour) in enumerate(things.items()):
        for wrong in (False, True):
            named = list(things.values())[(number + 2) % len(things)] if wrong else colour
            text = f"Let me think. The colour of {thing} is {named}. That is all."
            ids = engine.tokenizer.encode(text, add_special_tokens=False)
            ends = cut(ids, engine.tokenizer, "sentence")
            valid = [True] + [not wrong] * (len(ends) - 1)
            context = engine.encode(f"What colour has {thing}?")
            drafts.append(Draft(context, ids, ends, True, valid, number=len(drafts)))
    section = AdapterSection(epochs=8, learning_rate=5e-3, batch_size=1, rank=8, layers=2)
    adapter = check_training(engine, drafts, tmp_path, section)
    assert_base_is_untouched(engine, adapter, drafts[0])
    engine.verifier = adapter
    scored = [
        Scored(one.draft, adapter.confidences(one.evidence).tolist()) for one in examine(engine, drafts, adapter.needs)
    ]
    assert measure(scored, 0.5)["auc"] > 0.8  # it has learnt these by heart at least


@pytest.mark.slow
def test_an_adapter_on_the_shipped_target(tmp_path):
    engine = Engine.from_pretrained(MODELS / "ledger-target", compile=False)
    drafts = []
    prompts = draw_prompts(TASKS["ledger"], "train", 24, seed=4)
    for number, answer in enumerate(engine.generate(prompts, 200, method="target", batch_size=24)):
        prompt, ids = prompts[number], answer.token_ids
        ends = cut(ids, engine.tokenizer, "sentence")
        if number % 2:  # the second sentence tells of something else
            start, stop = ends[0], ends[1]
            ids = [*ids[:start], *reversed(ids[start : stop - 1]), *ids[stop - 1 :]]
        valid = [True] + [number % 2 == 0] * (len(ends) - 1)
        drafts.append(Draft(engine.encode(prompt), ids, ends, True, valid, number=number))
    section = AdapterSection(epochs=2, learning_rate=5e-3, batch_size=4, layers=2)
    adapter = check_training(engine, drafts, tmp_path, section)
    assert_base_is_untouched(engine, adapter, drafts[0])
