"""One answer in the making, and the plain data that it is made of.

`Answer` holds both contexts and what is accepted so far, and knows the steps of a round: draft, verify,
draft ahead, commit, proceed, finish. `Engine` puts them in order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral, Real
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parse.local.runner import Reader, Stop
from parse.local.sequence import Context
from parse.local.speculation import speculating
from parse.sampling import Sampling, Written
from parse.segments import cut, ends_segment
from parse.text import certain_text, text_of

if TYPE_CHECKING:
    from parse.engine import Engine

METHODS = ("parse", "target", "draft")
POLICIES = ("first_fail", "longest", "whole")
HANDBACKS = ("segment", "never")


@dataclass(frozen=True)
class Segment:
    """A piece of an answer: who wrote it, how confident the target was, and whether it was kept."""

    text: str  # with a cut inside a character, that is the later piece's; those kept join to the answer
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
    """How to answer: the arguments of `Engine.generate`.

    Raises:
        ValueError: for a value that is not allowed; the message says what is.
    """

    max_new_tokens: int = 512
    threshold: float | None = None
    policy: str = "first_fail"
    handback: str = "segment"
    horizon: int | str | None = None
    lookahead: int = 0
    method: str = "parse"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("policy", POLICIES), ("handback", HANDBACKS), ("method", METHODS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: use one of {', '.join(allowed)}")
        whole_number("max_new_tokens", self.max_new_tokens, least=1)
        if self.threshold is not None:
            finite_number("threshold", self.threshold)
        if self.horizon not in (None, "segment"):
            whole_number("horizon", self.horizon, least=1, other='None, "segment" or ')
        whole_number("lookahead", self.lookahead, least=0)
        finite_number("temperature", self.temperature, least=0)
        whole_number("top_k", self.top_k, least=0)
        if not 0 < finite_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p={self.top_p} is no share of the probability: use a number above 0, up to 1")
        if self.seed is not None:
            whole_number("seed", self.seed, least=0, most=2**63 - 1, other="None or ")


def whole_number(name: str, value: Any, least: int, most: int | None = None, other: str = "") -> int:
    """The value, where it is a whole number in a range.

    Raises:
        ValueError: naming the setting, what was given, and what is allowed (`other` and a whole number).
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        end = "on" if most is None else f"to {most}"
        raise ValueError(f"{name}={value!r}: use {other}a whole number from {least} {end}")
    return number


def finite_number(name: str, value: Any, least: float | None = None) -> float:
    """The value, where it is a number, at or above the least one; else ValueError."""
    number = math.nan
    with contextlib.suppress(OverflowError):  # of an integer beyond any float
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or (least is not None and number < least):
        raise ValueError(f"{name}={value!r:.100}: use a number{'' if least is None else f' from {least} on'}")
    return number


@dataclass(frozen=True)
class Verdict:
    """One verified draft: its cuts and the target's confidence in each."""

    ends: list[int]  # K
    confidences: Tensor  # float32 [K]; on a GPU they may still be on their way
    logits: Tensor  # [K + 1, V]: the target's, behind the text before the draft and behind each end


def accept(confidences: Sequence[float], threshold: float, policy: str = "first_fail") -> int:
    """How many of K cuts to accept: the index behind the last accepted one, 0..K.

    "first_fail" stops before the first cut below the threshold; "longest" takes the last cut at or above it, whatever
    came before; "whole" takes all or none, by the last one.
    """
    passed = [confidence >= threshold for confidence in confidences]
    if policy == "whole":
        return len(passed) if passed and passed[-1] else 0
    if policy == "first_fail":
        return passed.index(False) if False in passed else len(passed)
    return max((k + 1 for k, ok in enumerate(passed) if ok), default=0)


def drafted_up_to(horizon: int | str | None, room: int, engine: Engine) -> tuple[int, Stop | None]:
    """The limits of a draft: its largest number of tokens, and a function of those written that stops it earlier."""
    if horizon == "segment":
        return room, lambda written: ends_segment(written, engine.draft_tokenizer, engine.segments)
    return (room if horizon is None else min(room, int(horizon))), None


