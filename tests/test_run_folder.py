"""What a run folder knows by content: its inputs, its outputs, what is its own, and how each stage was made."""

import json
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset, load_from_disk

from recipes.dependencies import Dependencies
from recipes.digests import Digests
from recipes.run import KEPT
from recipes.schema import RecipeError, load_recipe
from tests.conftest import LISTS, QUICK, open_run, wait_for
from train.__main__ import main as train


def finish(run, *stages):
    for stage in stages:
        with run.stage(stage) as folder:
            Dataset.from_list([{"stage": stage}]).save_to_disk(folder)
            (folder / "notes.json").write_text(stage)


def done(words, *more):
    run = open_run(load_recipe(QUICK, [*words, *more]))
    return [stage for stage in ("answers", "distill", "rollouts", "verifier") if run.is_done(stage)]


ALL = ["answers", "distill", "rollouts", "verifier"]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ("nothing", ALL),
        ("a row in front", []),
        ("a row's reference", []),
        ("a blank line", ALL),
        ("the target, in place", []),
        ("the draft, in place", ["answers"]),
        ("the target's chat template", []),
        ("the target's README", ALL),
        ("the target's place", ALL),
    ],
)
def test_data_and_models_are_known_by_content(copied, tmp_path, change, left):
    finish(open_run(load_recipe(QUICK, copied)), *ALL)
    assert done(copied) == ALL
    rows, target = tmp_path / "rows.jsonl", tmp_path / "target"
    text = rows.read_text()
    if change == "a row in front":
        rows.write_text(json.dumps({"prompt": "fig", "split": "answers"}) + "\n" + text)
    if change == "a row's reference":
        rows.write_text("".join(json.dumps(json.loads(row) | {"reference": "4"}) + "\n" for row in text.splitlines()))
    if change == "a blank line":
        rows.write_text("\n" + text)
    if "in place" in change:
        weights = tmp_path / change.split()[1].strip(",") / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    if change == "the target's chat template":
        (target / "chat_template.jinja").write_text("{{ messages }}")
    if change == "the target's README":
        (target / "README.md").write_text("new words")
    if change == "the target's place":
        target.rename(tmp_path / "moved")
        copied = [word.replace(str(target), str(tmp_path / "moved")) for word in copied]
    assert done(copied) == left


@pytest.mark.parametrize(
    ("word", "left"),
    [
        ("engine.target_options={quantization_config: {load_in_8bit: true}}", []),
        ("engine.target_options={device_map: auto}", ALL),  # says where it lies, not what it is
        ("engine.horizon=16", ["answers", "distill"]),
        ("engine.policy=longest", ["answers", "distill", "rollouts"]),
        ("segments=line", ["answers", "distill"]),
        ("data.check=equal", []),
        ("eval.prompts=30", ALL),
        ("answers.batch_size=2", ALL),  # how it runs, not what comes out
        ("rollouts.batch_size=2", ALL),
    ],
)
def test_settings_count_where_a_stage_depends_on_them(copied, word, left):
    finish(open_run(load_recipe(QUICK, copied)), *ALL)
    assert done(copied, word) == left


def test_another_outcome_of_an_earlier_stage_runs_the_later_ones(copied):
    run = open_run(load_recipe(QUICK, copied))
    finish(run, *ALL)
    shutil.rmtree(run.path("answers"))
    finish(run, "answers")  # the same once more
    assert done(copied) == ALL
    shutil.rmtree(run.path("answers"))
    with run.stage("answers") as folder:
        Dataset.from_list([{"stage": "other"}]).save_to_disk(folder)
    assert done(copied) == ["answers"]


def test_a_stage_whose_inputs_are_not_there_is_refused(copied, capsys):
    assert train([QUICK, "distill", *copied]) == 2
    assert "the stage 'distill' reads what 'answers' writes, and that has not run" in capsys.readouterr().err
    finish(open_run(load_recipe(QUICK, copied)), "answers", "distill")
    assert train([QUICK, "distill", *copied, "answers.prompts=3"]) == 2
    assert "reads what 'answers' writes" in capsys.readouterr().err


def test_another_address_of_the_judge_keeps_the_labels(copied):
    def depends(*words):
        recipe = load_recipe(QUICK, [*copied, *words])
        return Dependencies(recipe, Digests(), lambda _: "", lambda _: {}).hash("rollouts")

    judge = "rollouts.judge={url: 'http://a/v1', model: big}"
    moved = "rollouts.judge={url: 'http://b/v1', model: big, concurrency: 3}"
    assert depends() != depends(judge) == depends(moved)
    assert depends(judge) != depends("rollouts.judge={url: 'http://a/v1', model: small}")


