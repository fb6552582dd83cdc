"""Labels: found by bisection as by asking for every prefix; judged by the task, or by the target itself."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judges import Agreement, AskedTarget, Checked, controls
from eval.tasks import TASKS, draw_prompts, ledger, load_task
from parse import Engine
from parse.scheduler import run, run_together
from recipes.schema import Data, RecipeError, load_recipe, to_dict
from tests.conftest import MODELS
from train.disturbed import disturbed
from train.labels import Labeller, bisect
from train.rollouts import TimeBudget, _balance, first_segment, labels_of, roll_out

QUICK = "recipes/quickstart.yaml"


@given(k=st.integers(1, 40), data=st.data())
def test_bisection_finds_the_first_invalid_prefix(k, data):
    first, asked = data.draw(st.integers(1, k)), []

    async def ask(cut):
        asked.append(cut)
        return cut < first

    assert run(bisect(k, ask)) == first
    assert len(asked) == len(set(asked)) <= math.ceil(math.log2(k)) if k > 1 else not asked


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", compile=False)


def rollouts(engine, labeller, every, prompts):
    steps = (roll_out(labeller, prompt, 4, "all" if every else "bisect") for prompt in prompts)
    finished = dict(run_together(steps, 40))
    return [finished[i] for i in range(len(prompts))]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("horizon", [25, "segment"])
def test_drafts_up_to_a_horizon_are_labelled_as_the_engine_meets_them(engine, every, horizon):
    """Each continues the one before where that is valid; its last prefix is labelled by asking, not by how it ends."""
    prompts = draw_prompts(TASKS["ledger"], "train", 6, seed=12)
    labeller = Labeller(engine, Checked(TASKS["ledger"]), 200)
    steps = (roll_out(labeller, prompt, 3, "all" if every else "bisect", horizon) for prompt in prompts)
    found = dict(run_together(steps, 10))
    for index, rows in found.items():
        assert len(rows) > 3
        assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
        for row, later in pairwise(rows):
            assert not row["ended"]
            assert horizon == "segment" or len(row["draft_ids"]) == horizon
            assert horizon != "segment" or len(row["ends"]) == 1
            if all(row["valid"]):
                assert later["prefix_ids"] == [*row["prefix_ids"], *row["draft_ids"]]
                assert later["round"] == row["round"]
            else:
                assert later["round"] == row["round"] + 1
        for row in rows[:4]:  # the labels are what the target makes of the prefixes
            context = engine.models["target"].open(engine.encode(prompts[index]))
            start = [*row["prefix_ids"], *row["draft_ids"]]
            right, _ = run(labeller.finish(context, prompts[index], start))
            context.close()
            assert right == row["valid"][-1] or row["ended"]


@pytest.mark.slow
def test_bisection_and_asking_about_every_prefix_agree(engine):
    """Validity is lost once; where the two differ, the target has mended an error by chance."""
    prompts = draw_prompts(TASKS["ledger"], "train", 30, seed=12)
    labeller = Labeller(engine, Checked(TASKS["ledger"]), 200)
    bisected, every = (rollouts(engine, labeller, every, prompts) for every in (False, True))
    firsts = [(a[0], b[0]) for a, b in zip(bisected, every, strict=True)]
    assert all(a["draft_ids"] == b["draft_ids"] and a["ends"] == b["ends"] for a, b in firsts)
    assert sum(a["valid"] == b["valid"] for a, b in firsts) >= 0.95 * len(firsts)
    wrong = [found for found in bisected if not all(found[0]["valid"])]
    assert len(wrong) > 3
    for first, *later in wrong:
        kept = first["draft_ids"][: [0, *first["ends"]][sum(first["valid"])]]
        assert later
        repair = first_segment(engine, first["continuation_ids"])
        assert later[0]["prefix_ids"] == [*kept, *repair]  # the draft goes on after the target's repair
        assert ledger.first_wrong(prompts[bisected.index([first, *later])], engine.tokenizer.decode(kept)) is None


@pytest.mark.slow
def test_several_ways_on_decide_together(engine):
    prompts = draw_prompts(TASKS["ledger"], "train", 6, seed=13)
    once = rollouts(engine, Labeller(engine, Checked(TASKS["ledger"]), 200), False, prompts)
    most = rollouts(engine, Labeller(engine, Checked(TASKS["ledger"]), 200, samples=3), False, prompts)
    labels = [[row["valid"] for row in found[:1]] for found in once], [[r["valid"] for r in f[:1]] for f in most]
    assert sum(a == b for a, b in zip(*labels, strict=True)) >= 5


@pytest.mark.slow
def test_a_target_compares_answers_where_there_is_no_checker(smollm):
    engine = Engine(*smollm, compile=False)
    agreement = Agreement(engine, 12, AskedTarget(engine))
    prompts = [f"Name a {thing}." for thing in ("colour", "river", "bird", "metal", "planet", "tree", "fruit", "city")]

    def together(many):
        finished = dict(run_together(many, 8))
        return [finished[i] for i in range(len(finished))]

    noise = controls(agreement, prompts, together)
    assert set(noise) == {"same_called_different", "different_called_same", "threshold"}
    assert all(0 <= value <= 1 for value in noise.values())
    assert noise["same_called_different"] + noise["different_called_same"] < 1  # better than a guess
    assert run(agreement.is_right(prompts[0], "Blue, blue and blue again")) in (True, False)
    assert run(agreement.is_right(prompts[0], agreement.references[prompts[0]]))  # its own words


class Counting(Labeller):
    """Counts the target's ways on."""

    finished = 0

    async def finish(self, *arguments):
        self.finished += 1
        return await super().finish(*arguments)


