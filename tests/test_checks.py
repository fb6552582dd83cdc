"""What is refused before anything expensive, and what a full disk or memory leaves behind."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from eval.checks import check_prompts, check_speculation
from eval.prompts import Fitting, prompts_of
from eval.tasks import TASKS, draw_prompts, load_task
from parse.prompts import encode_prompt
from parse.verifiers import PromptVerifier
from recipes.schema import RecipeError, load_recipe, to_dict
from tests.conftest import MODELS, QUICK, random_model
from train.__main__ import main as train
from train.checks import check_disk, check_launch, check_methods, size_of

EVERY = ("answers", "distill", "rollouts", "align", "verifier")


@pytest.fixture
def other(tmp_path, smollm):
    """A small model with SmolLM2's tokens."""
    folder = tmp_path / "other"
    model = random_model("llama", len(smollm[1]))
    model.save_pretrained(folder)
    smollm[1].save_pretrained(folder)
    return folder


def rows_of(tmp_path, *rows):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task={file}"


@pytest.mark.parametrize("file", sorted(Path("recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_sound(file):
    """All that can be checked without the models."""
    from train import align, distill

    recipe = load_recipe(file)
    distill.trainer_config(recipe)
    align.trainer_config(recipe)
    if file.stem not in ("quickstart", "embedded_models", "custom_domain") and "restaurants" not in file.stem:
        header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert "NOT RUN BY US" in header
        assert "Memory, estimated" in header
        assert "Hours, estimated" in header


def test_arguments_go_to_trl_untouched():
    from train import align, distill

    given = "{learning_rate: 1e-4, max_grad_norm: 0.7, save_steps: 3}"
    recipe = load_recipe(QUICK, [f"distill.trainer={given}", f"align.trainer={given}"])
    for config in (distill.trainer_config(recipe), align.trainer_config(recipe)):
        assert (config.learning_rate, config.max_grad_norm, config.save_steps) == (1e-4, 0.7, 3)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("distill.trainer.learning_rat=1", "unknown key 'learning_rat' in section 'distill.trainer'; did you mean"),
        ("align.trainer.betta=1", "unknown key 'betta' in section 'align.trainer'; did you mean 'beta'"),
        ("distill.lora={rank: 3}", "unknown key 'rank' in section 'distill.lora'"),
        ("align.lora={layers_to_transform: 3, target_modules: a.*}", "'align.lora' is refused by PEFT"),
        ("distill.trainer.save_strategy=at_noon", "'distill.trainer' is refused by TRL"),
        ("distill.method=osmosis", "distill.method names 'osmosis'"),
        ("align.method=dop", "did you mean 'dpo'"),
    ],
)
def test_what_training_cannot_take_is_refused(word, message):
    with pytest.raises(RecipeError, match=message):
        check_methods(load_recipe(QUICK, [word]), EVERY)


@pytest.mark.parametrize("word", ["distill.method=logits", "distill.method=on_policy", "align.method=on_policy"])
def test_methods_that_compare_distributions_need_the_same_tokens(word, other):
    check_methods(load_recipe(QUICK, [word]), EVERY)
    with pytest.raises(RecipeError, match=rf"{word} compares .*other.* has another vocabulary .* use distill.method="):
        check_methods(load_recipe(QUICK, [word, f"draft={other}"]), EVERY)


def test_a_draft_for_lossless_speculation_is_read_before_anything_runs(other, tmp_path):
    words = [f"target={other}", "eval.methods=[target,speculation,parse]"]
    check_speculation(load_recipe(QUICK, [*words, f"eval.speculation_draft={MODELS / 'ledger-draft'}"]))
    nothing = f"eval.speculation_draft={tmp_path}/nothing"
    with pytest.raises(RecipeError, match="eval.speculation_draft: .*nothing cannot be read as a model"):
        check_speculation(load_recipe(QUICK, [*words, nothing]))
    check_speculation(load_recipe(QUICK, [words[0], "eval.methods=[target,parse]", nothing]))  # not asked for


def test_gold_needs_byte_level_tokens_and_chat_templates(other):
    check_methods(load_recipe(QUICK, ["distill.method=gold", f"target={other}", f"draft={other}"]), ["distill"])
    with pytest.raises(RecipeError, match="ledger-draft has no byte-level tokens: use distill.method=sequence"):
        check_methods(load_recipe(QUICK, ["distill.method=gold"]), ["distill"])


def test_the_verifier_is_refused_under_deepspeed(monkeypatch, capsys):
    assert train([QUICK, "verifier", "--dry-run"]) == 0
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert train([QUICK, "verifier", "--dry-run"]) == 2
    assert "not under DeepSpeed: name the stages before it here" in capsys.readouterr().err
    check_launch(["answers", "distill", "rollouts", "align"])


def test_prompts_that_leave_no_room_are_refused():
    check_prompts(load_recipe(QUICK), EVERY)
    with pytest.raises(RecipeError, match=r"all 1000 prompts of the split .* are too long, .* lower engine.max_"):
        check_prompts(load_recipe(QUICK, ["engine.max_new_tokens=500"]), EVERY)
    short = load_recipe(QUICK, ["draft={config: {model_type: gpt2, n_positions: 220, n_embd: 32, n_head: 2}}"])
    with pytest.raises(RecipeError, match="the draft's context of 220 leaves no room"):
        check_prompts(short, ["answers"])
    check_prompts(short, ["rollouts"])  # there it stops where its context ends


def test_prompts_that_are_too_long_are_left_out_counted_and_named(tmp_path, capsys):
    """The 231st of 240: it used to pass the checks, which looked at 200, and to end the stage at every start."""
    words = [
        f"list : #1 fig rome {i % 9 + 1} ; #2 tea oslo {i // 9 % 9 + 1} ; #3 egg lima {i // 81 + 1} ."
        for i in range(240)
    ]
    words[230] = "fig " * 400
    task = rows_of(tmp_path, *({"prompt": prompt, "split": "answers"} for prompt in words))
    recipe = load_recipe(QUICK, [task, "answers.prompts=240"])
    check_prompts(recipe, ["answers"])
    said = capsys.readouterr().out
    assert "1 prompts of the split 'answers' are left out as too long; the first, 'fig fig" in said
    assert "has 403 tokens, and with engine.max_new_tokens=200 the target's context of 512 leaves no room" in said
    assert "has 239 prompts of the split 'answers', 240 were asked for" in said
    chosen = prompts_of(recipe, load_task(recipe.task, to_dict(recipe.data)), "answers")
    assert {prompt for _, prompt in chosen.prompts} == {*words} - {words[230]}
    assert [prompt for prompt, _ in chosen.too_long] == [words[230]]


def test_a_verdict_needs_room_as_well():
    """A prompt and a whole answer that fill the context leave none for the question after the last cut."""
    context, prompt = 512, draw_prompts(TASKS["ledger"], "train", 1, seed=1)[0]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ledger-target")
    room = context - len(encode_prompt(prompt, tokenizer))
    suffix = len(PromptVerifier.of(tokenizer).suffix_ids)
    for stage, limit in (("answers", room), ("rollouts", room - suffix), ("eval", room - suffix)):
        fits, not_any_more = (
            Fitting(load_recipe(QUICK, [f"engine.max_new_tokens={n}"]), TASKS["ledger"], stage)
            for n in (limit, limit + 1)
        )
        assert fits.lacks(prompt) is None
        assert "leaves no room for an answer" in not_any_more.lacks(prompt)


def test_answers_that_leave_no_room_to_compare_them_are_refused():
    agreeing = ["rollouts.labeller=agreement", "engine.max_new_tokens=300"]
    check_prompts(load_recipe(QUICK, agreeing), ["align"])
    with pytest.raises(RecipeError, match="no room for two answers, which rollouts.labeller=agreement lets the target"):
        check_prompts(load_recipe(QUICK, agreeing), ["rollouts"])


def test_words_that_the_target_cannot_read_are_refused(tmp_path):
    words = rows_of(tmp_path, {"prompt": "What is the capital of Peru?", "reference": "Lima", "split": "answers"})
    with pytest.raises(RecipeError, match="does not know words of the prompt 'What is"):
        check_prompts(load_recipe(QUICK, [words]), ["answers"])


def test_a_split_without_a_prompt_is_refused(tmp_path, other):
    word = rows_of(tmp_path, {"prompt": "What is the capital of Peru?", "reference": "Lima", "split": "answers"})
    recipe = load_recipe(QUICK, [word, f"target={other}"])
    check_prompts(recipe, ["answers"])
    with pytest.raises(RecipeError, match="has no prompt for the split 'train'"):
        check_prompts(recipe, ["answers", "rollouts"])


def test_rows_without_references_are_not_checked_by_the_task(tmp_path, other):
    word = rows_of(tmp_path, {"prompt": "What is the capital of Peru?", "split": "answers"})
    check_prompts(load_recipe(QUICK, [word, f"target={other}"]), ["answers"])
    with pytest.raises(RecipeError, match="have no `reference` .* set rollouts.labeller=agreement"):
        check_prompts(load_recipe(QUICK, [word, f"target={other}", "rollouts.labeller=task"]), ["answers"])


def test_room_on_the_disk_is_estimated_before_the_start(capsys):
    options = ["answers.prompts=400", "distill.method=logits", "distill.top_k=8"]
    need = check_disk(load_recipe(QUICK, options), EVERY)
    weights = sum(p.numel() for p in torch.nn.ModuleList([_draft()]).parameters())
    assert need["draft"] == 4 * weights
    assert need["the target's logits"] == 400 * 200 * 8 * 6 * 4 // 3
    with pytest.raises(RecipeError, match=r"GB free, and this run may take .* lower answers.prompts"):
        check_disk(load_recipe(QUICK, ["answers.prompts=1000000000"]), EVERY)
    assert train([QUICK, "--dry-run"]) == 0
    sizes = check_disk(load_recipe(QUICK, []), [*EVERY, "relabel"])
    assert f"up to {size_of(sum(sizes.values()))} on the disk" in capsys.readouterr().out
    assert sizes["answers"] > 1.9e6  # what a run of the quickstart left
    assert sizes["rollouts"] > 3.2e6


def _draft():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODELS / "ledger-draft")


