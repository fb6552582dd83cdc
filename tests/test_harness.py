"""Tasks of EleutherAI's harness: its prompts, stop strings, filters and metrics, by tasks of our own in its YAML."""

import json

import pytest
import torch
import yaml

from eval.__main__ import main as evaluate
from eval.tasks import TASKS, draw_prompts, ledger, load_task
from eval.tasks.rows import key_of
from parse import Engine
from recipes.schema import load_recipe, to_dict
from tests.conftest import MODELS, QUICK
from tests.http_server import Running
from train.__main__ import main as train

pytest.importorskip("lm_eval")
TARGET = MODELS / "ledger-target"
REGEX = r"that is (\d+)"
SUM = {
    "output_type": "generate_until",
    "dataset_path": "json",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{sum}}",
    "generation_kwargs": {"until": ["coins ."], "do_sample": False},
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {
            "name": "sum",
            "filter": [{"function": "regex", "regex_pattern": r"that is (\d+)"}, {"function": "take_first"}],
        },
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def rows(split: str, count: int) -> list[dict[str, str]]:
    prompts = draw_prompts(TASKS["ledger"], split, count, seed=7)
    return [{"question": p, "sum": str(sum(one.amount for one in ledger.read_prompt(p)))} for p in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks: `sums`; the same with two examples; of a single split; by a score; and one that runs code."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {"train": rows("train", 400), "test": rows("test", 30)}
    data["train"].append(data["test"][0])  # a prompt that is in two splits
    data["small"] = [*rows("calibration", 10), data["test"][1]]  # the last one is in two tasks
    files = {split: str(folder / f"{split}.jsonl") for split in data}
    for split, some in data.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    own = SUM | {"dataset_kwargs": {"data_files": {split: files[split] for split in ("train", "test")}}}
    tasks = {
        "sums": own,
        "sums_shown": own | {"num_fewshot": 2, "description": "Add up.", "fewshot_config": {"sampler": "first_n"}},
        "sums_alone": {key: value for key, value in own.items() if key != "training_split"},
        "sums_begun": own | {"doc_to_text": "{{question}} ", "gen_prefix": "#1 the {{question.split()[3]}} "},
        "sums_scored": own | {"metric_list": [{"metric": "bleu"}], "filter_list": SUM["filter_list"][:1]},
        "sums_unsafe": own | {"unsafe_code": True},
        "sums_choice": own | {"output_type": "multiple_choice", "doc_to_choice": ["1", "2"], "doc_to_target": 0},
    }
    del tasks["sums_choice"]["generation_kwargs"], tasks["sums_choice"]["filter_list"]
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name}))
    groups = {"all_sums": ["sums", "sums_small"], "odd_sums": ["sums", "sums_longer"]}
    groups |= {"mixed": ["sums", "sums_small_begun"], "twice": ["sums", "sums_begun"]}
    more = {"sums_small": {"doc_to_target": "0"}, "sums_longer": {"generation_kwargs": {"until": ["\n"]}}}
    more["sums_small_begun"] = {"gen_prefix": "#1 the"}
    half = {**files, "test": files["small"]}
    for name, change in more.items():
        task = own | {"task": name, "dataset_kwargs": {"data_files": half}} | change
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    for name, members in groups.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    return folder


def load(folder, name, *words):
    recipe = load_recipe(QUICK, [f"task=lm_eval:{name}", f"data.harness.include_path={folder}", *words])
    return load_task(recipe.task, to_dict(recipe.data))


def test_documents_are_dealt_out_and_no_prompt_is_in_two_splits(folder):
    task = load(folder, "sums")
    found = {split: list(task.prompts(split, 0)) for split in ("answers", "train", "calibration", "test")}
    assert len(found["test"]) == 30
    assert sum(map(len, found.values())) == 430
    assert len({prompt for some in found.values() for prompt in some}) == 430
    assert task.duplicates == 1
    assert min(map(len, found.values())) >= 30
    assert set(found["test"]) == {row["question"] for row in rows("test", 30)}
    assert list(task.prompts("train", 0)) == found["train"] != list(task.prompts("train", 1))
    alone = load(folder, "sums_alone")
    assert sorted(len(list(alone.prompts(split, 0))) for split in found)[0] >= 1
    assert sum(len(list(alone.prompts(split, 0))) for split in found) == 30


def test_a_group_is_asked_as_one_and_each_answer_is_checked_by_its_own_task(folder):
    task = load(folder, "all_sums")
    found = {split: list(task.prompts(split, 0)) for split in ("answers", "train", "calibration", "test")}
    assert len(found["test"]) == 40
    assert sum(map(len, found.values())) == len({prompt for some in found.values() for prompt in some}) == 440
    first, small = rows("test", 1)[0], rows("calibration", 1)[0]
    assert task.check(first["question"], f"that is {first['sum']} ")
    assert task.check(small["question"], "that is 0 ")
    assert not task.check(small["question"], f"that is {small['sum']} ")
    assert task.content() != load(folder, "sums").content()
    with pytest.raises(ValueError, match="the tasks of lm_eval:odd_sums end answers at different strings: name one"):
        load(folder, "odd_sums")


