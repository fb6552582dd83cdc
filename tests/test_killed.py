"""The whole chain, killed for good at moments drawn by chance."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from tests.conftest import wait_for
from train.__main__ import main as train

RECIPE = "recipes/quickstart.yaml"


@pytest.mark.slow
@pytest.mark.no_cover  # it would take half as long again, and test_pipeline runs the same
def test_killed_at_any_moment_the_chain_goes_on_and_comes_out_the_same(tmp_path):
    """Killed for good again and again, at moments drawn by chance; in the end all is as if nobody had killed it."""
    steps = "per_device_train_batch_size: 4, save_steps: 4, logging_steps: 1, learning_rate: 2e-4"
    options = ["answers.prompts=24", "answers.batch_size=8", "engine.compile=false", "verifier.kind=probe"]
    options += [f"rollouts.{split}=8" for split in ("train", "calibration", "test")]
    options += ["rollouts.batch_size=8", "rollouts.recheck=2", "align.prompts=8", "verifier.max_accuracy_loss=0.4"]
    options += [f"distill.trainer={{max_steps: 24, {steps}}}", f"align.trainer={{max_steps: 6, {steps}}}"]
    assert train([RECIPE, *options, f"runs={tmp_path / 'whole'}"]) == 0
    rng, command = random.Random(1), [sys.executable, "-m", "train", RECIPE, *options, f"runs={tmp_path / 'killed'}"]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here: sums come out the same
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=threads)
        started = time.time()
        begun = tmp_path / "killed" / "quickstart" / ".lock"
        wait_for(begun.exists, process)
        try:
            process.communicate(timeout=time.time() - started + rng.uniform(0, 20))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills
    assert train([RECIPE, *options, f"runs={tmp_path / 'killed'}"]) == 0
    whole, killed = (tmp_path / name / "quickstart" for name in ("whole", "killed"))
    for part in ("answers", "rollouts", "rollouts-aligned"):
        assert load_from_disk(killed / part).to_list() == load_from_disk(whole / part).to_list()
    for file in ("draft/model", "draft-lora/adapter_model", "verifier/head"):
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not [path for path in killed.iterdir() if path.name.endswith(".part")]
