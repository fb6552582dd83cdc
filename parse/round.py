"""One answer, in rounds: draft, cut, verify, accept, continue.

A draft model writes up to `horizon` tokens, the target judges every prefix in one packed pass, the longest accepted
prefix is kept, and the target writes on from there. With a threshold above 1 the output is the target's own greedy
answer, with threshold 0 it is the draft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parse.generation import Generation, Segment, Settings, Stats, accept
from parse.model import Model, ModelSequence, Proposer, Stop
from parse.sampling import Sampling, Written
from parse.segments import Segmenter, cut, ends_segment
from parse.text import (
    before_stop,
    certain_text,
    encode_continuation,
    find_stop,
    says,
    text_after,
    text_of,
    through_stop,
    undecided,
)
from parse.verifiers import Verifier


class NoRoom(ValueError):
    """A prompt that leaves no room for an answer in a model's context."""


@dataclass
class Pair:
    """The models that answer together, and how drafts are cut and judged."""

    target: Model
    draft: Model | None
    verifier: Verifier | None
    segments: Segmenter
    apart: bool = False  # the models do not wait for each other, as on two devices: the next draft is written meanwhile

    def __post_init__(self) -> None:
        self.same_tokens = self.draft is None or self.draft.tokenizer.get_vocab() == self.target.tokenizer.get_vocab()
        self.check_verifier(self.verifier)

    def check_verifier(self, verifier: Verifier | None) -> None:
        """Refuse a verifier that needs what the target cannot give.

        Raises:
            ValueError: naming both.
        """
        missing = sorted(verifier.needs.parts - self.target.provides) if verifier else []
        if verifier and missing:
            given = ", ".join(sorted(self.target.provides)) or "nothing"
            raise ValueError(
                f"the verifier {verifier.kind!r} needs {', '.join(missing)}, and this target gives {given}: use "
                "another kind of verifier, such as `folded`, or a target on this machine"
            )

    def room(self, prompt: int, draft_prompt: int, settings: Settings) -> int:
        """New tokens that fit: the request's own limit, or what the contexts leave of which the answer needs all.

        Args:
            prompt, draft_prompt: tokens of the prompt, the target's and the draft's.

        Raises:
            NoRoom: where there is room for none.
        """
        verdict = 0
        if self.verifier and settings.method == "parse":
            verdict = len(self.verifier.needs.suffix_ids) + self.target.verdict_tokens
        needed = [("target", self.target, prompt, verdict)]
        if settings.method == "draft":  # else the target goes on where the draft's context ends
            assert self.draft is not None
            needed.append(("draft", self.draft, draft_prompt, 0))
        room = settings.max_new_tokens
        for role, model, tokens, more in needed:
            if model.context_length is not None:
                room = min(room, model.context_length - tokens - more)
            if room < 1:
                asking = f", a verdict takes {more}," if more else ""
                raise NoRoom(
                    f"the prompt has {tokens} tokens{asking} and the context of the {role} holds "
                    f"{model.context_length}, which leaves no room for an answer: shorten the prompt"
                )
        return room

    @property
    def draft_tokenizer(self) -> Any:
        """The draft's, or the target's where there is none."""
        return self.draft.tokenizer if self.draft else self.target.tokenizer

    def to_target(self, draft_ids: Sequence[int]) -> list[int]:
        """The draft's tokens as the target's; as text where the vocabularies differ."""
        if self.same_tokens or self.draft is None:
            return list(draft_ids)
        return encode_continuation(text_after(draft_ids, self.draft.tokenizer), self.target.tokenizer)

    def to_draft(self, target_ids: Sequence[int]) -> list[int]:
        """The target's tokens as the draft's; as text where the vocabularies differ.

        With the same words, those of the target's padding that the draft has no embedding for are left out.
        """
        if self.draft is None:
            return list(target_ids)
        if self.same_tokens:
            return [token for token in target_ids if token < self.draft.vocabulary]
        return encode_continuation(text_after(target_ids, self.target.tokenizer), self.draft.tokenizer)

    async def write_draft(
        self,
        draft: ModelSequence,
        ids: Sequence[int],
        room: int,
        horizon: int | str | None,
        sampling: Sampling,
        stops: Sequence[str] = (),
    ) -> Written:
        """What the draft writes after an answer of these tokens, up to the horizon, in its own tokens."""
        tokenizer, read = self.draft_tokenizer, self.to_draft(ids)

        def at_cut(written: list[int]) -> bool:
            return ends_segment(written, tokenizer, self.segments)

        stop: Stop | None = at_cut if horizon == "segment" else None
        if stops and stop is None:  # at the next cut, so that what is judged before it is the same as without
            stop = _at_next(at_cut, says(stops, read, tokenizer))
        if isinstance(horizon, int):
            room = min(room, horizon)
        return await draft.decode(read, room, sampling, stop)


def _at_next(cut_there: Stop, said: Stop) -> Stop:
    """Stop at the first cut once something was said; asked at every token."""
    seen = False

    def stop_there(written: list[int]) -> bool:
        nonlocal seen
        seen = seen or said(written)
        return seen and cut_there(written)

    return stop_there


