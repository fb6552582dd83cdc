"""Making the shipped pair: seconds of it, from the recipe to a folder that the engine loads."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from parse.models import load_model
from parse.verifiers import Prompt
from tests.conftest import random_model
from train.__main__ import main
from train.lessons import IGNORE, Lessons
from train.pretrain import WRONG_WEIGHT, _check, _losses, _train
from train.recipe import load_recipe


@pytest.mark.slow
def test_a_model_from_nothing(tmp_path):
    words = ["pretrain.draft.minutes=0.05", f"pretrain.draft.output={tmp_path}/draft", "pretrain.draft.batch_size=4"]
    content = load_recipe("recipes/embedded_models.yaml", words)
    path = tmp_path / "recipe.yaml"
    import yaml

    from train.recipe import to_dict

    plain = to_dict(content)
    del plain["pretrain"]["target"]
    path.write_text(yaml.safe_dump(plain | {"runs": str(tmp_path / "runs")}))
    assert main([str(path), "pretrain"]) == 0
    model, tokenizer = load_model(tmp_path / "draft"), AutoTokenizer.from_pretrained(tmp_path / "draft")
    assert model.config.model_type == "gpt2"
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template


def test_packed_judging_turns_learn_what_separate_ones_would(tokenizer):
    """The loss over one packed pass equals the loss over one plain pass a verdict."""
    model = random_model("llama", len(tokenizer))
    model.set_attn_implementation("eager")
    judge = Prompt.of(tokenizer)
    lessons = Lessons(tokenizer, "target", seed=5)
    batch = [lessons.draw((2, 3), "judge") for _ in range(3)]
    telling, judging = _losses(model, batch, judge)
    weights, losses = [], []
    with torch.no_grad():
        for lesson in batch:
            for end, verdict in lesson.asked.items():
                logits = model(torch.tensor([lesson.ids[:end] + judge.suffix_ids])).logits[0, -1]
                answer = (judge.yes_ids if verdict else judge.no_ids)[0]
                weights.append(1.0 if verdict else WRONG_WEIGHT)
                losses.append(-torch.log_softmax(logits, -1)[answer].item() * weights[-1])
    assert judging.item() == pytest.approx(sum(losses) / sum(weights), rel=0.05)  # bfloat16 against float32
    assert telling.item() > 0
    (telling + judging).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_batch_with_nothing_to_learn_gives_no_nan(tokenizer):
    model = random_model("llama", len(tokenizer), layers=3)
    lesson = Lessons(tokenizer, "target", seed=5).draw((2, 3))
    lesson.labels, lesson.asked = [IGNORE] * len(lesson.labels), {}
    telling, judging = _losses(model, [lesson], Prompt.of(tokenizer), exit_layer=1)
    assert telling.item() == judging.item() == 0
    telling.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_exit_layer_learns_the_answer_as_well(tokenizer):
    """Its loss counts half, and trains no layer above it by itself."""
    model = random_model("llama", len(tokenizer), layers=3)
    model.set_attn_implementation("eager")
    batch = [Lessons(tokenizer, "target", seed=5).draw((2, 3)) for _ in range(2)]
    plain, _ = _losses(model, batch, None)
    middle, _ = _losses(model, batch, None, exit_layer=1)
    (2 * middle - plain).backward()  # the exit's own part
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad.abs().max() < 1e-6


def test_an_exit_layer_without_room_above_is_refused():
    section = load_recipe("recipes/embedded_models.yaml").pretrain["target"]
    _check("target", section)
    with pytest.raises(ValueError, match="exit_layer: 11 needs two layers above it.* use 1 to 10"):
        _check("target", dataclasses.replace(section, exit_layer=11))
    with pytest.raises(ValueError, match="judge_minutes: 40.*exit_layer, which is not given"):
        _check("target", dataclasses.replace(section, exit_layer=None))


def test_the_layers_below_the_exit_learn_no_judging(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # takes longer than the steps
    section = dataclasses.replace(
        load_recipe("recipes/embedded_models.yaml").pretrain["target"], minutes=1e-6, judge_minutes=0.02, exit_layer=1
    )
    section.architecture.update(num_hidden_layers=3, hidden_size=32, intermediate_size=32)
    torch.manual_seed(0)
    untouched = _train("target", dataclasses.replace(section, judge_minutes=0), seed=0).state_dict()
    judged = _train("target", section, seed=0).state_dict()
    changed = {key for key in judged if not torch.equal(judged[key], untouched[key])}
    assert {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= changed
    assert not [key for key in changed if "layers.0" in key or "embed" in key]
