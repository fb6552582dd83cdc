"""The run folder: whole stages or none, skipped when nothing changed, run again when something did."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from recipes.files import write_text
from recipes.progress import progress_bar
from recipes.run import KEPT
from recipes.schema import load_recipe
from tests.conftest import open_run
from train.__main__ import main


@pytest.fixture
def recipe_of(tmp_path):
    def _recipe_of(*overrides):
        return load_recipe("recipes/quickstart.yaml", [f"runs={tmp_path}", *overrides])

    return _recipe_of


def finish(run, stage, text="done"):
    with run.stage(stage) as folder:
        (folder / "file").write_text(text)


def test_a_finished_stage_is_skipped_and_recorded(recipe_of):
    run = open_run(recipe_of())
    assert not run.is_done("answers")
    finish(run, "answers")
    assert open_run(recipe_of()).is_done("answers")
    record = json.loads((run.folder / "provenance.json").read_text())
    assert record["stages"]["answers"]["seconds"] >= 0
    assert {"argv", "git_commit", "packages", "hardware", "python", "recipe"} <= set(record["stages"]["answers"])
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["name"] == "quickstart"


def test_a_changed_section_runs_its_stage_and_those_after_it(recipe_of):
    run = open_run(recipe_of())
    for stage in ("answers", "distill", "rollouts", "verifier"):
        finish(run, stage)
    changed = open_run(recipe_of("rollouts.train=11"))
    assert [changed.is_done(s) for s in ("answers", "distill", "rollouts", "verifier")] == [
        True,
        True,
        False,
        False,
    ]
    assert not open_run(recipe_of("seed=5")).is_done("answers")
    assert open_run(recipe_of("engine.handback=never")).is_done("rollouts")
    assert not open_run(recipe_of("engine.handback=never")).is_done("verifier")  # its threshold is for other drafts
    assert open_run(recipe_of("eval.prompts=70")).is_done("verifier")
    assert not open_run(recipe_of("align.prompts=7")).is_done("rollouts")  # they are of the prompts that give pairs
    plain = open_run(recipe_of("stages=[answers,distill,rollouts,verifier]"))
    assert plain.is_done("distill")
    assert not plain.is_done("rollouts")
    finish(plain, "rollouts")
    assert open_run(recipe_of("stages=[answers,distill,rollouts,verifier]", "align.prompts=7")).is_done("rollouts")


def test_a_killed_stage_leaves_the_old_one_whole(recipe_of):
    run = open_run(recipe_of())
    finish(run, "answers", "old")

    def killed():
        with run.stage("answers") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert (run.path("answers") / "file").read_text() == "old"
    finish(run, "answers", "new")
    assert [p.name for p in run.path("answers").iterdir()] == ["file"]
    assert (run.path("answers") / "file").read_text() == "new"


def test_a_killed_stage_keeps_what_it_kept_for_the_same_recipe(recipe_of):
    def killed(run, kept=None):
        with run.stage("answers") as folder:
            assert kept is None or (folder / KEPT / "rows").read_text() == kept
            (folder / KEPT / "rows").write_text("some")
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed(open_run(recipe_of()))
    with open_run(recipe_of()).stage("answers") as folder:
        assert (folder / KEPT / "rows").read_text() == "some"
        assert not (folder / "file").exists()
    with pytest.raises(KeyboardInterrupt):
        killed(open_run(recipe_of()))
    other = open_run(recipe_of("seed=3", "answers.prompts=7", "answers.batch_size=2"))
    with pytest.raises(KeyboardInterrupt):  # its rows are kept by their prompts, whatever others are drawn
        killed(other, "some")
    with open_run(recipe_of("engine.max_new_tokens=9")).stage("answers") as folder:
        assert not (folder / KEPT / "rows").exists()


def test_a_second_start_on_the_same_folder_is_refused(recipe_of, capsys):
    """A lock that the system lets go of when its holder is killed."""
    recipe = recipe_of()
    recipe.folder.mkdir(parents=True)
    lock = f"FileLock({str(recipe.folder / '.lock')!r})"
    held = f"from filelock import FileLock; lock = {lock}; lock.acquire(); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    command = ["recipes/quickstart.yaml", "answers", f"runs={recipe.runs}"]
    assert main(command) == 2
    assert "is in use by another start: wait for it to end" in capsys.readouterr().err
    other.kill()
    other.communicate()
    with open_run(recipe) as run:
        assert run.folder == recipe.folder


def test_a_stop_by_the_user_says_what_is_kept(recipe_of, monkeypatch, capsys):
    def stopped(recipe, run):
        with run.stage("answers") as folder:
            (folder / KEPT / "rows").write_text("some")
            raise KeyboardInterrupt

    monkeypatch.setattr("train.answers.run", stopped)
    recipe = recipe_of()
    assert main(["recipes/quickstart.yaml", "answers", f"runs={recipe.runs}"]) == 130
    assert capsys.readouterr().err == "stopped: what is finished is kept, and the same command continues from there\n"
    with open_run(recipe) as run, run.stage("answers") as folder:  # nothing holds the folder any more
        assert (folder / KEPT / "rows").read_text() == "some"


def test_all_stages_log_to_one_run_without_a_network(recipe_of):
    """The real package, offline; started twice, as stages that are run by themselves are."""
    recipe = recipe_of("logging.wandb=offline", "logging.name=mine")
    for stage in ("answers", "rollouts"):
        with open_run(recipe) as run:
            run.log(stage, {"right": 0.5})
        time.sleep(1.1)  # the library names its folders by the second
    runs = sorted((recipe.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert runs
    assert {file.stem.removeprefix("run-") for file in runs} == {(recipe.folder / ".wandb-id").read_text()}
    written = b"".join(file.read_bytes() for file in runs)
    assert b"answers/right" in written
    assert b"rollouts/right" in written


def test_secrets_are_not_written_down(recipe_of, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train", "distill.trainer.hub_token=hf_abcdefghijklmnopqrstuvwx", "eval.prompts=3"]
    )
    run = open_run(
        recipe_of(
            "distill.trainer.hub_token=plain", "distill.trainer.eos_token=<|end|>", "name=hf_0123456789abcdefghijklmn"
        )
    )
    finish(run, "answers")
    written = (run.folder / "recipe.yaml").read_text() + (run.folder / "provenance.json").read_text()
    assert "hf_abc" not in written
    assert "plain" not in written
    assert "hf_0123456789" not in written
    assert "<|end|>" in written
    assert "eval.prompts=3" in written


def test_files_are_written_whole(tmp_path):
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_progress_off_a_terminal_takes_lines(capsys):
    with progress_bar("work", total=3) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert "\r" not in "".join(lines)
    assert any("work: 100%" in line and "it/s" in line for line in lines)