def test_an_answer_is_right_by_the_harnesss_filter_and_metric(folder):
    task = load(folder, "sums")
    prompt = next(task.prompts("test", 0))
    total = sum(one.amount for one in ledger.read_prompt(prompt))
    assert task.stop == ("coins .",)
    assert task.check(prompt, f"#1 it costs 4 coins . that is {total} ")
    assert not task.check(prompt, f"that is {total + 1} ")
    assert not task.check(prompt, "no sum")
    whole = load(folder, "sums", "data.harness.filter=whole")
    assert whole.check(prompt, str(total))
    assert not whole.check(prompt, f"that is {total}")


def test_examples_stand_before_the_question_and_never_the_question_itself(folder):
    task = load(folder, "sums_shown")
    for split in ("test", "answers", "train", "calibration"):
        for prompt in task.prompts(split, 0):
            system, user = prompt
            assert system == {"role": "system", "content": "Add up."}
            questions = [line.split(" .")[0] for line in user["content"].split("list : ")[1:]]
            assert len(questions) == 3
            assert len(set(questions)) == 3
    turns = next(load(folder, "sums_shown", "data.harness.fewshot_as_multiturn=true").prompts("test", 0))
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 2, "user"]
    none = next(
        load(folder, "sums_shown", "data.harness.num_fewshot=0", "data.harness.metric=exact_match").prompts("test", 0)
    )
    assert len(none) == 2


def test_a_task_may_begin_the_answer(folder):
    """What a model adds is the answer, and the harness's metric is its judge, as in the harness."""
    task = load(folder, "sums_begun")
    prompts = list(task.prompts("test", 0))
    item = prompts[0][0]["content"].split()[3]
    assert [turn["role"] for turn in prompts[0]] == ["user", "assistant"]
    assert prompts[0][1]["content"] == f"#1 the {item} "
    engine = Engine.from_pretrained(TARGET, compile=False)
    for prompt, answer in zip(
        prompts, engine.generate(prompts, 200, method="target", stop=list(task.stop)), strict=True
    ):
        assert not answer.text.startswith("#1")
        assert task.check(prompt, answer.text)
        assert not task.check(prompt, "that is 0 ")


def test_prompts_of_a_group_are_of_one_form(folder):
    """Text and messages do not go into one column of a data set."""
    found = [prompt for split in ("answers", "test") for prompt in load(folder, "mixed").prompts(split, 0)]
    assert {len(prompt) for prompt in found} == {1, 2}
    assert all(isinstance(prompt, list) for prompt in found)


def test_a_question_is_in_one_split_however_its_answer_begins(folder):
    twice = load(folder, "twice")
    assert twice.duplicates == 1 + 431
    for split in ("answers", "train", "test"):
        assert list(twice.prompts(split, 0)) == list(load(folder, "sums").prompts(split, 0))


