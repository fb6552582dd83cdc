"""Disturbed copies of a draft: noise that can be made again, weights that come back, a level that is enough."""

import json
from collections import Counter

import pytest
import torch
from datasets import load_from_disk
from torch import nn

from eval.generation import REFUSED
from eval.tasks import content_of_task
from recipes.run import Run
from recipes.schema import load_recipe
from tests.conftest import MODELS
from train.disturbed import LEVELS, TRIED, WRONG, disturbed, matrices_of
from train.rollouts import _roll_disturbed, write_rollouts


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.LayerNorm(64)).to(torch.bfloat16)


def test_noise_is_as_large_as_asked_for_and_the_same_for_the_same_seed():
    subject = model()
    before = [weight.detach().float() for weight in matrices_of(subject)]  # [out, in] each
    changes = []
    for level, seed in ((0.1, 1), (0.2, 1), (0.2, 1), (0.2, 2)):
        with disturbed(subject, level, seed):
            pairs = zip(matrices_of(subject), before, strict=True)
            changes.append([weight.detach().float() - old for weight, old in pairs])
    for index, old in enumerate(before):
        small, large, again, other = (change[index] for change in changes)
        assert small.std() / old.std() == pytest.approx(0.1, rel=0.1)
        assert torch.corrcoef(torch.stack([small.flatten(), large.flatten()]))[0, 1] > 0.99
        assert torch.equal(large, again)
        assert torch.corrcoef(torch.stack([large.flatten(), other.flatten()]))[0, 1].abs() < 0.1


def test_weights_come_back_to_the_bit_whatever_happens():
    subject = model()
    before = {name: value.clone() for name, value in subject.state_dict().items()}

    def interrupted() -> None:
        with disturbed(subject, 0.4, seed=3):
            assert not torch.equal(subject[1].weight, before["1.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_vectors_are_left_alone_and_quantised_models_as_a_whole(dtype):
    subject = model()
    assert [weight.shape for weight in matrices_of(subject)] == [(50, 64), (64, 64)]
    subject.packed = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    assert matrices_of(subject) == []


@pytest.mark.parametrize("first_level", [0, 2, len(LEVELS)])
def test_the_first_level_at_which_enough_drafts_are_wrong_is_kept(first_level):
    """At least that share of the first prompts; and the largest where none is enough. Others are not rolled out."""
    subject, items = model(), [("train", f"{i}") for i in range(3 * TRIED)]
    clean, rolled = subject[1].weight.detach().clone(), []

    def roll_all(name, some, what):
        assert not torch.equal(subject[1].weight, clean)
        rolled.append((name, len(some)))
        enough = len({place for place, _ in rolled}) > first_level
        wrong = int(WRONG * len(some)) + enough
        return [{"rounds": [{"valid": [True, i >= wrong]}]} for i in range(len(some))]

    rows, level = _roll_disturbed(subject, 5, "copy 1", items, roll_all)
    assert level == LEVELS[min(first_level, len(LEVELS) - 1)]
    assert len(rows) == len(items)
    assert [count for _, count in rolled] == [TRIED] * (LEVELS.index(level) + 1) + [len(items)]
    assert torch.equal(subject[1].weight, clean)


def test_where_no_time_is_left_there_is_no_copy():
    """What was not tried is not wrong."""
    subject, clean = model(), model()[1].weight
    found = _roll_disturbed(subject, 5, "copy 1", [("train", "a")] * 3, lambda *_: [{"rounds": [], REFUSED: "late"}])
    assert found == ([], None)
    assert torch.equal(subject[1].weight, clean)


def test_a_rollout_stage_holds_the_drafts_of_disturbed_copies_beside_their_prompts(tmp_path):
    """Each training prompt has one more draft for each copy; calibration and test have the draft's own alone."""
    text = f"name: few\ntarget: {MODELS}/ledger-target\ndraft: {MODELS}/ledger-draft\ntask: ledger\nruns: {tmp_path}\n"
    counts = "labels: checker, train: 8, calibration: 4, test: 3, drafts: 3, recheck: 2"
    (tmp_path / "few.yaml").write_text(f"{text}engine: {{max_new_tokens: 200}}\nrollouts: {{{counts}}}\n")
    recipe = load_recipe(str(tmp_path / "few.yaml"))
    with Run(recipe, content_of_task) as run:
        write_rollouts(recipe, run, "rollouts", MODELS / "ledger-draft")
    rows = load_from_disk(recipe.rollouts_folder)
    copies = Counter(row["number"] for row in rows if not row["met"])
    first = {row["number"]: row for row in rows if row["met"] and row["round"] == 0}
    assert copies == {number: 2 for number, row in first.items() if row["split"] == "train"}
    assert len(first) == 15
    made = [row for row in rows if not row["met"]]
    assert all(row["prompt"] == first[row["number"]]["prompt"] for row in made)
    assert sum(row["draft_ids"] != first[row["number"]]["draft_ids"] for row in made) > len(made) / 2
    assert len(json.loads((recipe.rollouts_folder / "labels.json").read_text())["noise_levels"]) == 2
    assert [row["number"] for row in rows] == sorted(row["number"] for row in rows)


def test_a_draft_is_aligned_by_what_it_says_itself(tmp_path):
    """The rollouts before the alignment hold no drafts of copies."""
    words = [f"runs={tmp_path}", "align.prompts=4", "rollouts.drafts=3", "rollouts.recheck=1"]
    recipe = load_recipe("recipes/quickstart.yaml", words)
    assert recipe.aligned
    with Run(recipe, content_of_task) as run:
        write_rollouts(recipe, run, "rollouts", MODELS / "ledger-draft")
        assert {row["met"] for row in load_from_disk(run.path("rollouts"))} == {True}