def test_another_server_or_batch_keeps_what_is_answered(copied):
    """As the advice says: lower the batch size, mend the server's address; what is answered is kept."""

    def killed(*words):
        with open_run(load_recipe(QUICK, [*copied, *words])).stage("answers") as folder:
            seen = (folder / KEPT / "rows").exists()
            (folder / KEPT / "rows").write_text("some")
            raise KeyboardInterrupt(seen)

    server = "answers.server={url: 'http://a/v1', model: big}"
    for words, kept in (
        ([server], False),
        (["answers.server={url: 'http://b/v1', model: big, concurrency: 3, retries: 1}"], True),
        ([server, "answers.prompts=3"], True),
        (["answers.server={url: 'http://b/v1', model: other}"], False),
        (["answers.server={url: 'http://b/v1', model: big, extra_body: {top_k: 1}}"], False),
        ([], False),
        (["answers.batch_size=1"], True),
    ):
        with pytest.raises(KeyboardInterrupt) as found:
            killed(*words)
        assert found.value.args == (kept,), words


def test_rows_are_kept_by_their_prompts(copied, tmp_path):
    """Killed after two answers; then a line comes in front of the file: no prompt gets another one's answer."""
    words = [QUICK, "answers", *copied, "answers.batch_size=1"]
    command = [sys.executable, "-m", "train", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    part = tmp_path / "runs" / "quickstart" / ".answers.part"
    lines = lambda: [line for file in part.rglob("*.jsonl") for line in file.read_text().splitlines()]
    wait_for(lambda: len(lines()) >= 2, process)
    process.kill()
    process.communicate()
    kept = lines()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "list : #1 pear genoa 3 .", "split": "answers"}) + "\n" + rows.read_text())
    assert train(words) == 0
    found = load_from_disk(tmp_path / "runs" / "quickstart" / "answers").to_list()
    rejected = (tmp_path / "runs" / "quickstart" / "answers" / "rejected.jsonl").read_text().splitlines()
    answers = {row["prompt"]: row["answer"] for row in [*found, *map(json.loads, rejected)]}
    fresh = [word.replace(str(tmp_path / "runs"), str(tmp_path / "fresh")) for word in words]
    assert train(fresh) == 0
    again = load_from_disk(tmp_path / "fresh" / "quickstart" / "answers").to_list()
    assert {row["prompt"]: row["answer"] for row in again}.items() <= answers.items()
    assert len(answers) == len(LISTS) + 1
    assert len(kept) >= 2


def test_every_stage_leaves_a_record_that_stays(copied, monkeypatch):
    finish(open_run(load_recipe(QUICK, copied)), "answers", "distill")
    monkeypatch.setattr(sys, "argv", ["train", QUICK, "answers.prompts=7"])
    finish(open_run(load_recipe(QUICK, [*copied, "answers.prompts=7"])), "answers")
    monkeypatch.setattr(sys, "argv", ["eval", QUICK, "eval.prompts=50"])
    run = open_run(load_recipe(QUICK, [*copied, "eval.prompts=50"]))
    run.record("eval", 3.0, {"methods": []})
    record = json.loads((run.folder / "provenance.json").read_text())
    assert [old["stage"] for old in record["history"]] == ["answers"]
    assert set(record["stages"]) == {"answers", "distill", "eval"}
    assert record["stages"]["answers"]["argv"] == ["train", QUICK, "answers.prompts=7"]
    assert record["stages"]["answers"]["recipe"]["answers"]["prompts"] == 7
    assert record["history"][0]["recipe"]["answers"]["prompts"] == 350
    assert record["stages"]["eval"]["recipe"]["eval"]["prompts"] == 50
    assert {"target", "prompts"} <= set(record["stages"]["answers"]["read"])
    assert "notes.json" in record["stages"]["answers"]["wrote"]
    kept = load_recipe(run.folder / "recipe.yaml")  # of the last stage, not of an evaluation
    assert (kept.answers.prompts, kept.eval.prompts) == (7, 200)


