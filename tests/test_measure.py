"""Metrics, and the report that shows them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eval.measure import (
    bootstrap,
    detectable_loss,
    difference_interval,
    judgements_of,
    paired,
    speedup,
    summarize,
    wilson,
)
from eval.methods import Outcome, compare, loads_of
from eval.report import console_table
from eval.tasks import TASKS, draw_prompts
from parse import Engine, Generation, Segment, Stats
from recipes.schema import Recipe
from recipes.strict import build
from tests.conftest import BASE, MODELS

PROMPT = "list : #1 fig rome 4 ; #2 tea oslo 7 ."
FIG = "#1 the fig from rome costs us 4 coins , which makes 4 coins so far ."
TEA = "#2 the tea from oslo costs us 7 coins , which makes 11 coins so far ."
BAD = "#2 the tea from oslo costs us 8 coins , which makes 12 coins so far ."
END = "that is 11 coins ."


def outcome(segments, seconds=1.0, right=True, drafted=10, accepted=5, written=5):
    stats = Stats(draft_tokens=drafted, accepted_tokens=accepted, target_tokens=written, rounds=1, verify_passes=2)
    stats.seconds.update(draft=0.2, verify=0.1, target=0.6, other=0.1)
    stats.first_token_seconds = 0.3
    text = " ".join(s.text.strip() for s in segments if s.accepted)
    return Outcome(PROMPT, Generation(text, [1] * 10, "stop", segments, stats), right, seconds)


def test_wilson_and_bootstrap():
    low, high = wilson(98, 100)
    assert low == pytest.approx(0.930, abs=1e-3)
    assert high == pytest.approx(0.9945, abs=1e-3)
    target, method = [2.0 + i % 3 for i in range(60)], [1.0 + i % 3 for i in range(60)]
    low, high = bootstrap([target, method], speedup)
    assert speedup(np.array(target), np.array(method)) == pytest.approx(1.5)
    assert low < 1.5 < high
    assert bootstrap([target, method], speedup) == (low, high)
    assert bootstrap([[3.0], [1.5]], speedup) == (2.0, 2.0)  # of a single measurement


def test_the_paired_difference():
    figures = paired([True] * 90 + [False] * 10, [True] * 80 + [False] * 10 + [True] * 4 + [False] * 6)
    assert figures["accuracy_difference"] == pytest.approx(-0.06)
    low, high = figures["accuracy_difference_ci95"]
    assert low < -0.06 < high
    assert figures["mcnemar_p"] == pytest.approx(0.1796, abs=1e-3)
    assert paired([True], [True])["mcnemar_p"] == 1


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 150), (10, 4, 100), (3, 0, 40), (0, 9, 60), (1, 0, 2)])
def test_the_interval_of_the_difference_ends_where_the_score_test_does(lost, won, n):
    """At either end what was seen is 1.96 standard errors away, by the likeliest share of prompts lost there."""
    low, high = difference_interval(lost, won, n)
    assert low <= (won - lost) / n <= high
    for end in (low, high):
        shares = np.linspace(max(0.0, -end), 1, 200001)[1:-1]  # of prompts lost; won are `end` more
        same = 1 - end - 2 * shares
        usable = (same > 0) & (shares + end > 0)
        shares, same = shares[usable], same[usable]
        likelihood = lost * np.log(shares) + won * np.log(shares + end) + (n - lost - won) * np.log(same)
        share = shares[np.argmax(likelihood)]
        error = np.sqrt((2 * share + end - end**2) / n)
        assert abs((won - lost) / n - end) / error == pytest.approx(1.96, abs=0.02)


def test_the_interval_turns_round_with_the_methods():
    for lost, won, n in [(0, 0, 9), (5, 0, 6), (0, 5, 6), (6, 0, 6), (0, 1, 1), (30, 11, 60)]:
        low, high = difference_interval(lost, won, n)
        assert difference_interval(won, lost, n) == pytest.approx((-high, -low))
        assert -1 <= low < high <= 1


def test_with_no_difference_the_interval_is_wilsons():
    """z² / (n + z²): 150 prompts of which none differs cannot show that less than a point is lost, 400 can."""
    assert difference_interval(0, 0, 150) == pytest.approx((-0.02497, 0.02497), abs=1e-5)
    same, longer = [True] * 150, [True] * 400
    assert paired(same, same)["non_inferiority"] == "open"
    assert paired(longer, longer)["non_inferiority"] == "shown"
    assert paired([True] * 100, [True] * 80 + [False] * 20)["non_inferiority"] == "refuted"
    assert paired([True] * 100, [True] * 99 + [False], max_accuracy_loss=0.1)["non_inferiority"] == "shown"


def test_the_smallest_loss_that_could_have_been_told_from_none():
    """By the score at 0, (lost - won) / sqrt(lost + won): 4 / 2 is more than 1.96, 3 / 1.7 is less; 10 - 2 of 12."""
    assert detectable_loss(0, 150) == 4 / 150
    assert detectable_loss(2, 100) == 7 / 100  # 9 lost: 7 / 3.3; 8 lost: 6 / 3.2 = 1.9
    assert detectable_loss(0, 3) is None


def test_verdicts_count_to_each_drafts_first_wrong_cut():
    segments = [
        Segment(FIG, "draft", 0.9, True),
        Segment(" " + BAD, "draft", 0.2, False),
        Segment(" " + END, "draft", 0.1, False),
        Segment(" " + TEA, "target", None, True),
        Segment(" " + END, "draft", 0.8, True),
    ]
    found = list(judgements_of(outcome(segments), TASKS["ledger"]))
    assert [one[:3] for one in found] == [(0.9, True, True), (0.2, False, False), (0.8, True, True)]
    length = len(FIG) + len(TEA) + len(END) + 2
    places = [len(FIG) / length, (len(FIG) + len(BAD) + 1) / length, 1]
    assert [one.place for one in found] == pytest.approx(places)


def test_verdicts_after_wrong_text_are_left_out():
    """What was wrong before a draft began is no fault of its verdicts, and no cut after it can be right."""
    accepted, repaired = [Segment(BAD, "draft", 0.9, True)], [Segment(BAD, "target", None, True)]
    drafted = [Segment(" " + END, "draft", 0.8, True)]
    repair = [Segment(" " + TEA, "target", None, True)]
    assert [one[:3] for one in judgements_of(outcome(accepted + repair + drafted), TASKS["ledger"])] == [
        (0.9, True, False)
    ]
    assert list(judgements_of(outcome(repaired + drafted), TASKS["ledger"])) == []


def test_a_rejected_drafts_cost_is_that_of_its_own_request():
    """Seconds of several at once are a block's; the latencies say what this one took."""
    target = [outcome([Segment(FIG, "target", None, True)], 0.25, True, 0, 0, 10)] * 2
    target[0].generation.stats.seconds["target"] += 3  # of both, which are one: 4 s
    mine = [outcome([Segment(FIG, "draft", 0.4, False)], 0.25, accepted=0), outcome([], 0.25)]  # 1 s each
    assert summarize("parse", mine, target, TASKS["ledger"])["wholly_rejected_slowdown"] == pytest.approx(0.25)


