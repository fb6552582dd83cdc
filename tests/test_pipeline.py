"""The whole chain on the shipped pair: stages, resume, evaluation, and the properties of the pair."""

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import openai
import psutil
import pytest
import torch
from datasets import load_from_disk
from filelock import FileLock
from safetensors import safe_open

from eval.__main__ import main as evaluate
from eval.methods import WHAT, Outcome, compare, settings_of
from eval.parity import COUNT, EXAMPLES
from eval.properties import foreign_accuracy, judge_drafts, measure_pair
from eval.tasks import TASKS, draw_prompts, ledger
from eval.verifier_metrics import measure, score, untrained_kinds
from parse import Engine
from parse.__main__ import main as ask
from recipes.schema import load_recipe
from tests.conftest import MODELS, adopt, launch, wait_for
from train.__main__ import main as train
from train.transfer import main as transfer

pytestmark = pytest.mark.slow
RECIPE = "recipes/quickstart.yaml"
KINDS = ("likelihood", "divergence")
VERIFIERS = ("probe", "folded", "adapter", "prompt", "likelihood")
SPLITS = ("train", "calibration", "test")
UNALIGNED = "stages=[answers,distill,rollouts,verifier]"
SMALL = [
    "rollouts.train=120",
    "rollouts.calibration=100",
    "rollouts.test=60",
    "rollouts.recheck=10",
    "align.prompts=60",
    "verifier.adapter.epochs=1",
    "verifier.folded.tries=1",
    "verifier.folded.epochs=20",
    "eval.prompts=8",
    "eval.concurrency=[1]",
    "eval.sweep_prompts=2",
    "eval.warmup=1",
    "engine.compile=false",
]


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A run of every stage: the quickstart's own distillation, fewer rollouts."""
    words = [*SMALL, f"runs={tmp_path_factory.mktemp('runs')}"]
    assert train([RECIPE, *words]) == 0
    return words


@pytest.fixture(scope="session")
def recipe(words):
    return load_recipe(RECIPE, words)


@pytest.fixture(scope="session")
def engine(recipe):
    return Engine.from_pretrained(recipe.target, recipe.draft_folder, recipe.folder / "verifier", compile=False)


@pytest.fixture(scope="session")
def pair(engine, recipe):
    prompts = draw_prompts(TASKS["ledger"], "test", 100, seed=7)

    def answered(method):  # many at once: here no seconds are asked for
        results = engine.generate(prompts, 200, method=method)
        right = [r.finish_reason == "stop" and ledger.check(p, r.text) for p, r in zip(prompts, results, strict=True)]
        return [Outcome(*one, seconds=1.0) for one in zip(prompts, results, right, strict=True)]

    return measure_pair(engine, TASKS["ledger"], answered("target"), answered("draft"))


def test_the_shipped_files_are_small():
    for name, limit in (("ledger-target", 12), ("ledger-draft", 1.5)):
        file = MODELS / name / "model.safetensors"
        assert file.stat().st_size <= limit * 1e6
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118  not a dict
        assert kinds <= {torch.bfloat16, torch.float16}


def test_answers_are_of_the_intended_length(pair):
    assert pair["answer_tokens"]["least"] >= 90
    assert pair["answer_tokens"]["most"] <= 250


def test_the_target_is_right(pair):
    assert pair["target_accuracy"] >= 0.99


def test_the_target_goes_on_rightly_from_a_foreign_prefix(engine):
    assert foreign_accuracy(engine, TASKS["ledger"], draw_prompts(TASKS["ledger"], "test", 200, seed=8)) >= 0.99


def test_the_distilled_draft_is_right_in_part(pair):
    assert 0.5 <= pair["draft_accuracy"] <= 0.85


def test_free_rules_cannot_tell_right_from_wrong(pair):
    free = [auc for name, auc in pair["auc"].items() if name.startswith("likelihood")]
    assert len(free) == 4
    assert max(free) <= 0.85


