"""The prediction: closed forms, a simulation of the algorithm, and what the command says."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.__main__ import main as evaluate
from eval.costs import Costs, interpolate, parameters, published
from eval.plan import (
    Observed,
    Phases,
    Way,
    Workload,
    as_it_went,
    explained,
    observed,
    parse,
    rounds_of,
    speedup,
    target_alone,
)
from parse import Segment
from recipes.schema import RecipeError, load_recipe
from tests.conftest import QUICK
from tests.test_measure import BAD, FIG, PROMPT, TEA, outcome

TARGET = Costs({1: 1.0, 8: 2.0}, {1: 1.0, 1001: 11.0})  # a pass: 1 s, and 1 s more for each hundred tokens
DRAFT = Costs({1: 0.1, 8: 0.2}, {1: 0.1, 1001: 1.1})
WORK = Workload(prompt=100, answer=200, segment=20)


def read(tokens):
    return 1 + (tokens - 1) / 100


def test_a_draft_that_is_always_right_costs_itself_and_one_pass():
    found = parse(replace(WORK, right=1.0), TARGET, DRAFT)
    assert found.target == 0
    assert found.draft == pytest.approx(read(100) / 10 + 200 * 0.1)
    assert found.verify == pytest.approx(read(100 + 200))
    assert target_alone(WORK, TARGET).total == pytest.approx(read(100) + 200)


def test_a_draft_that_is_never_right_is_paid_for_again_after_each_repair():
    found = parse(replace(WORK, right=0.0), TARGET, DRAFT)
    assert found.target == pytest.approx(200)
    assert found.draft == pytest.approx(read(100) / 10 + 9 * read(20) / 10 + sum(range(1, 11)) * 20 * 0.1)
    assert found.verify == pytest.approx(read(300) + sum(read(20 * left) for left in range(1, 10)))


def test_a_horizon_wastes_less_and_verifies_more_often():
    found = parse(replace(WORK, right=0.0), TARGET, DRAFT, horizon=1)
    assert found.draft == pytest.approx(read(100) / 10 + 9 * read(20) / 10 + 10 * 20 * 0.1)
    assert found.verify == pytest.approx(read(120) + 9 * read(20))
    assert parse(replace(WORK, right=1.0), TARGET, DRAFT, horizon=1).verify == found.verify


def test_with_no_handback_the_target_writes_to_the_end():
    found = parse(replace(WORK, right=0.0, handback="never"), TARGET, DRAFT)
    assert found.target == pytest.approx(200)
    assert found.draft == pytest.approx(read(100) / 10 + 200 * 0.1)  # it is asked once
    assert found.verify == pytest.approx(read(300))


def test_with_a_lookahead_the_targets_own_words_cost_what_was_measured():
    ahead = replace(TARGET, repairs={1: 0.25, 8: 0.5})
    assert parse(replace(WORK, right=0.0), ahead, DRAFT).target == pytest.approx(200 * 0.25)
    assert target_alone(WORK, ahead) == target_alone(WORK, TARGET)  # which has no draft
    assert ahead.repair(8) == 0.5 / 8


def test_a_run_says_what_its_draft_and_its_verifier_were_like(tmp_path):
    recipe = load_recipe(QUICK, [f"runs={tmp_path}", "engine.horizon=20"])
    assert observed(recipe, str.split) is None
    kept, cut = Segment(FIG, "draft", 0.9, True), Segment(BAD, "draft", 0.1, False)
    repair = Segment(TEA, "target", None, True)
    rows = {"target": [outcome([repair])], "parse": [outcome([kept, cut, repair, kept], drafted=30, written=5)]}
    verifier, folder = tmp_path / "verifier", recipe.folder / "eval"
    for path in (verifier, folder):
        path.mkdir(parents=True)
    (verifier / "verifier.json").write_text(json.dumps({"suffix_ids": [1, 2, 3]}))
    lines = [json.dumps({"method": name, **one.record}) + "\n" for name, some in rows.items() for one in some]
    (folder / "transcripts.jsonl").write_text("".join(lines))
    for named, suffix in ((str(verifier), 3), (None, 0)):
        (folder / "summary.json").write_text(json.dumps({"at_once": 2, "verifier": named}))
        run = observed(recipe, str.split)
        prompt = len(PROMPT.split())
        expected = Workload(prompt=prompt, answer=10, segment=10, right=2 / 3, suffix=suffix, handback="segment")
        assert run.work == expected
        assert (run.horizon, run.requests, run.speedup) == (2, 2, pytest.approx(1.0))
        assert run.ways == [Way(expected, [2, 1], 5)]


def simulated(work, horizon, rng):
    """One answer, segment by segment: its seconds, and what a transcript holds of it."""
    left, first, spent, segments = round(work.answer / work.segment), True, Phases(), []
    while left:
        written = min(left, horizon or left)
        tokens = written * work.segment
        draft = DRAFT.read(work.prompt if first else work.segment) + tokens * DRAFT.step(1)
        spent = spent.plus(Phases(draft=draft, verify=TARGET.read((work.prompt if first else 0) + tokens)))
        first, accepted = False, 0
        while accepted < written and rng.random() < work.right:
            accepted += 1
        segments += [{"source": "draft", "accepted": i < accepted} for i in range(written)]
        left -= accepted
        if accepted < written:
            left -= 1
            spent = spent.plus(Phases(target=work.segment * TARGET.step(1)))
            segments.append({"source": "target", "accepted": True})
    return spent, segments


@given(st.floats(0, 1), st.sampled_from([1, 2, 4, None]), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_expectation_is_the_mean_of_many_answers(right, horizon, segments):
    work, rng = replace(WORK, right=right, answer=20 * segments), random.Random(0)
    mean = sum(simulated(work, horizon, rng)[0].total for _ in range(3000)) / 3000
    assert parse(work, TARGET, DRAFT, horizon).total == pytest.approx(mean, rel=0.05)


@given(st.floats(0, 1), st.sampled_from([1, 2, 4, None]), st.integers(1, 12), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_rounds_of_answers_cost_what_these_took(right, horizon, segments, rng):
    work = replace(WORK, right=right, answer=20 * segments)
    answers = [simulated(work, horizon, rng) for _ in range(3)]
    repaired = lambda pieces: 20 * sum(piece["source"] == "target" for piece in pieces)
    ways = [Way(work, rounds_of(pieces, horizon), repaired(pieces)) for _, pieces in answers]
    found = as_it_went(ways, TARGET, DRAFT)
    for name in ("draft", "verify", "target"):
        assert getattr(found, name) == pytest.approx(sum(getattr(spent, name) for spent, _ in answers) / 3)


def test_a_draft_that_errs_at_the_end_alone_is_told_from_one_that_errs_evenly():
    """Nine of ten segments are accepted either way; what errs last costs no further round."""
    work = replace(WORK, right=0.9)
    ways, seconds = [Way(work, [10], 20)], Phases(0.1 * read(100) + 20, read(300), 20, 0)
    run = Observed(work, ways, None, 1, seconds, alone=read(100) + 200)
    table = {row[0]: row[1:] for row in explained(run, {"target": TARGET, "draft": DRAFT}).rows}
    assert [row[3] for row in table.values()] == ["+0.0000"] * 6 + ["+0.0%"]
    assert float(table["verifying"][0]) > float(table["verifying"][1])
    assert table["speed-up"][1] == table["speed-up"][2] == f"{(read(100) + 200) / seconds.total:.2f}x"


def test_where_the_draft_wrote_nothing_the_prompt_was_read():
    found = as_it_went([Way(WORK, [], 200)], TARGET, DRAFT)
    assert found == Phases(DRAFT.read(100), TARGET.read(100), 200 * 1.0)


def test_several_requests_share_a_pass():
    assert TARGET.step(8) == 2.0 / 8
    assert TARGET.read(100, 8) == pytest.approx(read(800) / 8)
    assert target_alone(WORK, TARGET, 8).total == pytest.approx(read(800) / 8 + 200 * 0.25)


def test_sizes_between_and_beyond_those_that_were_measured():
    assert interpolate({1: 1.0, 3: 2.0}, 2) == 1.5
    assert interpolate({1: 1.0, 4: 2.0}, 8) == 4.0
    assert interpolate({1: 1.0, 4: 2.0}, 0.5) == 1.0


def test_a_data_sheet_tells_what_memory_and_arithmetic_allow():
    costs = published("h100", 8e9)
    assert costs.step(1) == pytest.approx(16e9 / 3.35e12)
    assert costs.read(2**16) == pytest.approx(2 * 8e9 * 2**16 / 989e12)
    assert 2 < speedup(Workload(right=0.98), costs, published("h100", 0.6e9)) < 16e9 / 1.2e9


def test_the_number_of_parameters():
    assert [parameters(text) for text in ("8B", "0.6b", "600M", "1000")] == [8e9, 0.6e9, 6e8, 1000]
    with pytest.raises(RecipeError, match="'large' is no number of parameters: give one such as 8B"):
        parameters("large")


def test_the_command_says_what_is_predicted_and_what_to_take(capsys):
    assert evaluate("plan --hardware h100 --target 8B --draft 0.6B --right 0.97 --answer 300".split()) == 0
    printed = capsys.readouterr().out
    assert "predicted from the data sheet of h100, not measured" in printed
    assert "answers of 300, segments of 25, 97.0% of them accepted" in printed
    assert "whole answer" in printed
    assert "It pays from " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "name a recipe, or give --hardware"),
        ("--hardware h100 --target 8B", "--hardware goes with --target and --draft"),
        ("--hardware h100 --target 8B --draft 1B --right 3", "--right is 3: give a share from 0 to 1"),
        ("--hardware h100 --target 8B --draft 1B --answer -3", "--answer is -3: give a number of tokens"),
        ("--hardware h100 --target 8B --draft 1B --segment 0", "--segment is 0: give a number of tokens"),
    ],
)
def test_what_is_wrong_with_the_question_is_said(words, message, capsys):
    assert evaluate(["plan", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_draft_that_is_as_slow_as_its_target_does_not_pay(capsys):
    assert evaluate("plan --hardware l4 --target 1B --draft 1B".split()) == 0
    assert "It does not pay with this draft" in capsys.readouterr().out
