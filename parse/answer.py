"""One answer in the making, and the plain data that it is made of.

`Answer` holds both contexts and what is accepted so far, and knows the five steps of a round: draft,
verify, commit, proceed, finish. `Engine` puts them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parse.decode import Sampler, Written
from parse.models import text_of
from parse.segments import cut, ends_segment

if TYPE_CHECKING:
    from parse.engine import Engine

METHODS = ("parse", "target", "draft")
POLICIES = ("first_fail", "longest", "whole")
HANDBACKS = ("segment", "never")


@dataclass(frozen=True)
class Segment:
    """A piece of an answer: who wrote it, how confident the target was, and whether it was kept."""

    text: str
    source: str  # "draft" or "target"
    confidence: float | None
    accepted: bool


@dataclass
class Stats:
    """What one answer took. Seconds are wall time; tokens are the target's, without end-of-sequence."""

    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_tokens: int = 0
    rounds: int = 0
    verify_passes: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"draft": 0.0, "verify": 0.0, "target": 0.0, "other": 0.0}
    )
    first_token_seconds: float = 0.0


@dataclass(frozen=True)
class Generation:
    """An answer: its text and tokens (end-of-sequence left out), and how it came about."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    segments: list[Segment]
    stats: Stats


@dataclass(frozen=True)
class Settings:
    """How to answer; the arguments of `Engine.generate`, checked."""

    max_new_tokens: int
    threshold: float
    policy: str
    handback: str
    horizon: int | str | None
    method: str
    sample: Sampler


@dataclass(frozen=True)
class Verdict:
    """One verified draft: its cuts and the target's confidence in each."""

    ends: list[int]  # K
    confidences: list[float]  # K
    logits: Tensor  # [K, V]: the target's, behind each end


def accept(confidences: Sequence[float], threshold: float, policy: str = "first_fail") -> int:
    """How many of K cuts to accept: the index behind the last accepted one, 0..K.

    "first_fail" stops before the first cut below the threshold; "longest" and "whole" take the last
    cut at or above it, whatever came before ("whole" is given a single cut).
    """
    passed = [confidence >= threshold for confidence in confidences]
    if policy == "first_fail":
        return passed.index(False) if False in passed else len(passed)
    return max((k + 1 for k, ok in enumerate(passed) if ok), default=0)