def _either(one: Stop | None, other: Stop) -> Stop:
    return other if one is None else lambda written: one(written) or other(written)


class Round:
    """An answer in the making: what is accepted so far, and the steps that add to it."""

    def __init__(
        self, pair: Pair, prompt_ids: list[int], draft_prompt_ids: list[int], settings: Settings, budget: int
    ) -> None:
        self.pair, self.settings, self.budget = pair, settings, budget
        self.prompt_ids, self.draft_prompt_ids = prompt_ids, draft_prompt_ids
        self.tokenizer = pair.target.tokenizer
        self.threshold = settings.threshold or 0.0
        self.sampling = Sampling(
            settings.temperature, settings.top_k, settings.top_p, settings.seed, settings.ignore_eos
        )
        self.sequences: dict[str, ModelSequence] = {}
        self.ids: list[int] = []  # the accepted answer, the target's tokens
        self.segments: list[Segment] = []
        self.stats = Stats()
        self.done = False
        self.ended = False
        self._ahead: tuple[Written, Tensor] | None = None  # the next draft, and the sampler's state before it
        self._started = self._mark = perf_counter()

    @property
    def text(self) -> str:
        """The answer so far, as far as it is certain; whole once it is finished."""
        if not self.done:
            return self.text_of_first(len(self.ids))
        return before_stop(text_of(self.ids, self.tokenizer), self.settings.stop)

    def text_of_first(self, count: int) -> str:
        """The text of the first tokens, as far as it is certain while more may come; from any thread."""
        stops = self.settings.stop
        text = certain_text(self.ids[:count], self.tokenizer)
        place = find_stop(text, stops)
        return text[: len(text) - undecided(text, stops)] if place is None else text[:place]

    async def answer(self) -> Generation:
        """The algorithm."""
        self._started = self._mark = perf_counter()
        try:
            await self._open()
            if self.settings.method != "parse":
                await self.write_alone(self.settings.method)
            while not self.done:
                draft = await self.write_draft()
                ends = cut(draft.ids, self.tokenizer, self.pair.segments)
                verdicts = await self.verify(draft, ends)
                if self.pair.apart:
                    await self.draft_ahead(draft)
                if self.settings.policy == "whole":  # cut as for the calibration, and judged by the last cut
                    ends, verdicts = ends[-1:], verdicts[-1:]
                confidences = verdicts.tolist()
                kept = accept(confidences, self.threshold, self.settings.policy)
                self.keep(draft, ends, confidences, kept)
                if not self.done and not 0 < kept == len(ends):  # a draft that is kept whole continues by itself
                    await self.continue_by_target()
            return self.finish()
        finally:
            for sequence in self.sequences.values():
                sequence.close()

    async def _open(self) -> None:
        """Open a sequence on each model that takes part.

        The target reads the prompt in the pass that judges the first draft, which saves a pass, or at once where that
        takes nobody's time.
        """
        settings, pair = self.settings, self.pair
        judged = settings.method == "parse"
        if judged or settings.method == "target":
            needs = pair.verifier.needs if judged and pair.verifier else None
            layers = needs.layers if needs and needs.context_states else ()
            self.sequences["target"] = pair.target.open(self.prompt_ids, layers)
        if judged or settings.method == "draft" or settings.lookahead:
            assert pair.draft is not None
            self.sequences["draft"] = pair.draft.open(self.draft_prompt_ids)
        if settings.method == "target" or (judged and pair.apart):
            await self.sequences["target"].prefill()
        self._clock("target")

    async def write_draft(self) -> Written:
        """Let the draft write on from the accepted answer; its tokens come back as the target's."""
        written = self._ahead[0] if self._ahead else await self._drafted(self.ids)
        self._ahead = None
        ids = self.pair.to_target(written.ids)
        cropped = ids[: self.budget - len(self.ids)]
        self.stats.rounds += 1
        self.stats.draft_tokens += len(cropped)
        self._clock("draft")
        return Written(cropped, written.ended and len(cropped) == len(ids))

    async def _drafted(self, ids: list[int]) -> Written:
        """What the draft writes after an answer of these tokens, in its own tokens."""
        settings, room = self.settings, self.budget - len(ids)
        draft = self.sequences["draft"]
        return await self.pair.write_draft(draft, ids, room, settings.horizon, self.sampling, settings.stop)

    async def verify(self, draft: Written, ends: Sequence[int]) -> Tensor:
        """The confidence in each of K prefixes, float32 [K]; on a GPU they may still be on their way."""
        if not ends:
            return torch.empty(0)
        self._clock("other")
        verifier = self.pair.verifier
        assert verifier is not None
        evidence = await self.sequences["target"].verify(self.ids, draft, ends, verifier.needs)
        self.stats.verify_passes += 1
        return verifier.confidences(evidence)

    async def draft_ahead(self, draft: Written) -> None:
        """Write the draft of the next round as if this one were kept whole, while the target still judges it.

        Where that does not come true nothing is left of it, neither tokens nor draws of the sampler. What is accepted
        is known only when this draft is written, so a slow draft delays it, by the horizon at most.
        """
        ids = [*self.ids, *draft.ids]
        if draft.ids and not draft.ended and len(ids) < self.budget:
            self._clock("verify")
            before = self.sampling.state
            self._ahead = await self._drafted(ids), before
            self._clock("draft")

    def keep(self, draft: Written, ends: Sequence[int], confidences: Sequence[float], kept: int) -> None:
        """Add the first `kept` segments of the draft to the answer."""
        self._clock("verify")
        texts = [certain_text([*self.ids, *draft.ids[:stop]], self.tokenizer) for stop in (0, *ends)]
        for index, (before, text) in enumerate(pairwise(texts)):
            self.segments.append(Segment(text[len(before) :], "draft", confidences[index], index < kept))
        end = ends[kept - 1] if kept else 0
        self.ids += draft.ids[:end]
        self.stats.accepted_tokens += end
        if end:
            self._first_token()
        all_kept = kept == len(ends) and (kept > 0 or self.threshold <= 0)
        if self._ahead and not (kept and all_kept):
            self.sampling.state, self._ahead = self._ahead[1], None
        self.ended = all_kept and draft.ended
        self.done = self.ended or len(self.ids) >= self.budget
        self.stats.accepted_tokens -= self._end_at_stop()
        self._clock("other")

    async def continue_by_target(self) -> None:
        """Let the target write on: to the next cut or, with handback "never", to the end."""
        settings, segments = self.settings, self.pair.segments
        to_the_end = settings.handback == "never" or settings.policy == "whole"
        stop = lambda written: ends_segment(written, self.tokenizer, segments)
        await self._write("target", None if to_the_end else stop)
        self.done = self.ended or to_the_end or len(self.ids) >= self.budget
        self._end_at_stop()

    async def write_alone(self, role: str) -> None:
        """Let one model write the whole answer."""
        await self._write(role)
        self.done = True
        self._end_at_stop()

    async def _write(self, role: str, stop: Stop | None = None) -> None:
        """Add to the answer what a model writes, token by token."""
        before, room = self.ids, self.budget - len(self.ids)
        same = role == "target" or self.pair.same_tokens
        proposer = None
        if role == "target" and self.settings.lookahead:
            back = None if self.pair.same_tokens else self.pair.to_target
            draft, count = self.sequences["draft"], self.settings.lookahead
            proposer = Proposer(draft, count, self.pair.to_draft, back, self._proposed)

        def grown(written: list[int]) -> None:
            self._first_token()
            if same:
                self.ids = before + written

        read = before if role == "target" else self.pair.to_draft(before)
        if stops := self.settings.stop:
            tokenizer = self.tokenizer if role == "target" else self.pair.draft_tokenizer
            stop = _either(stop, says(stops, read, tokenizer))
        written = await self.sequences[role].decode(read, room, self.sampling, stop, grown, proposer)
        self.ended = written.ended
        added = written.ids if same else self.pair.to_target(written.ids)
        if len(added) > room:  # the same text in more tokens
            added, self.ended = added[:room], False
        self.ids = before + added
        if added:
            texts = [certain_text(ids, self.tokenizer) for ids in (before, self.ids)]
            self.segments.append(Segment(texts[1][len(texts[0]) :], role, None, True))
        if role == "target":
            self.stats.target_tokens += len(added)
        else:
            self.stats.draft_tokens += len(added)
            self.stats.accepted_tokens += len(added)
        self._clock(role)

    def _proposed(self, proposed: int, accepted: int) -> None:
        """Count a pass of the target over tokens that the draft proposed."""
        self.stats.lookahead_passes += 1
        self.stats.lookahead_tokens += proposed
        self.stats.lookahead_accepted_tokens += accepted

    def _end_at_stop(self) -> int:
        """End the answer with the token that completes a stop string, where it holds one; how many were after it."""
        ids = self.ids
        count = through_stop(ids, self.settings.stop, self.tokenizer)
        if count is None:
            return 0
        self.ids, self.done, self.ended = ids[:count], True, True
        return len(ids) - count

    def finish(self) -> Generation:
        """The finished answer; the accepted segments join to its text."""
        text = self.text
        joined = sum(len(segment.text) for segment in self.segments if segment.accepted)
        if rest := text[joined:]:  # a character whose other bytes never came
            last = max(i for i, segment in enumerate(self.segments) if segment.accepted)
            self.segments[last] = replace(self.segments[last], text=self.segments[last].text + rest)
        room, segments = len(text), list[Segment]()
        for segment in self.segments:
            kept = segment.text[:room] if segment.accepted else segment.text
            room -= len(kept) if segment.accepted else 0
            if kept or not segment.text:  # of those after a stop string there is nothing left
                segments.append(replace(segment, text=kept))
        self._clock("other")
        return Generation(text, self.ids, "stop" if self.ended else "length", segments, self.stats)

    def _first_token(self) -> None:
        """The user can see something from now on."""
        if not self.stats.first_token_seconds:
            self.stats.first_token_seconds = perf_counter() - self._started

    def _clock(self, phase: str) -> None:
        """Charge the time since the last call to a phase."""
        now = perf_counter()
        self.stats.seconds[phase] += now - self._mark
        self._mark = now
