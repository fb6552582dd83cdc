"""The server's figures for Prometheus, and its alarm where answers drift from calibration's."""

import itertools
import json
from types import SimpleNamespace

import httpx
import pytest

from parse import Generation, Segment
from parse.generation import Stats
from parse.server.metrics import Expectation, Expected, Metrics, expected_of
from tests.http_server import CHAT, PROMPT, TEXT


def test_figures_for_prometheus(running):
    answers = [running.client.chat.completions.create(**CHAT | {"max_tokens": 40}) for _ in range(2)]
    running.post("/v1/chat/completions", CHAT | {"model": "other"})
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    counts = answers[0].metrics["speculative_decoding"]
    label = '{model_name="tiny"}'
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert float(figures[f"vllm:spec_decode_{name}_total{label}"]) == 2 * counts[name]
    assert float(figures[f"vllm:generation_tokens_total{label}"]) == 2 * answers[0].usage.completion_tokens
    assert float(figures[f"vllm:num_requests_running{label}"]) == 0
    assert float(figures[f"vllm:e2e_request_latency_seconds_count{label}"]) == 2
    assert float(figures['parse:requests_failed_total{model_name="tiny",status="404"}']) == 1
    share = counts["num_accepted_tokens"] / counts["num_draft_tokens"]
    assert float(figures[f"parse:calibration_drift{label}"]) == pytest.approx(share - 0.5)
    stated = [one["confidence"] for one in answers[0].choices[0].parse["segments"] if one["source"] == "draft"]
    assert float(figures[f"parse:confidence_drift{label}"]) == pytest.approx(sum(stated) / len(stated) - 0.5)
    assert float(figures[f"parse:calibration_alarm{label}"]) == 0  # of two answers
    running.post("/v1/chat/completions", CHAT | {"parse": {"threshold": 0.0}})  # says nothing of the calibration
    assert (
        f"parse:calibration_drift{label} {figures[f'parse:calibration_drift{label}']}"
        in httpx.get(f"{running.url}/metrics").text.splitlines()
    )


@pytest.mark.parametrize(
    ("accepted", "confidences", "alarm"),
    [
        ([5, 7] * 25, [0.6, 0.8] * 25, 0),  # as expected
        ([3, 5] * 25, [0.6, 0.8] * 25, 1),  # less is accepted
        ([5, 7] * 25, [0.8, 1.0] * 25, 1),  # too sure of what it judges
        ([3, 5] * 24, [0.6, 0.8] * 24, 0),  # too few to say
        ([4, 6] * 25, [0.6, 0.8] * 25, 0),  # less is accepted, as chance may have it
    ],
)
def test_a_drift_beyond_chance_alarms(accepted, confidences, alarm):
    """Expected are 6 of 10 tokens and a confidence of 0.7, and 4 standard errors of fifty answers are 0.16."""
    error = 0.04 / 2**0.5  # as many drafts as answers
    metrics = Metrics("tiny", Expected(Expectation(0.6, error, 50), Expectation(0.7, error, 50)))
    for tokens, confidence in zip(accepted, confidences, strict=True):
        stats = Stats(draft_tokens=10, accepted_tokens=tokens, verify_passes=1)
        segments = [Segment("fig", "draft", confidence, True)]
        metrics.finished(Generation("fig", [1], "stop", segments, stats), 1.0, as_calibrated=True)
    value = lambda name: metrics.registry.get_sample_value(name, {"model_name": "tiny"})
    mean = sum(accepted) / len(accepted) / 10
    assert value("parse:calibration_drift") == pytest.approx(mean - 0.6)
    assert value("parse:confidence_drift") == pytest.approx(sum(confidences) / len(confidences) - 0.7)
    assert value("parse:calibration_alarm") == alarm


def test_what_calibration_expected_of_a_verifier(tmp_path):
    """The chosen kind by its own report, another one by the same report, a rule by its threshold."""
    folders = {"probe": tmp_path, **{kind: tmp_path / "others" / kind for kind in ("folded", "likelihood")}}
    for kind, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "verifier.json").write_text(json.dumps({"kind": kind, "threshold": 0.25}))
    assert expected_of(tmp_path) is None
    more = {"accepted_error": 0.02, "mean_confidence": 0.75, "confidence_error": 0.01}
    kinds = {
        "probe": {"accepted_fraction": 0.5, "threshold": 0.25, **more},
        "folded": {"accepted_fraction": 0.4, "threshold": 0.25},
        "likelihood mean segment": {"accepted_fraction": 0.3, "threshold": 0.125},
        "likelihood mean prefix": {"accepted_fraction": 0.2, "threshold": 0.25},
    }
    (tmp_path / "report.json").write_text(json.dumps({"chosen": "probe", "kinds": kinds, "n_prompts": 9}))
    assert expected_of(tmp_path) == Expected(Expectation(0.5, 0.02, 9), Expectation(0.75, 0.01, 9))
    assert expected_of(folders["folded"]).accepted.mean == 0.4
    assert expected_of(folders["folded"]).confidence is None
    assert expected_of(folders["likelihood"]).accepted.mean == 0.2
    assert expected_of(None) is None


def test_an_answer_that_is_cut_short_says_nothing_of_the_calibration(running):
    """By its limit, or by a stop string: as 16 tokens of a completion are, where nothing is said."""
    running.client.chat.completions.create(**CHAT)
    running.client.chat.completions.create(**CHAT, stop=["zzz"])
    running.post("/v1/completions", {"model": "tiny", "prompt": PROMPT})
    assert len(running.serving.metrics._kept) == 0
    running.client.chat.completions.create(**CHAT | {"max_tokens": 40})
    assert len(running.serving.metrics._kept) == 1


def test_each_choice_counts_with_its_own_time(running, monkeypatch):
    """Not with that of the slowest of its request: by a clock of the worker's that goes on by 100 s at each look."""
    monkeypatch.setattr("parse.server.worker.time", SimpleNamespace(perf_counter=itertools.count(0, 100).__next__))
    times, finished = [], running.serving.metrics.finished
    running.serving.metrics.finished = lambda answer, seconds, *rest: (
        times.append(seconds) or finished(answer, seconds, *rest)
    )
    body = TEXT | {"prompt": [PROMPT, PROMPT + " the"], "max_tokens": 40, "parse": {"method": "target"}, "stop": "7"}
    assert running.post("/v1/completions", body).status_code == 200
    assert abs(times[1] - times[0]) == pytest.approx(100)


def test_a_report_that_says_no_spread_alarms_nobody():
    assert not Expectation(0.5, prompts=400).alarms(0.9, answers=100)
    assert Expectation(0.5, 0.01, prompts=400).alarms(0.9, answers=100)