def test_align_outside_the_recipes_stages_is_refused(capsys):
    assert train([QUICK, "align", "stages=[answers,distill,rollouts,verifier]"]) == 2
    assert "'align' is not among the recipe's stages" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small disk takes root")
def test_a_full_disk_ends_with_advice_and_loses_nothing(tmp_path, capsys, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        words = [QUICK, "answers", f"runs={disk}", "answers.prompts=8", "engine.max_new_tokens=180"]
        (disk / "ballast").write_bytes(bytes(150_000))
        with monkeypatch.context() as later:
            later.setattr("train.checks.check_disk", lambda *_: {})  # others fill the disk after the check
            assert train([*words, "answers.batch_size=2"]) == 3
        assert "The disk is full: make room" in capsys.readouterr().err
        kept = list((disk / "quickstart" / ".answers.part").rglob("*.jsonl"))
        assert kept
        (disk / "ballast").unlink()
        assert train([*words, "answers.batch_size=2"]) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Memory has run out: lower the stage's batch_size"),
        (MemoryError(), "Memory has run out"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
    ],
)
def test_where_memory_or_disk_run_out_there_isadvice_for(error, advice, monkeypatch, tmp_path, capsys):
    def failing(recipe, run):
        raise error

    monkeypatch.setattr("train.answers.run", failing)
    assert train([QUICK, "answers", f"runs={tmp_path}"]) == 3
    assert advice in capsys.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch, tmp_path):
    def failing(recipe, run):
        raise RuntimeError("a bug")

    monkeypatch.setattr("train.answers.run", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        train([QUICK, "answers", f"runs={tmp_path}"])
