"""The benchmark: its figures are there, and its scripted drafts are accepted as the script says."""

import json
import math
import re
from threading import Event
from time import perf_counter
from unittest.mock import patch

import httpx
import pytest
import torch

from eval.bench import __main__ as command
from eval.bench import engine as bench
from eval.bench import fakes, server
from eval.bench.engine import PROMPT
from eval.bench.fakes import Scripted, ScriptedEngine, agreeing, endless, stopwatch, two_devices
from eval.tasks import TASKS, draw_prompts
from parse import Engine
from parse.verifiers import Likelihood
from tests.conftest import answer_to


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_one_json_line(capsys, monkeypatch):
    monkeypatch.setattr(bench, "COMPILE", False)
    monkeypatch.setattr(bench, "SHAPES", ((32, 4),))
    assert command.main(["engine", "--models", "embedded", "--repeats", "1", "--batches", "1", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(printed[-1])["rows"]
    passes = [row for row in rows if "verify_over_prefill" in row]
    assert {(row["N"], row["K"], row["S"], row["batch"]) for row in passes} == {
        (32, 4, s, b) for s in (1, 4) for b in (1, 2)
    }
    assert all(math.isfinite(row[key]) and row[key] > 0 for row in passes for key in bench.PASS_RATIOS)
    loops = {(row["role"], row["batch"]): row["decode_over_generate"] for row in rows if "role" in row}
    assert set(loops) == {(role, batch) for role in ("target", "draft") for batch in (1, 2)}
    assert min(loops.values()) > 0
    whole = [row for row in rows if "profile" in row]
    assert [row["batch"] for row in whole] == [1, 2]
    for row in whole:
        assert 0 < row["model_time_fraction"] <= 1 <= row["wall_over_ideal"] * 1.5
        assert sum(row["profile"].values()) == pytest.approx(1, abs=0.05)
    assert any("wall time over the ideal" in line for line in printed)
    horizons = [row for row in rows if "seconds_over_whole" in row]
    assert [row["horizon"] for row in horizons] == list(bench.HORIZONS)
    assert all(row["first_token_over_whole"] > 0 and row["seconds_over_whole"] > 0 for row in horizons)


def test_a_script_decides_what_is_accepted(target, draft, tokenizer):
    """Answers of 32 tokens in cuts of 4, the draft wrong at 9 and 20: two repairs of 4 tokens, the rest is kept."""
    engine = ScriptedEngine(target, tokenizer, draft, tokenizer, Scripted((9, 20), [7, 8]), segments=4)
    with endless(engine):
        results = engine.generate([PROMPT] * 2, 32)
    for result in results:
        runs = [(s.source, s.accepted) for s in result.segments]
        refused, kept, repair = ("draft", False), ("draft", True), ("target", True)
        assert runs == [kept] * 2 + [refused] * 6 + [repair] + [kept] * 2 + [refused] * 3 + [repair] + [kept] * 2
        assert result.stats.rounds == 3
        assert len(result.token_ids) == 32


def test_a_script_shifts_what_is_wrong_from_text_to_text_and_knows_a_horizon(target, draft, tokenizer):
    """Cuts of 4 and drafts of 8; wrong at 8, and in the text whose first token is odd 1 later: the same segment."""
    engine = ScriptedEngine(target, tokenizer, draft, tokenizer, Scripted((7,), [7, 8], shift=1), segments=4)
    with endless(engine):
        for first, refused in ((30, 4), (31, 8)):  # the seventh token, or the eighth
            settings = engine.settings(max_new_tokens=16, horizon=8)
            result = answer_to(engine, [first, 5, 6], settings)
            assert 4 * [segment.accepted for segment in result.segments].index(False) == refused


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_proposals_are_taken_by_a_script(target, draft, tokenizer, share):
    engine = ScriptedEngine(target, tokenizer, draft, tokenizer, Scripted((), [7]), segments=4)
    with endless(engine), agreeing(share), stopwatch(engine) as watch:
        ids = engine.generate(PROMPT, 40, method="target", lookahead=4)[0].token_ids
    assert len(ids) == 40
    passes = len(watch.passes["target", True]) + len(watch.passes["target", False])
    assert passes == pytest.approx({0.0: 40, 0.5: 20, 1.0: 9}[share], abs=3)  # with the prompt's


def test_on_two_devices_the_draft_writes_while_the_target_judges(target, draft, tokenizer):
    """The target's first packed pass does not begin to compute before the draft has written after it."""
    script = Scripted((9,), [7, 8])
    engine = ScriptedEngine(target, tokenizer, draft, tokenizer, script, segments=4, compile=False)
    engine.pair.apart = True
    ahead, verifying, threads = Event(), Event(), torch.get_num_threads()
    plain = engine.generate(PROMPT, 32, threshold=0.0, horizon=8)[0].token_ids
    read, write = engine.models["target"].runner.forward, engine.models["draft"].runner.forward

    def reading(passes, alone=None):
        if passes[0].layout:
            verifying.set()
            assert ahead.wait(20), "the draft waits for the verdict"
        return read(passes, alone)

    def writing(passes, alone=None):
        if verifying.is_set():
            ahead.set()
        return write(passes, alone)

    with (
        patch.object(engine.models["target"].runner, "forward", reading),
        patch.object(engine.models["draft"].runner, "forward", writing),
        two_devices(),
    ):
        assert engine.generate(PROMPT, 32, threshold=0.0, horizon=8)[0].token_ids == plain
    assert torch.get_num_threads() == threads


def test_drafting_ahead_is_measured_by_horizon(target, draft, tokenizer, monkeypatch):
    monkeypatch.setattr(bench, "ANSWER", 32)
    monkeypatch.setattr(bench, "HORIZONS", (8,))
    script = Scripted((9,), [7, 8])
    rows = list(
        bench.ahead_ratios(ScriptedEngine(target, tokenizer, draft, tokenizer, script, 4, compile=False), repeats=1)
    )
    assert [(row["horizon"], row["kept"]) for row in rows] == [(8, "whole"), (8, "in part")]
    assert all(math.isfinite(row["waiting_over_ahead"]) for row in rows)


def test_a_stopwatch_counts_no_second_twice(target, draft, tokenizer):
    engine = ScriptedEngine(target, tokenizer, draft, tokenizer, Scripted((37,), [7]), segments=16, compile=False)
    with endless(engine), stopwatch(engine) as watch:
        started = perf_counter()
        stats = engine.generate(PROMPT, 128)[0].stats
        wall = perf_counter() - started
    assert 0 < sum(watch.seconds.values()) <= wall
    assert {"models", "sampling", "numbers and masks", "packing and cutting", "evidence and verdicts"} == set(
        watch.seconds
    )
    assert len(watch.passes["draft", False]) == stats.draft_tokens - stats.rounds  # the last one need not be read
    assert len(watch.passes["target", False]) == stats.target_tokens - 1  # the first comes from the packed pass
    assert len(watch.passes["target", True]) == stats.verify_passes
    assert sum(map(sum, watch.passes.values())) == pytest.approx(watch.seconds["models"])


def test_ratios_are_taken_within_a_turn(monkeypatch):
    """What drifts between turns is in both parts of each; the first turn warms up."""
    seconds = [9, 1, 1, 2, 40, 20, 300, 100]  # one, other; one, other; ...
    clock = iter([reading for took in seconds for reading in (0, took)])
    monkeypatch.setattr(fakes, "perf_counter", lambda: next(clock))
    ratio = fakes.take_turns({"one": lambda: None, "other": lambda: None}, repeats=3)
    assert ratio("one", "other") == 2
    assert ratio("other", "one") == 1 / 2


def test_the_servers_benchmark_counts_what_its_clients_were_answered(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(threshold=0.0), segments=4, compile=False)
    prompts = draw_prompts(TASKS["ledger"], "test", 5, seed=1)
    with server._serving(engine, 2) as url:
        assert server._by_clients(url, prompts, 2) > 0
        finished = re.findall(r"vllm:request_success_total{.*} (\S+)", httpx.get(f"{url}/metrics").text)
        assert sum(map(float, finished)) == 5
        with pytest.raises(RuntimeError, match="400 Bad Request"):
            server._by_clients(url, [*prompts, 7], 2)
    rows = [{"clients": 2, "requests": 5, "engine": 10.0, "server": 9.0, "ratio": 0.9, "ratios": [0.8, 0.9, 0.95]}]
    assert server.table(rows).rows == [["2", "5", "10.0/s", "9.0/s", "90% (80% to 95%)"]]