def test_failed_requests_count_as_wrong_and_not_as_fast():
    """Two of four failed, one of them with the target: of the seconds those count where neither did."""
    target = [outcome([Segment(FIG, "target", None, True)], 2.0, True, 0, 0, 10)] * 4
    failed = replace(
        outcome([], 0.001, right=False), generation=Generation("", [], "length", [], Stats()), error="ValueError: full"
    )
    mine = [failed, outcome([Segment(FIG, "draft", 0.9, True)]), failed, outcome([Segment(FIG, "draft", 0.9, True)])]
    row = summarize("parse", mine, [*target[:3], failed], TASKS["ledger"])
    assert row["failures"] == [{"prompt": i, "error": "ValueError: full"} for i in (0, 2)]
    assert row["accuracy"] == 0.5
    assert (row["speedup"], row["seconds_per_request"], row["latency_seconds_p50"]) == (2, 1, pytest.approx(1))
    nothing = summarize("parse", [failed] * 4, target, TASKS["ledger"])
    assert (nothing["speedup"], nothing["speedup_ci95"], nothing["seconds_per_request"]) == (0, (0, 0), None)
    assert "-" in console_table([nothing])
    json.dumps(nothing)


def test_a_request_that_fails_ends_nothing():
    """The others of its block are answered, and it is asked once more, alone; so with a checker that raises."""
    engine = Engine.from_pretrained(MODELS / "ledger-target", compile=False)
    prompts = draw_prompts(TASKS["ledger"], "test", 4, seed=3)
    generate, sizes = engine.generate, []

    def failing(some, **options):
        sizes.append(len(some))
        if prompts[1] in some:
            raise OSError("gone")
        return generate(some, **options)

    engine.generate = failing
    methods = {"target": {"method": "target", "max_new_tokens": 200}}
    found = compare(engine, TASKS["ledger"], prompts, methods, 4, at_once=4)["target"]
    assert sizes == [4, 1, 1, 1, 1] * 2  # while warming up, too
    assert [one.error for one in found] == [None, "OSError: gone", None, None]
    assert [one.right for one in found] == [True, False, True, True]
    engine.generate = generate
    task = SimpleNamespace(checks=True, stop=(), check=lambda prompt, answer: 1 / (prompt != prompts[2]))
    found = compare(engine, task, prompts, methods, 0)["target"]
    assert [one.error for one in found] == [None, None, "not checked, ZeroDivisionError: division by zero", None]