def test_the_tasks_program_labels_as_the_target_does_and_asks_it_for_ways_on_alone(engine):
    """The shipped target finishes every right prefix rightly, so both know the same drafts, repairs and labels."""
    prompts = draw_prompts(TASKS["ledger"], "train", 12, seed=12)
    asking = Labeller(engine, Checked(TASKS["ledger"]), 200)
    knowing = Counting(engine, Checked(TASKS["ledger"]), 200, ledger.first_wrong)
    found = []
    for labeller, labels in ((asking, "bisect"), (knowing, "checker")):
        steps = (roll_out(labeller, prompt, 3, labels) for prompt in prompts)
        finished = dict(run_together(steps, 10))
        found.append([finished[i] for i in range(len(prompts))])
    drop = lambda rows: [
        {key: row[key] for key in ("round", "prefix_ids", "draft_ids", "ends", "valid")} for row in rows
    ]
    assert [drop(rows) for rows in found[0]] == [drop(rows) for rows in found[1]]
    assert any(row["round"] for rows in found[1] for row in rows)
    assert not knowing.asked
    wrong = [row for rows in found[1] for row in rows if not all(row["valid"])]
    assert all(row["target_right"] for row in wrong)
    assert knowing.finished == len(wrong)


class Stern(Checked):
    """Calls every finished answer wrong, as if the target always erred."""

    async def is_right(self, prompt, answer):
        return False


def test_a_draft_costs_nothing_where_the_target_errs_too(engine):
    """The program's labels stay; that the target's way on ends up wrong as well is kept beside them."""
    prompts = draw_prompts(TASKS["ledger"], "train", 12, seed=12)
    labeller = Labeller(engine, Stern(TASKS["ledger"]), 200, ledger.first_wrong)
    rows = [row for prompt in prompts for row in run(roll_out(labeller, prompt, 3, "checker"))]
    assert len(rows) == len(prompts)  # nothing is drafted after a repair that leads nowhere
    assert not any(row["target_right"] for row in rows)
    assert any(any(row["valid"]) for row in rows)


def test_labels_come_from_the_program_only_where_it_knows_them(tmp_path):
    words = ["rollouts.labels=checker"]
    assert labels_of(load_recipe(QUICK), TASKS["ledger"], "train") == "checker"
    assert labels_of(load_recipe(QUICK), TASKS["ledger"], "test") == "bisect"
    assert labels_of(load_recipe(QUICK, words), TASKS["ledger"], "calibration") == "checker"
    assert labels_of(load_recipe(QUICK, ["rollouts.labels=all"]), TASKS["ledger"], "train") == "all"
    assert labels_of(load_recipe(QUICK, ["rollouts.labeller=agreement"]), TASKS["ledger"], "train") == "bisect"
    references = tmp_path / "rows.jsonl"
    references.write_text("".join(f'{{"prompt": "{i}?", "reference": "{i}"}}\n' for i in range(40)))
    rows = load_task(str(references), to_dict(Data()))
    assert labels_of(load_recipe(QUICK), rows, "train") == "bisect"
    with pytest.raises(RecipeError, match="has no program that knows the first wrong sentence"):
        labels_of(load_recipe(QUICK, words), rows, "train")


