"""What a run writes: whole files, no secrets, and advice where the disk is full."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from recipes.command import advice_for
from recipes.digests import Digests
from recipes.run import KEPT
from recipes.schema import load_recipe
from recipes.secrets import without_secrets
from tests.conftest import QUICK, open_run, wait_for
from train.__main__ import main as train


def test_files_have_the_rights_that_the_umask_allows(copied):
    run, before = open_run(load_recipe(QUICK, copied)), os.umask(0o027)
    try:
        with run.stage("answers") as folder:
            (folder / "weights").touch(mode=0o600)  # as some libraries write them
            (folder / "notes").touch(mode=0o666)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in run.path("answers").iterdir()} == {0o640}


def test_large_files_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.digests.LARGE", 4)
    file = tmp_path / "weights"
    file.write_bytes(b"12345678")
    first = Digests(tmp_path / "index").of_file(file)
    reads = []
    monkeypatch.setattr("hashlib.file_digest", lambda *_: reads.append(1))
    assert Digests(tmp_path / "index").of_file(file) == first
    assert not reads
    monkeypatch.undo()
    file.write_bytes(b"12345679")
    os.utime(file, (1, 1))
    assert Digests(tmp_path / "index").of_file(file) != first
    (tmp_path / "index").write_text("broken")
    assert Digests(tmp_path / "index").of_file(file)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("answers.server.url=https://me:sesame@host/v1", "answers.server.url=https://[redacted]@host/v1"),
        ({"url": "http://sesame@host"}, {"url": "http://[redacted]@host"}),
        ({"token": "sesame"}, {"token": "[redacted]"}),
        ({"HF_TOKEN": "sesame"}, {"HF_TOKEN": "[redacted]"}),
        ({"wandb_key": "sesame"}, {"wandb_key": "[redacted]"}),
        ({"hub_token": "sesame", "eos_token": "</s>"}, {"hub_token": "[redacted]", "eos_token": "</s>"}),
        ("runs=/data/hf_checkpoints/llama", "runs=/data/hf_checkpoints/llama"),
        ("target=org/sk-learning-small", "target=org/sk-learning-small"),
        ({"key_variable": "MY_KEY"}, {"key_variable": "MY_KEY"}),
        (
            "engine.target_options={token: sesame, revision: a}",
            "engine.target_options={token: [redacted], revision: a}",
        ),
        ("OPENAI_API_KEY=sesame", "OPENAI_API_KEY=[redacted]"),
        (["a", "github_pat_11ABCDEFG0123abcdefgh"], ["a", "[redacted]"]),
        ("answers.server.url=http://me:p@sesame@host/v1", "answers.server.url=http://[redacted]@host/v1"),
        ({"url": "http://host/v1?api_key=sesame&v=1"}, {"url": "http://host/v1?api_key=[redacted]&v=1"}),
        ('engine.target_options={"token": "open sesame"}', 'engine.target_options={"token": [redacted]}'),
        ("--token=sesame", "--token=[redacted]"),
        ({"x-api-key": "sesame", "pwd": "sesame"}, {"x-api-key": "[redacted]", "pwd": "[redacted]"}),
        ({"header": "Bearer sesame"}, {"header": "Bearer [redacted]"}),
        ({"target": "models/hf_llama3_tuned1", "task": "data/sk-slovak-reviews.jsonl"},) * 2,
        ({"password": "sesame", "n": 3}, {"password": "[redacted]", "n": 3}),
        ("data.system=Say the token: no", "data.system=Say the token: [redacted]"),  # rather one too many
        ({"system": "Say the token: no"}, {"system": "Say the token: no"}),
    ],
)
def test_secrets_are_blotted_out_wherever_they_stand(given, written):
    assert without_secrets(copy.deepcopy(given)) == written


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0: No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_told_in_whatever_words_a_library_meets_it(error, tmp_path):
    assert advice_for(error, tmp_path).startswith("The disk is full")
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error
    assert advice_for(wrapped, tmp_path).startswith("The disk is full")
    assert advice_for(ValueError("a bug"), tmp_path) is None


def test_a_disk_without_room_is_why_a_write_fails(tmp_path, monkeypatch):
    nothing_said = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert advice_for(nothing_said, tmp_path) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
    assert advice_for(nothing_said, tmp_path).startswith("The disk is full")
    assert advice_for(torch.OutOfMemoryError(), tmp_path).startswith(("The disk", "Memory"))


@pytest.mark.slow
def test_sigterm_ends_a_stage_as_ctrl_c_does(copied, tmp_path):
    words = [sys.executable, "-m", "train", QUICK, "answers", *copied, "answers.batch_size=1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any((tmp_path / "runs").rglob(f"{KEPT}/*.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been faster
        assert process.returncode == 130
        assert "stopped: what is finished is kept" in error
    started = time.time()
    assert train([QUICK, "answers", *copied]) == 0
    assert time.time() - started < 120
