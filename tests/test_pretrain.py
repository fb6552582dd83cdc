"""Making the shipped pair: seconds of it, from the recipe to a folder that the engine loads."""

import dataclasses

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parse.local.loading import load_model
from parse.verifiers import PromptVerifier
from recipes.demo import verdicts
from recipes.demo.corpus import IGNORE, LessonBook, Lessons, Phase
from recipes.demo.pretrain import _telling, _train
from recipes.demo.verdicts import WRONG_WEIGHT, Judging, Packed, next_words, read, telling_loss, verdict_loss
from recipes.schema import load_recipe, to_dict
from tests.conftest import random_model
from train.__main__ import main


def target_section(**changes):
    return dataclasses.replace(load_recipe("recipes/embedded_models.yaml").pretrain["target"], **changes)


def lessons(tokenizer, count=3, kind="judge"):
    book = Lessons(tokenizer, "target", seed=5)
    return [book.draw((2, 3), kind) for _ in range(count)]


def llama(tokenizer, layers=3):
    model = random_model("llama", len(tokenizer), layers=layers)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.slow
def test_a_model_from_nothing(tmp_path):
    words = ["pretrain.draft.minutes=0.05", f"pretrain.draft.output={tmp_path}/draft", "pretrain.draft.batch_size=4"]
    plain = to_dict(load_recipe("recipes/embedded_models.yaml", words))
    del plain["pretrain"]["target"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain | {"runs": str(tmp_path / "runs")}))
    assert main([str(path), "pretrain"]) == 0
    model, tokenizer = load_model(tmp_path / "draft"), AutoTokenizer.from_pretrained(tmp_path / "draft")
    assert model.config.model_type == "gpt2"
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template


def test_the_states_read_are_the_models_own(tokenizer):
    model = llama(tokenizer)
    batch = Packed.of(lessons(tokenizer), PromptVerifier.of(tokenizer).suffix_ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(batch.ids, position_ids=batch.positions, attention_mask=batch.mask, output_hidden_states=True)
        states = read(model, batch)
    for mine, theirs in zip(states[:-1], whole.hidden_states[:-1], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(next_words(model, states[-1]), whole.logits.float())


def test_packed_judging_turns_learn_what_separate_ones_would(tokenizer):
    """The loss over one packed pass equals the loss over one plain pass a verdict."""
    model, judge = llama(tokenizer), PromptVerifier.of(tokenizer)
    batch = Packed.of(lessons(tokenizer), judge.suffix_ids)
    loss = verdict_loss(next_words(model, read(model, batch)[-1]), batch, judge)
    weights, losses = [], []
    with torch.no_grad():
        for lesson in batch.lessons:
            for end, verdict in lesson.asked.items():
                logits = model(torch.tensor([lesson.ids[:end] + judge.suffix_ids])).logits[0, -1]
                answer = (judge.yes_ids if verdict else judge.no_ids)[0]
                weights.append(1.0 if verdict else WRONG_WEIGHT)
                losses.append(-torch.log_softmax(logits, -1)[answer].item() * weights[-1])
    assert loss.item() == pytest.approx(sum(losses) / sum(weights), rel=0.05)  # bfloat16 against float32


def test_a_batch_with_nothing_to_learn_gives_no_nan(tokenizer):
    model, judge = llama(tokenizer), PromptVerifier.of(tokenizer)
    lesson = lessons(tokenizer, 1)[0]
    lesson.labels, lesson.asked = [IGNORE] * len(lesson.labels), {}
    batch = Packed.of([lesson], judge.suffix_ids)
    logits = next_words(model, read(model, batch)[-1])
    losses = [telling_loss(logits, batch.labels), verdict_loss(logits, batch, judge)]
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_exit_layer_learns_the_answer_as_well(tokenizer):
    """Its loss counts half, and trains no layer above it by itself."""
    model = llama(tokenizer)
    batch = Packed.of(lessons(tokenizer, 2, "tell"))
    (2 * _telling(model, batch, exit_layer=1) - _telling(model, batch, None)).backward()  # the exit's own part
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad.abs().max() < 1e-6


def test_judging_without_room_for_it_is_refused(tokenizer):
    section, words = target_section(), len(tokenizer)
    verdicts.check("target", section, words)
    verdicts.check("target", dataclasses.replace(section, exit_layer=None, judge_minutes=0), words)
    with pytest.raises(ValueError, match="exit_layer: 10 needs three layers above it.* use 1 to 9"):
        verdicts.check("target", dataclasses.replace(section, exit_layer=10), words)
    with pytest.raises(ValueError, match="judge_minutes: .*exit_layer, which is not given"):
        verdicts.check("target", dataclasses.replace(section, exit_layer=None), words)
    narrow = section.architecture | {"intermediate_size": 64}
    with pytest.raises(ValueError, match="intermediate_size: 64 is below the .* words"):
        verdicts.check("target", dataclasses.replace(section, architecture=narrow), words)


@pytest.fixture
def tiny(monkeypatch):
    """The target's section with seconds of everything."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # takes longer than the steps
    monkeypatch.setattr(verdicts, "JUDGE", (Phase(1.0, (2, 3), "judge"),))
    section = target_section(minutes=1e-6, judge_minutes=0.001, exit_layer=1, batch_size=2)
    section.architecture.update(num_hidden_layers=4, hidden_size=32, intermediate_size=256)
    return section


def test_the_layers_below_the_exit_learn_no_judging(tiny, tokenizer, tmp_path):
    untouched = _train("target", dataclasses.replace(tiny, judge_minutes=0), 0, tokenizer, tmp_path).state_dict()
    judged = _train("target", tiny, 0, tokenizer, tmp_path).state_dict()
    changed = {key for key in judged if not torch.equal(judged[key], untouched[key])}
    assert {"lm_head.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2, 3))} <= changed
    assert not [key for key in changed if "layers.0" in key or "embed" in key]


def test_what_was_told_is_not_told_again(tiny, tokenizer, tmp_path, capsys):
    """A killed run goes on after the telling; another seed or architecture starts anew."""
    section = dataclasses.replace(tiny, judge_minutes=0)
    first = _train("target", section, 0, tokenizer, tmp_path).state_dict()
    assert "skipped" not in capsys.readouterr().out
    again = _train("target", section, 0, tokenizer, tmp_path).state_dict()
    assert "target tells: done before, skipped" in capsys.readouterr().out
    assert all(torch.equal(first[key], again[key]) for key in first)
    _train("target", dataclasses.replace(section, learning_rate=1e-4), 0, tokenizer, tmp_path)
    assert "skipped" not in capsys.readouterr().out


def test_the_comparing_layer_begins_as_a_comparison(tiny, tokenizer):
    """One test a word, written in one place, where noticing reads it."""
    config = AutoConfig.for_model(**tiny.architecture, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    pupil = Judging("target", model, LessonBook(Lessons(tokenizer, "target", 0), 2), tiny, PromptVerifier.of(tokenizer))
    pupil._start_comparing(model.model.layers[2])
    mlp, words = model.model.layers[2].mlp, len(tokenizer)
    expected = torch.arange(words)
    gates = pupil.expected_words @ mlp.gate_proj.weight[:words].T  # [V, V]: expected word, unit
    assert torch.equal(gates.argmax(-1), expected)
    down = mlp.down_proj.weight[:, :words]
    assert torch.equal(down, down[:, :1].expand_as(down))  # every word's test is written in one place
    assert (pupil.noticing.weight @ down[:, 0]).item() > 0  # where it is read