class Answer:
    """One answer in the making: both contexts, what is accepted, and the time it took."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        draft_prompt_ids: list[int],
        settings: Settings,
        budget: int,
    ) -> None:
        self.engine, self.settings, self.budget = engine, settings, budget
        self.prompt_ids, self.draft_prompt_ids = prompt_ids, draft_prompt_ids
        self.ids: list[int] = []  # the accepted answer, the target's tokens
        self.segments: list[Segment] = []
        self.stats = Stats()
        self.done = False
        self.ended = False
        self._started = self._mark = perf_counter()
        if settings.method != "draft":
            self.target = engine.context("target")
            self.target.read(prompt_ids)
        if settings.method != "target":
            self.draft_context = engine.context("draft")
        self._clock("target")

    def draft(self) -> Written:
        """Let the draft write on from the accepted answer; its tokens come back as the target's."""
        engine, settings = self.engine, self.settings
        room = self.budget - len(self.ids)
        stop = None
        if settings.horizon == "segment":
            stop = lambda ids: ends_segment(ids, engine.draft_tokenizer, engine.segments)
        elif isinstance(settings.horizon, int):
            room = min(room, settings.horizon)
        self.draft_context.become([*self.draft_prompt_ids, *engine.to_draft(self.ids)])
        written = self.draft_context.write(room, settings.sample, stop)
        ids = engine.to_target(written.ids)
        cropped = ids[: self.budget - len(self.ids)]
        self.stats.rounds += 1
        self.stats.draft_tokens += len(cropped)
        self._clock("draft")
        return Written(cropped, written.ended and len(cropped) == len(ids))

    def verify(self, draft: Written) -> Verdict:
        """Cut the draft and judge every prefix in one packed pass."""
        engine = self.engine
        if not draft.ids:
            return Verdict([], [], torch.empty(0))
        whole = self.settings.policy == "whole"
        ends = [len(draft.ids)] if whole else cut(draft.ids, engine.tokenizer, engine.segments)
        self._clock("other")
        self._logits_before = self.target.next_logits
        evidence, logits = engine.examine(self.target, draft.ids, ends, draft.ended)
        confidences = engine.need_verifier().confidences(evidence).tolist()
        self.stats.verify_passes += 1
        self._clock("verify")
        return Verdict(ends, confidences, logits)

    def commit(self, draft: Written, verdict: Verdict, k: int) -> None:
        """Keep the first k segments of the draft, in the answer and in the target's cache."""
        end = verdict.ends[k - 1] if k else 0
        kept = len(self.prompt_ids) + len(self.ids) + end
        if k:
            self.target.rollback(kept, verdict.logits[k - 1])
        elif draft.ids:
            self.target.rollback(kept, self._logits_before)
        for index, (start, stop) in enumerate(pairwise([0, *verdict.ends])):
            text = self._text(draft.ids, start, stop)
            self.segments.append(Segment(text, "draft", verdict.confidences[index], index < k))
        self.ids += draft.ids[:end]
        self.stats.accepted_tokens += end
        if end:
            self._first_token()
        all_kept = k == len(verdict.ends) and (k > 0 or self.settings.threshold <= 0)
        self.ended = all_kept and draft.ended
        self.done = self.ended or len(self.ids) >= self.budget
        self._clock("other")

    def proceed(self) -> None:
        """Let the target write on: to the next cut or, with handback "never", to the end."""
        engine, settings = self.engine, self.settings
        to_the_end = settings.handback == "never" or settings.policy == "whole"
        stop = lambda ids: ends_segment(ids, engine.tokenizer, engine.segments)
        room = self.budget - len(self.ids)
        self._keep(self.target.write(room, self._sample, None if to_the_end else stop), "target")
        self.done = self.ended or to_the_end or len(self.ids) >= self.budget
        self._clock("target")

    def write_alone(self, role: str) -> None:
        """Let one model write the whole answer."""
        context = self.target if role == "target" else self.draft_context
        if role == "draft":
            context.read(self.draft_prompt_ids)
        self._keep(context.write(self.budget, self._sample), role)
        self._clock(role)

    def finish(self) -> Generation:
        """The finished answer."""
        text = text_of(self.ids, self.engine.tokenizer)
        self._clock("other")
        reason = "stop" if self.ended else "length"
        return Generation(text, self.ids, reason, self.segments, self.stats)

    def _keep(self, written: Written, role: str) -> None:
        ids = written.ids if role == "target" else self.engine.to_target(written.ids)
        if ids:
            self.segments.append(Segment(self._text(ids, 0, len(ids)), role, None, True))
        self.ids += ids
        self.ended = written.ended
        if role == "target":
            self.stats.target_tokens += len(ids)
        else:
            self.stats.draft_tokens += len(ids)
            self.stats.accepted_tokens += len(ids)

    def _text(self, ids: list[int], start: int, stop: int) -> str:
        """The text that ids[start:stop] adds to the answer so far."""
        tokenizer = self.engine.tokenizer
        before = text_of([*self.ids, *ids[:start]], tokenizer)
        return text_of([*self.ids, *ids[:stop]], tokenizer)[len(before) :]

    def _sample(self, logits: Tensor) -> int:
        """The next token of the answer itself, as it will stand."""
        token = self.settings.sample(logits)
        self._first_token()
        return token

    def _first_token(self) -> None:
        """The user can see something from now on."""
        if not self.stats.first_token_seconds:
            self.stats.first_token_seconds = perf_counter() - self._started

    def _clock(self, phase: str) -> None:
        """Charge the time since the last call to a phase."""
        now = perf_counter()
        self.stats.seconds[phase] += now - self._mark
        self._mark = now