def test_the_program_saves_bisection_most_of_its_questions_and_changes_no_label(engine):
    """Nothing after a wrong sentence ends up right: so the target is asked in front of it, and most often once."""
    prompts = draw_prompts(TASKS["ledger"], "train", 12, seed=12)
    labellers = [Labeller(engine, Checked(TASKS["ledger"]), 200, program) for program in (None, ledger.first_wrong)]
    found = [rollouts(engine, labeller, False, prompts) for labeller in labellers]
    keys = ("round", "prefix_ids", "draft_ids", "valid", "continuation_ids")
    plain, knowing = ([[[row[key] for key in keys] for row in rows] for rows in some] for some in found)
    assert plain == knowing
    assert 0 < labellers[1].asked < 0.6 * labellers[0].asked


def test_a_prefix_is_asked_once_for_all_drafts_of_a_prompt(engine):
    (prompt,) = [p for p in draw_prompts(TASKS["ledger"], "train", 12, seed=12) if not whole(engine, p)][:1]
    labeller, asked = Labeller(engine, Checked(TASKS["ledger"]), 200), {}
    rows = [run(roll_out(labeller, prompt, 3, "bisect", asked=asked)) for _ in range(2)]
    count = labeller.asked
    assert rows[0] == rows[1]
    assert count == len(asked) > 0


def whole(engine, prompt):
    return all(run(roll_out(Labeller(engine, Checked(TASKS["ledger"]), 200), prompt, 1, "bisect"))[0]["valid"])


def test_drafts_that_the_engine_does_not_meet_are_labelled_without_the_target(engine):
    prompts = draw_prompts(TASKS["ledger"], "train", 6, seed=12)
    labeller = Labeller(engine, Checked(TASKS["ledger"]), 200, ledger.first_wrong)
    with disturbed(engine.draft, 0.4, seed=1):
        rows = [row for p in prompts for row in run(roll_out(labeller, p, 1, "checker", met=False))]
    assert len(rows) == 6
    assert not any(row["continuation_ids"] or row["met"] for row in rows)
    assert not all(all(row["valid"]) for row in rows)


@pytest.mark.parametrize("word", ["segments=12", "engine.horizon=25"])
def test_the_program_labels_no_drafts_that_are_cut_within_sentences(word):
    assert labels_of(load_recipe(QUICK, [word]), TASKS["ledger"], "train") == "bisect"
    with pytest.raises(RecipeError, match="or drafts are cut within sentences"):
        labels_of(load_recipe(QUICK, [word, "rollouts.labels=checker"]), TASKS["ledger"], "train")


def test_a_clock_starts_when_it_is_asked_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.rollouts.time.monotonic", lambda: now[0])
    budget, endless = TimeBudget(2), TimeBudget(None)
    now[0] = 1000.0
    assert not budget.is_over()
    assert not endless.is_over()
    now[0] += 119
    assert not budget.is_over()
    now[0] += 2
    assert budget.is_over()
    assert not endless.is_over()


def test_what_is_counted_is_what_the_engine_meets():
    row = {"number": 0, "split": "train", "round": 0, "met": True, "valid": [True, False]}
    rows = [row, {**row, "met": False, "valid": [False] * 9}, {**row, "round": 1, "valid": [True]}]
    rows += [{**row, "number": 1, "valid": [True]}, {**row, "number": 2, "split": "test", "valid": [True]}]
    assert _balance(rows) == {
        "prompts": {"train": 2, "test": 1},
        "drafts": 4,
        "drafts_made": 1,
        "drafts_made_wrong": 1,
        "drafts_right": 2 / 3,
        "prefixes": 5,
        "valid_prefixes": 4,
    }