def test_lossless_speculation_keeps_less_than_half_of_what_meaning_would(pair):
    assert pair["lossless_tokens"] < pair["oracle_tokens"] / 2


def test_the_target_can_judge_when_asked(pair):
    assert 0.85 <= pair["auc"]["prompt"] <= 0.98


def test_the_target_is_deep_and_the_draft_is_shallow(pair):
    assert pair["target_layers"] >= 8
    assert pair["draft_layers"] <= 2


def test_the_splits_of_the_stages_do_not_overlap(recipe):
    answers = set(load_from_disk(recipe.folder / "answers")["prompt"])
    rollouts = load_from_disk(recipe.rollouts_folder).to_list()
    fitted = {r["prompt"] for r in rollouts if r["split"] == "train"}
    calibrated = {r["prompt"] for r in rollouts if r["split"] == "calibration"}
    measured = {r["prompt"] for r in rollouts if r["split"] == "test"}
    tested = set(draw_prompts(TASKS["ledger"], "test", 200, recipe.seed))
    splits = [answers, fitted, calibrated, measured, tested]
    assert all(splits)
    assert sum(map(len, splits)) == len(set().union(*splits))


def test_answers_hold_ids_and_masks(recipe, engine):
    row = load_from_disk(recipe.folder / "answers")[0]
    prompt = engine.encode(row["prompt"])
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(row["input_ids"]) - len(prompt))
    completion = row["input_ids"][len(prompt) :]
    assert completion[-1] == engine.tokenizer.eos_token_id
    assert engine.tokenizer.decode(completion[:-1]) == row["answer"]


def test_labels_agree_with_the_tasks_program(recipe, engine):
    """The target's continuation labels a prefix as the checker does, but where the target itself errs."""
    rollouts = load_from_disk(recipe.rollouts_folder).to_list()
    agree = total = 0
    for row in rollouts:
        for end, valid in zip(row["ends"], row["valid"], strict=True):
            prefix = engine.tokenizer.decode([*row["prefix_ids"], *row["draft_ids"][:end]])
            by_program = ledger.first_wrong(row["prompt"], prefix) is None
            agree += by_program == valid
            total += 1
        assert row["valid"] == sorted(row["valid"], reverse=True)
    assert agree / total >= 0.98
    summary = json.loads((recipe.rollouts_folder / "labels.json").read_text())
    assert summary["prefixes"] == total
    assert summary["prompts"] == {"train": 120, "calibration": 100, "test": 60}
    assert summary["asked_again"] == 10
    assert summary["other_label"] <= 0.1
    assert summary["seconds_per_label"] > 0


def test_a_second_start_does_nothing(words, capsys):
    assert train([RECIPE, *words]) == 0
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 6
    assert "run folder" not in out  # nothing will be written


def test_the_verifier_is_saved_with_what_it_was_made_for(recipe):
    record = json.loads((recipe.folder / "verifier" / "verifier.json").read_text())
    assert record["segments"] == "sentence"
    assert record["calibration"]["prompts"] == 100
    assert set(record["thresholds"]) == {"first_fail", "longest", "whole"}