def test_what_cannot_be_used_is_said(folder):
    for name, words, message in (
        ("sums_gone", [], "the harness has none of that name"),
        ("sums_choice", [], "has the output type multiple_choice: name one that generates text"),
        ("sums_unsafe", [], "set data.harness.confirm_run_unsafe_code=true"),
        ("sums", ["data.harness.metric=f1"], "data.harness.metric is 'f1': the task has exact_match"),
        ("sums", ["data.harness.filter=last"], "data.harness.filter is 'last': the task has whole, sum"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, name, *words)
    assert load(folder, "sums_unsafe", "data.harness.confirm_run_unsafe_code=true").stop
    scored = load(folder, "sums_scored")
    prompt = next(scored.prompts("test", 0))
    with pytest.raises(ValueError, match="bleu is a metric of all answers together and not of one"):
        scored.check(prompt, "11")


def test_a_score_is_right_from_a_threshold_on(folder, monkeypatch):
    task = load(folder, "sums")
    prompt = next(task.prompts("test", 0))
    monkeypatch.setattr(task.members[0], "score", lambda *_: 0.4)
    with pytest.raises(ValueError, match=r"exact_match is 0.4 for an answer, .* as data.harness.threshold"):
        task.check(prompt, "x")
    for threshold, right in ((0.3, True), (0.5, False)):
        loaded = load(folder, "sums", f"data.harness.threshold={threshold}")
        monkeypatch.setattr(loaded.members[0], "score", lambda *_: 0.4)
        assert loaded.check(prompt, "x") == right


def test_what_the_task_asks_decides_whether_stages_run_again(folder):
    task = load(folder, "sums")
    assert task.content() == load(folder, "sums").content()
    assert task.content() != load(folder, "sums", "data.harness.num_fewshot=1").content()
    assert key_of(next(task.prompts("test", 0))).startswith("list : ")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sums", "sums_begun"])
def test_a_task_of_the_harness_from_answers_to_evaluation(folder, tmp_path, capsys, task):
    words = [
        f"runs={tmp_path}",
        "name=sums",
        f"task=lm_eval:{task}",
        f"data.harness.include_path={folder}",
        "stages=[answers,distill,rollouts,verifier]",
        f"draft={MODELS / 'ledger-draft'}",
        "answers.prompts=40",
        "distill.trainer.num_train_epochs=1",
        "rollouts.train=40",
        "rollouts.calibration=60",
        "rollouts.test=20",
        "rollouts.recheck=4",
        "verifier.kind=probe",
        "verifier.max_accuracy_loss=0.05",
        "verifier.probe.epochs=4",
        "verifier.folded.tries=1",
        "verifier.folded.epochs=4",
        "eval.prompts=8",
        "eval.concurrency=[1]",
        "eval.warmup=0",
        "eval.sweep_prompts=0",
        "engine.compile=false",
    ]
    assert train([QUICK, *words]) == 0
    assert evaluate([QUICK, *words]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {row["name"]: row for row in printed["methods"]}
    assert by_name["target"]["accuracy"] >= 0.8
    assert by_name["generate"]["accuracy"] == by_name["target"]["accuracy"] == by_name["speculation"]["accuracy"]
    answered = [json.loads(line) for line in (tmp_path / "sums/eval/transcripts.jsonl").read_text().splitlines()]
    assert not any("coins ." in row["text"] for row in answered)
    assert any("that is" in row["text"] for row in answered)


@pytest.fixture
def served():
    running = Running(Engine.from_pretrained(TARGET, compile=False))
    running.serving.defaults = {"method": "target", "max_new_tokens": 200}
    yield running
    assert running.idle()
    running.close()


def harness(model, task, tasks, **options):
    """The harness's own run of a task of a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


def arguments(running, route):
    names = {"model": "tiny", "base_url": f"{running.url}/v1/{route}", "num_concurrent": 4, "max_retries": 1}
    return names | {"tokenizer_backend": "huggingface", "tokenizer": str(TARGET)}


@pytest.mark.slow
def test_the_harness_generates_by_the_server_as_our_evaluation_does(served, folder):
    pytest.importorskip("tenacity")
    recipe = load_recipe(QUICK, ["task=lm_eval:sums", f"data.harness.include_path={folder}"])
    task = load_task(recipe.task, to_dict(recipe.data))
    prompts = list(task.prompts("test", 0))
    answers = served.engine.generate(prompts, 200, method="target", stop=list(task.stop))
    ours = sum(task.check(prompt, one.text) for prompt, one in zip(prompts, answers, strict=True)) / len(prompts)
    chat = arguments(served, "chat/completions") | {"tokenizer_backend": None}
    found = harness("local-chat-completions", "sums", folder, model_args=chat, apply_chat_template=True)
    assert found["results"]["sums"]["exact_match,sum"] == pytest.approx(ours)
    assert ours > 0.8


def by_both(served, folder, task, limit):
    """The harness's runs of a task of a folder: through the server, and with the model itself."""
    pytest.importorskip("tenacity")
    from lm_eval.models.huggingface import HFLM

    away = harness("local-completions", task, folder, model_args=arguments(served, "completions"), limit=limit)
    model = HFLM(pretrained=served.engine.target, tokenizer=served.engine.tokenizer)
    return away, harness(model, task, folder, limit=limit)


@pytest.mark.slow
def test_the_harness_generates_from_raw_texts_as_the_model_itself(served, folder):
    found = by_both(served, folder, "sums", limit=6)
    ours, theirs = ([one["resps"] for one in each["samples"]["sums"]] for each in found)
    assert ours == theirs
    assert all(text for ((text,),) in ours)


@pytest.mark.slow
def test_the_harness_rates_choices_by_the_server_as_by_the_model_itself(served, folder):
    found = by_both(served, folder, "sums_choice", limit=8)
    ours, theirs = (
        [[float(value) for ((value, _),) in one["resps"]] for one in each["samples"]["sums_choice"]] for each in found
    )
    assert torch.tensor(ours) == pytest.approx(torch.tensor(theirs), abs=1e-3)
    figures = [
        {name: value for name, value in each["results"]["sums_choice"].items() if name.startswith("exact_match,")}
        for each in found
    ]
    assert figures[0] == figures[1] != {}