def test_what_is_not_the_runs_own_is_not_deleted(copied, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    (folder / "answers").mkdir(parents=True)
    (folder / "answers" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds answers and no provenance.json, so it is not a run's folder"):
        open_run(load_recipe(QUICK, copied))
    assert (folder / "answers" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(folder)
    run = open_run(load_recipe(QUICK, copied))
    finish(run, "answers")
    (folder / "answers" / "thesis.txt").write_text("mine")
    assert done(copied) == ["answers"]  # it disturbs nobody, until the folder is to be written anew
    with pytest.raises(RecipeError, match=r"holds thesis.txt, which no stage of this run wrote"):
        finish(open_run(load_recipe(QUICK, [*copied, "answers.prompts=7"])), "answers")
    (folder / "distill").write_text("a file")
    assert (folder / "answers" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("at", ["recipes.files.Path.rename", "recipes.run.Run.record", "recipes.run.shutil.rmtree"])
@pytest.mark.parametrize("before", [False, True])
def test_killed_while_a_stage_takes_its_place_nothing_is_lost(copied, monkeypatch, at, before):
    """Neither what was there before nor what the stage has made; and the next start does not refuse its own files."""
    if before:
        finish(open_run(load_recipe(QUICK, copied)), "answers")
    words = [*copied, "engine.max_new_tokens=50"]

    def killed(*_, **__):
        raise KeyboardInterrupt

    run = open_run(load_recipe(QUICK, words))

    def kill_at_the_end():
        with run.stage("answers") as folder:
            Dataset.from_list([{"stage": "answers"}]).save_to_disk(folder)
            (folder / KEPT / "rows").write_text("some")
            monkeypatch.setattr(at, killed)

    with pytest.raises(KeyboardInterrupt):
        kill_at_the_end()
    monkeypatch.undo()
    run._held.release()
    run = open_run(load_recipe(QUICK, words))
    if not run.is_done("answers"):
        with run.stage("answers") as folder:
            assert (folder / KEPT / "rows").read_text() == "some"
            Dataset.from_list([{"stage": "answers"}]).save_to_disk(folder)
    assert run.is_done("answers")
    run.check_outputs()
    assert load_from_disk(run.path("answers")).to_list() == [{"stage": "answers"}]
    assert not (run.path("answers") / KEPT).exists()
    assert sorted(path.name for path in run.folder.iterdir() if not path.name.startswith(".")) == [
        "answers",
        "provenance.json",
        "recipe.yaml",
    ]


def test_killed_before_its_record_a_stage_is_the_runs_own_for_another_recipe_too(copied, monkeypatch):
    """What it wrote stands in no record, and the next start, which writes it anew, must not take it for foreign."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.run.Run.record", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(open_run(load_recipe(QUICK, copied)), "answers")
    words = [*copied, "engine.max_new_tokens=50"]
    finish(open_run(load_recipe(QUICK, words)), "answers")
    assert done(words) == ["answers"]


def test_killed_as_it_begins_a_run_begins_again(copied, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for step in ("recipes.run.Run._lock", "recipes.run.write_text", "recipes.run.Run._write_recipe"):
        with monkeypatch.context() as patch:
            patch.setattr(step, killed)
            with pytest.raises(KeyboardInterrupt):
                open_run(load_recipe(QUICK, copied))
    assert not open_run(load_recipe(QUICK, copied)).is_done("answers")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"stages": []}', '{"stages": {"answers": 3}}', "\xff"])
def test_a_damaged_record_is_named(copied, content):
    run = open_run(load_recipe(QUICK, copied))
    (run.folder / "provenance.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match="provenance.json is damaged .* restore it, or move the folder"):
        open_run(load_recipe(QUICK, copied))


@pytest.mark.parametrize("damage", ["cut", "emptied", "missing", "folder empty", "state.json", "changed"])
def test_damage_to_what_a_stage_wrote_is_found_before_it_is_used(copied, damage, capsys):
    run = open_run(load_recipe(QUICK, copied))
    finish(run, "answers")
    arrow = next(run.path("answers").glob("*.arrow"))
    data = arrow.read_bytes()
    if damage == "folder empty":
        shutil.rmtree(run.path("answers"))
        run.path("answers").mkdir()
    elif damage == "state.json":
        (run.path("answers") / "state.json").unlink()
    elif damage == "missing":
        arrow.unlink()
    else:
        arrow.write_bytes({"cut": data[:-9], "emptied": b"", "changed": data[:-9] + bytes(9)}[damage])
    assert train([QUICK, "answers", "distill", *copied]) == 2
    said = capsys.readouterr().err
    assert str(run.path("answers")) in said
    assert "delete the folder" in said
    assert "the stage runs again" in said
    with pytest.raises(RecipeError, match="is damaged|is missing"):
        open_run(load_recipe(QUICK, copied)).check_outputs()
    shutil.rmtree(run.path("answers"))  # as it says
    assert done(copied) == []
