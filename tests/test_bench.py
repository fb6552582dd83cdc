"""The benchmark: its figures are there, and its scripted drafts are accepted as the script says."""

import json
import math
from time import perf_counter

import pytest
import torch

from eval import bench
from parse import Engine
from parse.answer import Answer


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_one_json_line(capsys, monkeypatch):
    monkeypatch.setattr(bench, "COMPILE", False)
    monkeypatch.setattr(bench, "SHAPES", ((32, 4),))
    assert bench.main(["engine", "--models", "embedded", "--repeats", "1", "--batches", "1", "2"]) == 0
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
    assert any("wall time over ideal" in line for line in printed)
    horizons = [row for row in rows if "seconds_over_whole" in row]
    assert [row["horizon"] for row in horizons] == list(bench.HORIZONS)
    assert all(row["first_token_over_whole"] > 0 and row["seconds_over_whole"] > 0 for row in horizons)


def test_a_script_decides_what_is_accepted(target, draft, tokenizer, monkeypatch):
    """Answers of 32 tokens in cuts of 4, the draft wrong at 9 and 20: two repairs of 4 tokens, the rest is kept."""
    monkeypatch.setattr(bench, "ANSWER", 32)
    engine = Engine(target, tokenizer, draft, tokenizer, bench.Scripted((9, 20), [7, 8]), segments=4)
    with bench.endless(engine):
        results = engine.generate([bench.PROMPT] * 2, 32)
    for result in results:
        runs = [(s.source, s.accepted) for s in result.segments]
        refused, kept, repair = ("draft", False), ("draft", True), ("target", True)
        assert runs == [kept] * 2 + [refused] * 6 + [repair] + [kept] * 2 + [refused] * 3 + [repair] + [kept] * 2
        assert result.stats.rounds == 3
        assert len(result.token_ids) == 32


def test_drafting_ahead_is_measured_where_both_models_compute_at_once(target, draft, tokenizer, monkeypatch):
    monkeypatch.setattr(bench, "ANSWER", 32)
    monkeypatch.setattr(bench, "HORIZONS", (8,))
    engine = Engine(target, tokenizer, draft, tokenizer, bench.Scripted((9,), [7, 8]), segments=4, compile=False)
    threads, verify = torch.get_num_threads(), Answer.verify
    rows = bench.ahead_ratios(engine, repeats=1)
    assert [(row["horizon"], row["kept"]) for row in rows] == [(8, "whole"), (8, "in part")]
    assert all(row["waiting_over_ahead"] > 0 for row in rows)
    assert (torch.get_num_threads(), Answer.verify) == (threads, verify)


def test_a_stopwatch_counts_no_second_twice(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, bench.Scripted((37,), [7]), segments=16, compile=False)
    with bench.endless(engine), bench.stopwatch(engine) as watch:
        started = perf_counter()
        stats = engine.generate(bench.PROMPT, bench.ANSWER)[0].stats
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
    monkeypatch.setattr(bench, "perf_counter", lambda: next(clock))
    ratio = bench.take_turns({"one": lambda: None, "other": lambda: None}, repeats=3)
    assert ratio("one", "other") == 2
    assert ratio("other", "one") == 1 / 2