class Answer:
    """One answer in the making: both contexts, what is accepted, and the time it took."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        draft_prompt_ids: list[int],
        settings: Settings,
        budget: int,
        readers: dict[str, Reader],
    ) -> None:
        self.engine, self.settings, self.budget, self._readers = engine, settings, budget, readers
        self.threshold = settings.threshold or 0.0
        self.sample = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
        self.prompt_ids, self.draft_prompt_ids = prompt_ids, draft_prompt_ids
        self.ids: list[int] = []  # the accepted answer, the target's tokens
        self.segments: list[Segment] = []
        self.stats = Stats()
        self.done = False
        self.ended = False
        self._ahead: tuple[Written, Tensor] | None = None  # the next draft, and the sampler's state before it
        self._started = self._mark = perf_counter()
        self.contexts: dict[str, Context] = {}  # from `begin` to `close`

    @property
    def target(self) -> Context:
        """The text as the target has read it."""
        return self.contexts["target"]

    async def begin(self) -> None:
        """Take room in the caches, and let the target read the prompt.

        With the first draft, where nothing is won by reading it before.
        """
        self._started = self._mark = perf_counter()
        for role, reader in self._readers.items():
            self.contexts[role] = Context(reader)
        if "target" in self.contexts:
            judged = self.settings.method == "parse"
            self.target.layers = self.engine.context_layers if judged else ()
            with_draft = judged and not self.engine.apart
            read = self.target.awaiting if with_draft else self.target.reading
            await read(self.prompt_ids)
            self._clock("target")

    async def draft(self) -> Written:
        """Let the draft write on from the accepted answer; its tokens come back as the target's."""
        written = self._ahead[0] if self._ahead else await self._drafting(self.ids)
        self._ahead = None
        ids = self.engine.to_target(written.ids)
        cropped = ids[: self.budget - len(self.ids)]
        self.stats.rounds += 1
        self.stats.draft_tokens += len(cropped)
        self._clock("draft")
        return Written(cropped, written.ended and len(cropped) == len(ids))

    async def verify(self, draft: Written) -> Verdict:
        """Cut the draft and judge every prefix in one packed pass; nobody waits for its verdicts yet."""
        engine = self.engine
        if not draft.ids:
            return Verdict([], torch.empty(0), torch.empty(0))
        ends = cut(draft.ids, engine.tokenizer, engine.segments)
        self._clock("other")
        evidence, logits = await engine.examining(self.target, draft.ids, ends, draft.ended)
        confidences = engine.need_verifier().confidences(evidence)
        self.stats.verify_passes += 1
        if self.settings.policy == "whole":  # cut as it was for the calibration, and judged by the last cut
            return Verdict(ends[-1:], confidences[-1:], logits[[0, -1]])
        return Verdict(ends, confidences, logits)

    async def draft_ahead(self, draft: Written) -> None:
        """Write the draft of the next round as if this one were kept whole, while the target still judges it.

        Where that does not come true nothing is left of it, neither tokens nor draws of the sampler. What is accepted
        is known only when this draft is written, so a slow draft delays it, by the horizon at most.
        """
        ids = [*self.ids, *draft.ids]
        if draft.ids and not draft.ended and len(ids) < self.budget:
            self._clock("verify")
            before = self.sample.state
            self._ahead = (await self._drafting(ids)), before
            self._clock("draft")

    async def _drafting(self, ids: list[int]) -> Written:
        """What the draft writes behind an answer of these tokens, up to the horizon, in its own tokens."""
        room, stop = drafted_up_to(self.settings.horizon, self.budget - len(ids), self.engine)
        text = [*self.draft_prompt_ids, *self.engine.to_draft(ids)]
        return await self.contexts["draft"].continuing(text, room, self.sample, stop)

    def commit(self, draft: Written, verdict: Verdict, k: int) -> None:
        """Keep the first k segments of the draft, in the answer and in the target's cache."""
        self._clock("verify")
        confidences = verdict.confidences.tolist()
        end = verdict.ends[k - 1] if k else 0
        kept = len(self.prompt_ids) + len(self.ids) + end
        if draft.ids:
            self.target.rollback(kept, verdict.logits[k])
        texts = [certain_text([*self.ids, *draft.ids[:stop]], self.engine.tokenizer) for stop in (0, *verdict.ends)]
        for index, (before, text) in enumerate(pairwise(texts)):
            self.segments.append(Segment(text[len(before) :], "draft", confidences[index], index < k))
        self.ids += draft.ids[:end]
        self.stats.accepted_tokens += end
        if end:
            self._first_token()
        all_kept = k == len(verdict.ends) and (k > 0 or self.threshold <= 0)
        if self._ahead and not (k and all_kept):
            self.sample.state, self._ahead = self._ahead[1], None
        self.ended = all_kept and draft.ended
        self.done = self.ended or len(self.ids) >= self.budget
        self._clock("other")

    async def proceed(self) -> None:
        """Let the target write on: to the next cut or, with handback "never", to the end."""
        engine, settings = self.engine, self.settings
        to_the_end = settings.handback == "never" or settings.policy == "whole"
        stop = lambda ids: ends_segment(ids, engine.tokenizer, engine.segments)
        await self._write("target", None if to_the_end else stop)
        self.done = self.ended or to_the_end or len(self.ids) >= self.budget

    async def write_alone(self, role: str) -> None:
        """Let one model write the whole answer."""
        if role == "draft":
            await self.contexts["draft"].reading(self.draft_prompt_ids)
        await self._write(role)
        self.done = True

    def finish(self) -> Generation:
        """The finished answer."""
        text = text_of(self.ids, self.engine.tokenizer)
        if rest := text[len(certain_text(self.ids, self.engine.tokenizer)) :]:  # its other bytes never came
            last = max(i for i, segment in enumerate(self.segments) if segment.accepted)
            self.segments[last] = replace(self.segments[last], text=self.segments[last].text + rest)
        self._clock("other")
        reason = "stop" if self.ended else "length"
        return Generation(text, self.ids, reason, self.segments, self.stats)

    def close(self) -> None:
        """Make room for other texts, finished or not."""
        for context in self.contexts.values():
            context.close()

    async def _write(self, role: str, stop: Stop | None = None) -> None:
        """Add to the answer what a model writes, token by token."""
        before = list(self.ids)
        same = role == "target" or self.engine.same_tokens
        room, lookahead = self.budget - len(before), self.settings.lookahead

        def grown(written: list[int]) -> None:
            self._first_token()
            if same:
                self.ids = before + written

        if role == "target" and lookahead:
            contexts = self.contexts["target"], self.contexts["draft"]
            written = await speculating(*contexts, room, self.sample, lookahead, stop, grown)
        else:
            written = await self.contexts[role].writing(room, self.sample, stop, grown)
        own, self.ended = written.ids, written.ended
        added = own if same else self.engine.to_target(own)
        if len(added) > room:  # the same text in more tokens
            added, self.ended = added[:room], False
        self.ids = before + added
        if added:
            texts = [certain_text(ids, self.engine.tokenizer) for ids in (before, self.ids)]
            self.segments.append(Segment(texts[1][len(texts[0]) :], role, None, True))
        if role == "target":
            self.stats.target_tokens += len(added)
        else:
            self.stats.draft_tokens += len(added)
            self.stats.accepted_tokens += len(added)
        self._clock(role)

    def _first_token(self) -> None:
        """The user can see something from now on."""
        if not self.stats.first_token_seconds:
            self.stats.first_token_seconds = perf_counter() - self._started

    def _clock(self, phase: str) -> None:
        """Charge the time since the last call to a phase."""
        now = perf_counter()
        self.stats.seconds[phase] += now - self._mark
        self._mark = now