def test_a_summary_has_the_public_keys_and_its_definitions():
    target = [outcome([Segment(f"{FIG} {TEA} {END}", "target", None, True)], 2.0, True, 0, 0, 10)] * 4
    mine = [
        outcome([Segment(FIG, "draft", 0.9, True), Segment(" " + TEA, "target", None, True)]),
        outcome([Segment(FIG, "draft", 0.4, False)], right=False, accepted=0),
        outcome([Segment(BAD, "draft", 0.9, True)], right=False),
        outcome([Segment(FIG, "draft", 0.9, True)], written=0),
    ]
    target[0].generation.stats.seconds["target"] += 1  # of all four, which are one
    proposed = mine[0].generation.stats
    proposed.lookahead_tokens, proposed.lookahead_accepted_tokens, proposed.lookahead_passes = 8, 6, 2
    row = summarize("parse", mine, target, TASKS["ledger"])
    public = "name accuracy accuracy_ci95 speedup speedup_ci95 seconds_per_request tokens_per_second n".split()
    public += "first_token_seconds full_accept_rate accepted_fraction false_accept_rate".split()
    public += "false_reject_rate model_time_fraction".split()
    assert set(public) <= set(row)
    assert row["accuracy"] == 0.5
    assert row["speedup"] == 2
    assert row["tokens_per_second"] == 10
    assert row["full_accept_rate"] == 0.25
    assert row["accepted_fraction"] == 15 / 40
    assert row["false_accept_rate"] == 1
    assert row["false_reject_rate"] == pytest.approx(1 / 3)
    assert row["model_time_fraction"] == pytest.approx(0.9)
    assert row["first_token_seconds"] == row["first_token_seconds_p99"] == pytest.approx(0.3)
    assert row["token_seconds_p50"] == pytest.approx((1.0 - 0.3) / 9)
    assert row["requests_per_second"] == 1
    assert row["accepted_per_verification"] == 15 / 8
    assert row["lookahead_accepted_fraction"] == 6 / 8
    assert row["lookahead_accepted_per_pass"] == 3
    assert row["wholly_rejected_rate"] == 0.25
    assert row["wholly_rejected_slowdown"] == 0.5  # it was fast, and wrong
    assert row["false_accept_places"] == [0] * 9 + [1]
    assert row["failures"] == []
    assert row["non_inferiority"] == "open"
    json.dumps(row)
    table = console_table([row])
    assert "parse" in table
    assert "2.00x" in table
    assert "37.5%" in table
    assert "75.0%" in table


def test_several_requests_at_once_give_the_same_answers_in_blocks():
    """Of each method on every prompt, by whichever engine runs it; seconds are those of a block over its prompts."""
    engine, other = (
        Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", compile=False) for _ in "ab"
    )
    prompts = draw_prompts(TASKS["ledger"], "test", 12, seed=3)
    methods = {"target": {"method": "target", "max_new_tokens": 20}, "draft": {"method": "draft", "max_new_tokens": 20}}
    alone = compare(engine, TASKS["ledger"], prompts, methods, 0)
    calls = []
    generate = other.generate
    other.generate = lambda some, **options: (
        calls.append((len(some), options["batch_size"])) or generate(some, **options)
    )
    together = compare(engine, TASKS["ledger"], prompts, methods, 2, at_once=2, others={"draft": other})
    for name, some in alone.items():
        assert [one.prompt for one in together[name]] == prompts
        assert [one.generation.token_ids for one in together[name]] == [one.generation.token_ids for one in some]
    assert calls == [(2, 2), (2, 2), (2, 2), (3, 2), (2, 2), (3, 2)]  # warm-up, and five blocks
    assert len({one.seconds for one in together["draft"]}) == 5


@pytest.mark.parametrize(
    ("section", "gpu", "loads"),
    [
        ({}, False, [1, 8]),
        ({}, True, [1, 8, 32]),
        ({"prompts": 15}, True, [1]),
        ({"concurrency": [4, 2]}, False, [4, 2]),
    ],
)
def test_the_loads_that_are_measured(section, gpu, loads, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert loads_of(build(Recipe, BASE | {"eval": section})) == loads


def test_requests_that_were_timed_together_count_as_one_measurement():
    """Else ten equal numbers would make an interval of no width out of two turns."""
    target, mine = (
        [replace(outcome([Segment(FIG, "draft", 0.9, True)], s[n // 5]), turn=n // 5) for n in range(10)]
        for s in ((2.0, 2.0), (1.0, 2.0))
    )
    low, high = summarize("parse", mine, target, TASKS["ledger"])["speedup_ci95"]
    assert (low, high) == (1.0, 2.0)  # of one turn or the other
