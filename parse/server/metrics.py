"""What /metrics tells: in vLLM's names where it has them, and in PARSE's own.

A threshold keeps its promise for drafts like those that it was calibrated on. So the share of drafted tokens that is
accepted is compared with what the verifier's report measured: `parse:calibration_drift` is the difference, over the
last answers. A large one says that prompts or draft are others, and that the threshold should be calibrated for them.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from parse.generation import Generation

RECENT = 200  # answers
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """The figures of one server."""

    def __init__(self, model: str, expected: float | None) -> None:
        """Set up.

        Args:
            model: its name, a label of every figure.
            expected: the share of drafted tokens that was accepted in calibration's test; None where it is not known.
        """
        self.registry, self._expected = CollectorRegistry(), expected
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)  # drafted, accepted

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
        drift = "Accepted share of recent drafts less that of calibration"  # not there until it is known
        self._drift = Gauge("parse:calibration_drift", drift, ["model_name"], registry=self.registry)
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
                self._recent.append((stats.draft_tokens, stats.accepted_tokens))
        if self._expected is not None and self._recent:
            drafted, accepted = map(sum, zip(*self._recent, strict=True))
            self._drift.labels(self._model).set(accepted / drafted - self._expected)


def expected_fraction(verifier: str | Path | None) -> float | None:
    """The share of drafted tokens that a verifier accepted of its test prompts; None where no report says so."""
    report = Path(verifier or "") / "report.json"
    if verifier is None or not report.is_file():
        return None
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        return float(content["kinds"][content["chosen"]]["accepted_fraction"])
    except (ValueError, KeyError, TypeError):
        return None
