"""What /metrics tells: in vLLM's names where it has them, and in PARSE's own.

A threshold keeps its promise for drafts like those that it was calibrated on. So the share of drafted tokens that is
accepted, and the mean confidence, are compared with what the verifier's report measured: `parse:calibration_drift` and
`parse:confidence_drift` are the differences, over the last answers. Large ones say that prompts or draft are others,
and that the threshold should be calibrated for them: `parse:calibration_alarm` is 1 where one of them is beyond chance.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from parse.generation import Generation

RECENT = 200  # answers
FEW = 50  # with fewer answers than these there is no alarm
ERRORS, LEAST = 4, 0.05  # a drift alarms beyond so many standard errors, and beyond this share
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = tuple(i / 10 for i in range(1, 11))


class Expectation(NamedTuple):
    """What calibration's test measured of a mean over the drafts of its prompts."""

    mean: float
    error: float = math.nan  # its standard error; not a number where the report does not say
    prompts: int = 0

    def alarms(self, mean: float, answers: int) -> bool:
        """Whether the mean over so many answers is elsewhere, by more than chance.

        The spread is that of calibration's prompts, as a few answers that are alike say nothing of it.
        """
        if answers < FEW or math.isnan(self.error):
            return False
        error = self.error * math.sqrt(1 + self.prompts / answers)  # of the difference
        return abs(mean - self.mean) > max(ERRORS * error, LEAST)


class Expected(NamedTuple):
    """What calibration's test measured."""

    accepted: Expectation  # of all drafted tokens
    confidence: Expectation | None = None  # of the judged cuts; None in a report that does not say


class Metrics:
    """The figures of one server."""

    def __init__(self, model: str, expected: Expected | None) -> None:
        """Set up.

        Args:
            model: its name, a label of every figure.
            expected: None where it is not known.
        """
        self.registry, self._expected = CollectorRegistry(), expected
        self._kept: deque[tuple[float, float]] = deque(maxlen=RECENT)  # drafted and accepted tokens of an answer
        self._stated: deque[tuple[float, float]] = deque(maxlen=RECENT)  # its judged cuts, and their confidences' sum

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, what, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, ["model_name"], registry=self.registry).labels(model)

        self.running = gauge("vllm:num_requests_running", "Answers that are being written")
        self.waiting = gauge("vllm:num_requests_waiting", "Answers that wait for room")
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts").labels(model)
        self._generated = counter("vllm:generation_tokens", "Tokens of answers").labels(model)
        self._drafts = counter("vllm:spec_decode_num_drafts", "Drafts that were judged").labels(model)
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens of drafts").labels(model)
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Those of them that were kept").labels(model)
        self._finished = counter("vllm:request_success", "Finished answers", "finished_reason")
        self._failed = counter("parse:requests_failed", "Requests without an answer", "status")
        self._first = histogram("vllm:time_to_first_token_seconds", "Until something can be seen", SECONDS)
        self._latency = histogram("vllm:e2e_request_latency_seconds", "Until an answer is finished", SECONDS)
        self._rounds = counter("parse:rounds", "Rounds of answers").labels(model)
        self._verdicts = counter("parse:verdicts", "Judged segments", "accepted")
        self._confidence = histogram("parse:confidence", "The verifier's confidence in judged segments", SHARES)
        self._fraction = histogram("parse:accepted_fraction", "The share of an answer's draft that was kept", SHARES)
        names = ["model_name"]  # given with the first value: until then there is no figure
        less = "of recent drafts less that of calibration"
        self._drift = Gauge("parse:calibration_drift", f"Accepted share {less}", names, registry=self.registry)
        self._confidence_drift = Gauge(
            "parse:confidence_drift", f"Mean confidence {less}", names, registry=self.registry
        )
        alarm = f"1 where a drift exceeds {ERRORS} standard errors and {LEAST}, over {FEW} answers or more"
        self._alarm = Gauge("parse:calibration_alarm", alarm, names, registry=self.registry)
        self._model = model

    def prompt(self, tokens: int) -> None:
        """A prompt was read."""
        self._prompt.inc(tokens)

    def failed(self, status: int) -> None:
        """A request was refused, cancelled or broke."""
        self._failed.labels(self._model, str(status)).inc()

    def finished(self, answer: Generation, seconds: float, as_calibrated: bool) -> None:
        """An answer is finished, so many seconds after it was asked for.

        Args:
            as_calibrated: by the settings that the verifier was calibrated with: others say nothing of a drift.
        """
        stats, judged = answer.stats, [one for one in answer.segments if one.confidence is not None]
        self._finished.labels(self._model, answer.finish_reason).inc()
        self._generated.inc(len(answer.token_ids))
        self._latency.observe(seconds)
        waited = max(seconds - sum(stats.seconds.values()), 0.0)
        self._first.observe(min(waited + stats.first_token_seconds, seconds) if stats.first_token_seconds else seconds)
        if not stats.verify_passes:
            return
        self._drafts.inc(stats.verify_passes)
        self._drafted.inc(stats.draft_tokens)
        self._accepted.inc(stats.accepted_tokens)
        self._rounds.inc(stats.rounds)
        for segment in judged:
            self._verdicts.labels(self._model, str(segment.accepted).lower()).inc()
            self._confidence.observe(segment.confidence or 0.0)
        if stats.draft_tokens:
            self._fraction.observe(stats.accepted_tokens / stats.draft_tokens)
            if as_calibrated:
                self._kept.append((stats.draft_tokens, stats.accepted_tokens))
                if judged:
                    self._stated.append((len(judged), sum(one.confidence or 0.0 for one in judged)))
        self._compare()

    def _compare(self) -> None:
        """Recent answers against calibration."""
        if self._expected is None:
            return
        alarms = []
        pairs = ((self._drift, self._kept), (self._confidence_drift, self._stated))
        for (gauge, recent), expected in zip(pairs, self._expected, strict=True):
            if expected is not None and recent:
                wholes, parts = map(sum, zip(*recent, strict=True))
                gauge.labels(self._model).set(parts / wholes - expected.mean)
                alarms.append(expected.alarms(parts / wholes, len(recent)))
        if alarms:
            self._alarm.labels(self._model).set(any(alarms))


def expected_of(verifier: str | Path | None) -> Expected | None:
    """What a verifier's report measured on its test prompts; None where there is none that says so.

    A kind that was not chosen stands in `others/` of the folder whose report measured it.
    """
    folder = Path(verifier or "")
    try:
        saved = json.loads((folder / "verifier.json").read_text(encoding="utf-8"))
        chosen = (folder / "report.json").is_file()
        report = (folder if chosen else folder.parent.parent) / "report.json"
        content = json.loads(report.read_text(encoding="utf-8"))
        kinds = content["kinds"]
        # of one kind there may be several rules, each with a threshold of its own
        names = [name for name in kinds if name.split()[0] == saved["kind"] and _same(kinds[name], saved)]
        figures, prompts = kinds[content["chosen"] if chosen else names[0]], int(content["n_prompts"])
        accepted = Expectation(figures["accepted_fraction"], figures.get("accepted_error", math.nan), prompts)
        if "mean_confidence" not in figures:
            return Expected(accepted)
        return Expected(accepted, Expectation(figures["mean_confidence"], figures["confidence_error"], prompts))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _same(figures: dict[str, float], saved: dict[str, float]) -> bool:
    return math.isclose(figures["threshold"], saved["threshold"], rel_tol=1e-6)