def test_the_report_compares_every_kind(recipe):
    report = json.loads((recipe.folder / "verifier" / "report.json").read_text())
    kinds = report["kinds"]
    rules = itertools.product(KINDS, ("mean", "lowest"), ("segment", "prefix"))
    free = {" ".join(rule) for rule in rules}
    assert set(kinds) == {*free, "prompt", "probe", "folded", "adapter"}
    figures = {
        "auc",
        "threshold",
        "false_accept_rate",
        "false_reject_rate",
        "first_error_f1",
        "accepted_fraction",
        "oracle_accepted_fraction",
        "ece",
        "milliseconds_per_cut",
    }
    assert all(figures <= set(row) for row in kinds.values())
    assert report["n_prompts"] == 60
    assert report["n_prefixes"] > 400
    assert report["max_accuracy_loss"] == recipe.verifier.max_accuracy_loss
    assert report["realised_accuracy_loss"] == kinds[report["chosen"]]["accuracy_loss"]
    page = (recipe.folder / "verifier" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert all(kind in page for kind in kinds)
    assert set(report["curves"]) == set(kinds)


def test_the_winner_beats_the_free_rules_and_the_prompt(recipe):
    """By what the promise of the whole quickstart is, with a third of its rollouts."""
    report = json.loads((recipe.folder / "verifier" / "report.json").read_text())
    error = {name: 1 - row["auc"] for name, row in report["kinds"].items()}
    best = error[report["chosen"]]
    assert best <= 0.04
    assert all(best <= error[name] / 3 for name in error if name.startswith(("likelihood", "divergence")))
    assert best <= error["prompt"] / 2
    chosen = report["kinds"][report["chosen"]]
    assert chosen["accepted_fraction"] >= 0.8 * chosen["oracle_accepted_fraction"]


def test_too_few_prompts_promise_nothing(words, recipe, tmp_path, capsys):
    """The stage says how many more it takes, and the engine accepts nothing."""
    folder = tmp_path / "quickstart"
    options = [*(w for w in words if not w.startswith("runs=")), UNALIGNED]
    options += [f"runs={tmp_path}", "verifier.kind=likelihood", "verifier.max_accuracy_loss=0.001"]
    adopt(load_recipe(RECIPE, options), distill=recipe.folder / "draft", rollouts=recipe.rollouts_folder)
    assert train([RECIPE, "verifier", *options]) == 0
    assert "It takes at least 899 more (rollouts.calibration: 999)" in capsys.readouterr().out
    engine = Engine.from_pretrained(recipe.target, folder / "draft", folder / "verifier", compile=False)
    prompt = draw_prompts(TASKS["ledger"], "test", 1, seed=6)[0]
    assert engine.generate(prompt, 60)[0].stats.accepted_tokens == 0


def test_killed_rollouts_go_on_and_come_out_the_same(words, recipe, tmp_path):
    """Killed for good in the middle, on two processes, and gone on with by one."""
    folder, kept = tmp_path / "quickstart", tmp_path / "quickstart" / ".rollouts.part" / ".kept" / "rollouts"
    options = [*(w for w in words if not w.startswith(("runs=", "rollouts."))), f"runs={tmp_path}", UNALIGNED]
    options += [f"rollouts.{split}=10" for split in ("train", "calibration", "test")]
    options += ["rollouts.recheck=2", "rollouts.batch_size=4", "rollouts.drafts=2"]
    adopt(load_recipe(RECIPE, options), distill=recipe.folder / "draft")
    process = launch("ddp", RECIPE, "rollouts", *options)
    lines = lambda: sum(file.read_text().count("\n") for file in kept.glob("*.jsonl")) if kept.is_dir() else 0
    wait_for(lambda: lines() >= 5, process)
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.communicate()
    made = lines()
    assert made < 30
    assert not (folder / "rollouts").exists()
    assert train([RECIPE, "rollouts", *options]) == 0
    interrupted = load_from_disk(folder / "rollouts").to_list()
    shutil.rmtree(folder / "rollouts")
    assert train([RECIPE, "rollouts", *options]) == 0
    assert load_from_disk(folder / "rollouts").to_list() == interrupted
    assert sum(not row["met"] for row in interrupted) == 10


def test_rollouts_take_up_no_training_prompt_after_their_time(words, recipe, tmp_path, capsys):
    """The first one always, and calibration and test before it."""
    options = [*(w for w in words if not w.startswith(("runs=", "rollouts."))), f"runs={tmp_path}", UNALIGNED]
    options += [f"rollouts.{split}=4" for split in ("train", "calibration", "test")] + ["rollouts.recheck=1"]
    adopt(load_recipe(RECIPE, options), distill=recipe.folder / "draft")
    folder = tmp_path / "quickstart" / "rollouts"
    assert train([RECIPE, "rollouts", *options, "rollouts.batch_size=1", "rollouts.minutes=0.001"]) == 0
    late = json.loads((folder / "labels.json").read_text())["not_taken_up"]
    assert 1 <= late <= 3
    assert f"{late} prompts to learn from were not taken up" in capsys.readouterr().out
    prompts = {split: {row["number"] for row in load_from_disk(folder) if row["split"] == split} for split in SPLITS}
    assert [len(prompts[split]) for split in SPLITS] == [4 - late, 4, 4]
    assert train([RECIPE, "rollouts", *options]) == 0
    assert len({row["number"] for row in load_from_disk(folder)}) == 12


def test_a_run_is_served_as_it_was_calibrated(recipe, engine):
    """By the command, as `make serve` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "parse", "serve", "--run", str(recipe.folder), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    prompt = draw_prompts(TASKS["ledger"], "test", 1, seed=6)[0]
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        answer = client.chat.completions.create(
            model=recipe.name, messages=[{"role": "user", "content": prompt}], max_tokens=200
        )
        assert answer.choices[0].message.content == engine.generate(prompt, 200)[0].text
        figures = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert "parse:calibration_drift{" in figures
        assert "parse:confidence_drift{" in figures
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert f"serving {recipe.name} at" in said


def test_a_verifier_is_measured_on_the_drafts_of_another_run(words, recipe, capsys):
    """On those of its own run it gets what its report says."""
    settings = [part for word in words for part in ("--set", word)]
    assert transfer([RECIPE, str(recipe.rollouts_folder), *settings]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    report = json.loads((recipe.folder / "verifier" / "report.json").read_text())
    for key, value in report["kinds"][report["chosen"]].items():
        if key != "milliseconds_per_cut":
            assert found[key] == found["recalibrated"][key] == pytest.approx(value, abs=1e-4), key
    assert transfer([RECIPE, str(recipe.folder / "rollouts"), *settings]) == 2  # of its training prompts alone
    assert "holds no drafts of calibration and test prompts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def some(words, recipe, tmp_path_factory):
    """A copy of the run with part of its rollouts, and one process's report of the kinds that need no training."""
    folder = tmp_path_factory.mktemp("some") / "quickstart"
    rollouts = load_from_disk(recipe.rollouts_folder).filter(lambda row: row["number"] % 5 < 2)
    options = [*(w for w in words if not w.startswith("runs=")), f"runs={folder.parent}", UNALIGNED]
    adopt(load_recipe(RECIPE, options), distill=recipe.folder / "draft", rollouts=rollouts)
    assert train([RECIPE, "verifier", *options, "verifier.kind=likelihood"]) == 0
    return folder, options, json.loads((folder / "verifier" / "report.json").read_text())


@pytest.mark.parametrize("topology", ["ddp", "fsdp2"])
def test_two_processes_train_and_calibrate_as_one(topology, some, recipe):
    """Each reads and learns from its own half; what nobody learns comes out as by one process, which loads the rest."""
    folder, options, alone = some
    process = launch(topology, RECIPE, "verifier", *options)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    wrapped = {
        "ddp": {"DistributedDataParallel"},
        "fsdp2": {"FSDPProbeModule", "FSDPFoldedModule", "FSDPAdapterModule"},
    }
    assert set(re.findall(r"prepared: (\w+)\.", output)) == wrapped[topology]
    report = json.loads((folder / "verifier" / "report.json").read_text())
    assert (report["n_prompts"], report["n_prefixes"]) == (alone["n_prompts"], alone["n_prefixes"])
    for name, row in alone["kinds"].items():
        for key in ("auc", "accepted_fraction", "ece"):
            assert report["kinds"][name][key] == pytest.approx(row[key], abs=0.02), (name, key)
    assert report["kinds"]["probe"]["auc"] > 0.65  # from 48 prompts
    Engine.from_pretrained(recipe.target, folder / "draft", folder / "verifier", compile=False)
    shutil.rmtree(folder / "verifier")  # not done before for the other topology


def test_the_trained_verifier_beats_every_free_rule(engine, recipe):
    prompts = draw_prompts(TASKS["ledger"], "test", 100, seed=9)
    drafts = compare(engine, TASKS["ledger"], prompts, {"draft": {"method": "draft"}}, 0)["draft"]
    judged = judge_drafts(engine, TASKS["ledger"], drafts, engine.verifier.layers)
    free = untrained_kinds(engine)
    free.pop("prompt")
    auc = lambda kind: measure(score(kind, judged), 0.5)["auc"]
    assert auc(engine.verifier) > max(map(auc, free.values()))


def test_the_invariants_on_the_shipped_pair(engine, recipe):
    thresholds = {"first_fail": 0.5, "whole": 0.5}
    settings = settings_of(recipe, thresholds, ["parse"])["parse"]
    for prompt in draw_prompts(TASKS["ledger"], "test", 5, seed=3):
        target = engine.generate(prompt, 200, method="target")[0]
        draft = engine.generate(prompt, 200, method="draft")[0]
        assert engine.generate(prompt, **{**settings, "threshold": 1.1})[0].token_ids == target.token_ids
        assert engine.generate(prompt, **{**settings, "threshold": 0.0})[0].token_ids == draft.token_ids


def test_the_evaluation_prints_one_json_line(words, recipe, capsys):
    assert evaluate([RECIPE, *words]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((recipe.folder / "eval" / "summary.json").read_text())
    usual = list(WHAT)[: -len(VERIFIERS)]  # with assisted generation: draft and target have the same tokens
    assert [row["name"] for row in printed["methods"]] == usual
    assert all(row["n"] == 8 for row in printed["methods"])
    page = (recipe.folder / "eval" / "report.html").read_text()
    parse = next(row for row in printed["methods"] if row["name"] == "parse")
    assert f"PARSE answered {parse['speedup']:.1f} times as fast as the target alone" in page
    errs = any(parse["false_accept_places"] + parse["false_reject_places"])
    assert page.count("<svg") == 2 + errs + 3  # methods, without other loads; verifiers
    assert len(printed["sweep"]) > 1
    for point in printed["sweep"]:
        assert (point["by_labels"], point["n"]) == (True, 2)
        assert 0 <= point["accuracy"] <= 1
    table = (recipe.folder / "eval" / "summary.csv").read_text().splitlines()
    assert len(table) == 1 + 9
    lines = (recipe.folder / "eval" / "transcripts.jsonl").read_text().splitlines()
    assert len(lines) == 9 * 8


def test_what_was_trained_is_what_is_served(words, recipe, capsys):
    """Of the run's own records; and a mask that leaves out the end is named."""
    assert evaluate(["parity", RECIPE, *words]) == 0
    lines = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [f"alike in all of {COUNT} prompts"] * 7
    folder = recipe.folder / "draft"
    kept = (folder / EXAMPLES).read_text()
    rows = json.loads(kept)
    rows[3]["learnt"][-1] = False
    (folder / EXAMPLES).write_text(json.dumps(rows))
    try:
        assert evaluate(["parity", RECIPE, *words]) == 1
        assert "differs in 1 of 20 prompts; in number 4 False in training, True expected" in capsys.readouterr().out
    finally:
        (folder / EXAMPLES).write_text(kept)


def test_the_prediction_stands_beside_the_run(words, capsys):
    assert evaluate(["plan", RECIPE, *words]) == 0
    printed = capsys.readouterr().out
    assert "forward passes measured on this machine" in printed
    for name in ("drafting", "verifying", "PARSE", "target alone"):
        assert all(float(seconds) > 0 for seconds in re.search(name + 3 * r" +([\d.]+)", printed).groups())
    assert float(re.search(r"between passes +([\d.]+) +([\d.]+)", printed)[1]) == 0  # it is the gap
    assert re.search(r"speed-up +[\d.]+x +[\d.]+x +[\d.]+x +[+-][\d.]+%", printed)


def test_a_verifiers_report_that_is_none_is_refused_before_anything_is_measured(words, recipe, tmp_path, capsys):
    shutil.copytree(recipe.folder / "verifier", tmp_path / "verifier")
    (tmp_path / "verifier" / "report.json").write_text('{"kinds": {}}')
    assert evaluate([RECIPE, *words, f"eval.verifier={tmp_path / 'verifier'}"]) == 2
    assert "report.json is no report of a verifier" in capsys.readouterr().err


def test_every_kind_of_verifier_can_be_evaluated(words, recipe, tmp_path, capsys):
    """Each at its own threshold; the chosen one twice, which must be the same."""
    folder = recipe.folder / "verifier"
    chosen = json.loads((folder / "verifier.json").read_text())["kind"]
    assert {path.name for path in (folder / "others").iterdir()} == {*VERIFIERS} - {chosen}
    methods = ["target", "assisted", "parse", *(f"parse_{kind}" for kind in VERIFIERS)]
    few = ["eval.prompts=4", "eval.sweep_prompts=0", "eval.concurrency=[1,2]", f"eval.methods=[{','.join(methods)}]"]
    assert evaluate([RECIPE, *words, *few]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in summary["methods"]}
    (loaded,) = summary["concurrency"]
    assert loaded["at_once"] == 2
    assert [row["name"] for row in loaded["methods"]] == [name for name in methods if name != "assisted"]
    assert all(row["tokens_per_answer"] == rows[row["name"]]["tokens_per_answer"] for row in loaded["methods"])
    assert list(rows) == methods
    same = ("tokens_from_draft", "tokens_from_target", "accuracy", "rounds")
    assert [rows[f"parse_{chosen}"][key] for key in same] == [rows["parse"][key] for key in same]
    shutil.copytree(folder, tmp_path / "verifier", ignore=shutil.ignore_patterns("others"))
    assert evaluate([RECIPE, *words, *few, f"eval.verifier={tmp_path / 'verifier'}"]) == 2
    assert "holds no verifier of the kind" in capsys.readouterr().err


def test_an_evaluation_without_a_run_says_what_to_do(tmp_path, capsys):
    assert evaluate([RECIPE, f"runs={tmp_path}"]) == 2
    assert "accelerate launch -m train recipes/quickstart.yaml" in capsys.readouterr().err


def test_a_method_loads_the_models_that_it_takes(tmp_path, capsys):
    """Without a run there is no draft and no verifier, and the target by itself needs none."""
    few = ["eval.prompts=3", "eval.concurrency=[1]", "eval.methods=[target,generate]", "engine.compile=false"]
    assert evaluate([RECIPE, f"runs={tmp_path}", *few]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["accuracy"] for row in summary["methods"]] == [1, 1]
    assert (summary["draft"], summary["verifier"], summary["threshold"]) == (None, None, None)


def test_an_evaluation_beside_a_training_in_the_same_folder_is_refused(words, recipe, capsys):
    with FileLock(recipe.folder / ".lock"):
        assert evaluate([RECIPE, *words]) == 2
    assert "is in use by another start" in capsys.readouterr().err


def test_an_answer_from_a_terminal(recipe, capsys):
    prompt = draw_prompts(TASKS["ledger"], "test", 1, seed=4)[0]
    assert ask([prompt, "--run", str(recipe.folder)]) == 0
    printed = capsys.readouterr().out
    assert "draft tokens accepted" in printed
    assert "coins" in printed


def test_two_launches_by_accelerate(words):
    """The real entry, from a shell: everything is done, so it only checks and skips."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", "recipes/accelerate/one_process.yaml", "-m", "train", RECIPE, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("skipped") == 6
