"""The engine: rounds of draft, verify, accept, continue.

`Engine.generate` answers prompts; the loop in `Engine._steps` is the algorithm. A draft model writes
up to `horizon` tokens, the target judges every prefix in one packed pass, the longest accepted
prefix stays in both caches, and the target goes on from there. With a threshold above 1 the output
is the target's own greedy answer, with threshold 0 it is the draft's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parse.answer import Answer, Generation, Settings, accept
from parse.compiled import PATIENCE, Compiled
from parse.decode import Context
from parse.layout import integers, pack
from parse.models import (
    ATTENTION,
    Messages,
    certain_text,
    encode_continuation,
    encode_prompt,
    eos_ids,
    finding,
    is_distributed,
    load_model,
    text_behind,
    text_of,
    warn_of_unheeded,
)
from parse.passes import Pass, Reader, Steps, check_packing, drive, drive_together, growing
from parse.segments import Segmenter, check_segmenter
from parse.trained import load as load_verifier
from parse.verifiers import Evidence, Verifier, token_divergence, token_evidence


class Engine:
    """A target, a draft and a verifier, ready to answer."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        draft: PreTrainedModel | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        verifier: Verifier | None = None,
        segments: Segmenter = "sentence",
        compile: bool | None = None,
    ) -> None:
        check_segmenter(segments)
        self.target, self.tokenizer = target, tokenizer
        self.draft, self.draft_tokenizer = draft, draft_tokenizer or tokenizer
        self.verifier, self.segments = verifier, segments
        self.same_tokens = self.draft_tokenizer.get_vocab() == tokenizer.get_vocab()
        self.readers = {"target": Reader(target, eos_ids(target, tokenizer.eos_token_id), _compiled(target, compile))}
        if draft is not None:
            ends = eos_ids(draft, self.draft_tokenizer.eos_token_id)
            self.readers["draft"] = Reader(draft, ends, _compiled(draft, compile))
        # then the next draft is written while the target judges this one; on one device they would wait for each other
        self.apart = draft is not None and draft.device != target.device
        # then several processes run this engine, in step
        self.distributed = any(is_distributed(reader.model) for reader in self.readers.values())

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path | PreTrainedModel,
        draft: str | Path | PreTrainedModel | PeftModel | None = None,
        verifier: str | Path | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        segments: Segmenter | None = None,
        compile: bool | None = None,
        target_options: dict[str, Any] | None = None,
        draft_options: dict[str, Any] | None = None,
    ) -> Engine:
        """Load an engine.

        Args:
            target, draft: path, hub id or loaded model; of the draft also a PEFT folder, which is merged into the model
                that it names, or a loaded PEFT model, which runs as it is.
            verifier: "prompt", "likelihood", or the folder of a trained one.
            tokenizer, draft_tokenizer: where the models are given loaded from elsewhere.
            device, dtype: default to the GPU and bfloat16 where there is one, else CPU and float32.
            attention: the target's: "auto", "sdpa" (dense masks) or "flex" (FlexAttention's block masks); see
                `parse.models.ATTENTION`.
            segments: "sentence", "line" or a number of tokens; defaults to the trained verifier's own,
                else "sentence".
            compile: compile forward passes where that pays, see `parse.compiled`: True at their first use, None once
                a pass has taken a while over all its uses (short runs never wait for a compiler), False never.
            target_options, draft_options: more arguments of `transformers`' `from_pretrained` for each, such as
                `{"device_map": "auto"}`, `{"tp_plan": "auto"}` or a `quantization_config`. Draft and target may
                sit on different devices. With a `tp_plan`, all processes ask for the same answers, and get them.
                Those that say which files are meant, such as `revision` or `gguf_file`, find the tokenizer as well.

        Raises:
            ValueError: for an architecture whose cache cannot be rolled back, a verifier made for
                another target, or settings that are not allowed; the message says what is.
            FileNotFoundError: for a verifier folder that is not there.
        """
        if attention not in ATTENTION:
            raise ValueError(f"attention={attention!r} is not known: use one of {', '.join(ATTENTION)}")
        target_model = load_model(target, device, dtype, ATTENTION[attention], target_options)
        check_packing(target_model)
        warn_of_unheeded(target_model)
        draft_model = None if draft is None else load_model(draft, device, dtype, options=draft_options)
        tokenizer = tokenizer or _tokenizer(target_model, target_options)
        if draft_model is not None and draft_tokenizer is None:
            draft_tokenizer = _tokenizer(draft_model, draft_options)
        loaded: Verifier | None = None
        record: dict[str, Any] = {}
        if verifier is not None:
            loaded, record = load_verifier(verifier, target_model, tokenizer)
        trained_with = record.get("segments")
        if segments is not None and trained_with is not None and segments != trained_with:
            raise ValueError(
                f"segments={segments!r}, but the verifier in {verifier} was trained on {trained_with!r}: "
                "leave `segments` out or train a verifier for it"
            )
        chosen = segments if segments is not None else (trained_with or "sentence")
        return cls(target_model, tokenizer, draft_model, draft_tokenizer, loaded, chosen, compile)

    def generate(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        max_new_tokens: int = 512,
        threshold: float | None = None,
        policy: str = "first_fail",
        handback: str = "segment",
        horizon: int | str | None = None,
        method: str = "parse",
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        lookahead: int = 0,
        batch_size: int = 16,
    ) -> list[Generation]:
        """Answer prompts, many at once.

        Args:
            prompts: text, chat messages, or a list of either. Text is asked as a user's turn where the
                target has a chat template.
            max_new_tokens: at most so many of the target's tokens an answer, cut to the end of its context. Where the
                draft's context ends before, the target goes on alone.
            threshold: accept confidences at or above it; None takes the verifier's own.
            policy: "first_fail" keeps the cuts before the first one below the threshold, "longest" all up
                to the last one above it, "whole" the whole draft or nothing (a cascade).
            handback: after the target's repair of a draft, "segment" lets the draft go on behind the next
                cut, "never" lets the target write to the end.
            horizon: draft at most so many tokens a round; "segment" for one segment, None for all.
            method: "parse", "target" (alone) or "draft" (alone).
            temperature, top_k, top_p: 0 is greedy; a positive temperature samples draft and target alike, from
                the k likeliest tokens (0: all) and of those the likeliest that reach p (1: all).
            seed: the same seed gives the same answer, whatever the other prompts.
            lookahead: while the target writes, let the draft propose so many tokens at a time (token-level
                speculation: the target's words, in fewer passes); needs a draft with the target's vocabulary.
            batch_size: answer at most so many prompts at once. Each goes through its rounds by itself; whatever
                passes they need of a model at a moment run as one. 1 gives the least seconds a request.

        Returns:
            one `Generation` a prompt.
        """
        settings = self.settings(
            max_new_tokens=max_new_tokens,
            threshold=threshold,
            policy=policy,
            handback=handback,
            horizon=horizon,
            lookahead=lookahead,
            method=method,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
            prompts = [cast(str | Messages, prompts)]
        many = cast(Sequence[str | Messages], prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        steps = (self._steps(self._start(*self._encoded(p), settings)) for p in many)
        finished = dict(drive_together(steps, batch_size))
        return [finished[i] for i in range(len(many))]

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[str]:
        """Answer one prompt and yield its text piece by piece, as soon as it is certain.

        The pieces join to the text that `generate` gives with the same options: accepted drafts come whole, the
        target's own words token by token. A character that is not complete yet waits for its other bytes.
        """
        settings = self.settings(**options)
        answer = self._start(*self._encoded(prompt), settings)
        shown = ""
        for _ in growing(self._steps(answer)):
            text = certain_text(answer.ids, self.tokenizer)
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        if rest := text_of(answer.ids, self.tokenizer)[len(shown) :]:
            yield rest

    def generate_ids(
        self, prompt_ids: list[int], settings: Settings, draft_prompt_ids: list[int] | None = None
    ) -> Generation:
        """Answer one prompt that is tokenized already; see `generate`."""
        return drive(self._steps(self._start(prompt_ids, draft_prompt_ids or prompt_ids, settings)))

    def _start(self, prompt_ids: list[int], draft_prompt_ids: list[int], settings: Settings) -> Answer:
        budget = self._budget(prompt_ids, draft_prompt_ids, settings)
        roles = ["target", "draft"] if settings.method == "parse" or settings.lookahead else [settings.method]
        readers = {role: self.readers[role] for role in roles}
        return Answer(self, prompt_ids, draft_prompt_ids, settings, budget, readers)

    def _steps(self, answer: Answer) -> Steps[Generation]:
        """The algorithm: draft, cut, verify, accept, commit, continue."""
        try:
            yield from answer.begin()
            if answer.settings.method != "parse":
                yield from answer.write_alone(answer.settings.method)
            while not answer.done:
                draft = yield from answer.draft()
                verdict = yield from answer.verify(draft)
                if self.apart:
                    yield from answer.draft_ahead(draft)
                k = accept(verdict.confidences.tolist(), answer.threshold, answer.settings.policy)
                answer.commit(draft, verdict, k)
                yield None  # the answer has grown
                if not answer.done and not (k and k == len(verdict.ends)):  # a draft kept whole goes on itself
                    yield from answer.proceed()
            return answer.finish()
        finally:
            answer.close()

    def verify(self, prompt_ids: Sequence[int], draft_ids: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Confidence in each prefix `draft_ids[:end]` of an answer to the prompt: float32 [K]."""
        target = self.context("target")
        target.read(prompt_ids)
        evidence, _ = drive(self.examining(target, draft_ids, ends, ended=False))
        with torch.inference_mode():
            return self.need_verifier().confidences(evidence).float().cpu()

    def examining(
        self,
        target: Context,
        draft_ids: Sequence[int],
        ends: Sequence[int],
        ended: bool,
        draft_logits: Tensor | None = None,
    ) -> Steps[tuple[Evidence, Tensor]]:
        """The packed pass: read a draft of N tokens behind the target's text, and judge K prefixes.

        What of the text was not read yet goes first in the pass. Afterwards the cache holds the text and the whole
        draft; the suffixes are dropped.

        Args:
            draft_logits: [M, V], those that the draft's tokens were drawn from, where they are at hand.

        Returns:
            the evidence for the verifier, and the target's logits behind the text and behind each end, [K + 1, V].
        """
        verifier = self.need_verifier()
        first, device = target.waiting, self.target.device
        w, n = len(first), len(draft_ids)
        before = target.next_logits
        assert before is not None or first, "the logits behind this text are neither known nor about to be"
        lead = int(w > 0)  # the logits behind what waited are those before the draft
        layout = pack([*first, *draft_ids], [w + end for end in ends], verifier.suffix_ids, len(target.ids) - w)
        whole = verifier.reads_draft or draft_logits is not None
        read = range(w - lead, w + n) if whole else sorted({*range(w - lead, w), w + n - 1, *(w + e - 1 for e in ends)})
        verdicts = layout.last_suffix
        keep = [*read, *verdicts] if verifier.adapted is None else list(read)
        with_states = bool(verifier.layers) or verifier.adapted is not None
        output = yield Pass(target.reader, target.row, layout.ids, layout, keep, with_states, verifier.adapted)
        if before is None:
            before = output.logits[0]  # [V]
        drafted, suffix_logits = output.logits[lead : len(read)], output.logits[len(read) :]  # [N or K, V], [K, V]
        places = [read.index(w + end - 1) - lead for end in [*ends, n]]
        following = torch.cat([before[None], drafted[places]])  # [K + 2, V]: behind the text, each end, the draft
        length = len(target.ids)
        target.has_read([*draft_ids, *layout.ids[w + n :]])
        target.rollback(length + n, following[-1])
        tokens = [*draft_ids, *([min(target.reader.eos_ids)] if ended and target.reader.eos_ids else [])]  # M
        log_prob = entropy = margin = torch.empty(0, device=device)
        if whole:
            log_prob, entropy, margin = token_evidence(before, drafted, integers(tokens).to(device))
        divergence = None
        if draft_logits is not None:
            divergence = token_divergence(torch.cat([before[None], drafted])[: len(tokens)], draft_logits)
        read_states = [output.states[layer][w : w + n] for layer in verifier.layers]  # [N, D] each
        evidence = Evidence(
            ends,
            log_prob,
            entropy,
            margin,
            states=torch.cat(read_states, dim=-1) if read_states else None,  # [N, D * layers]
            suffix_logits=suffix_logits if len(suffix_logits) else None,
            suffix_states=output.states[-1][verdicts] if verifier.adapted else None,  # [K, D]
            divergence=divergence,
        )
        return evidence, following[:-1]

    def context(self, role: str) -> Context:
        """A fresh context of the "target" or the "draft", with a cache to itself."""
        shared = self._reader(role)
        return Context(Reader(shared.model, shared.eos_ids, shared.compiled))

    def _reader(self, role: str) -> Reader:
        """The model's reader, whose cache all requests share."""
        if role not in self.readers:
            raise ValueError('this engine has no draft model: give one, or use method="target"')
        return self.readers[role]

    def encode(self, prompt: str | Messages) -> list[int]:
        """The target's tokens of a prompt, up to where the answer begins."""
        return encode_prompt(prompt, self.tokenizer)

    def encode_for_draft(self, prompt: str | Messages) -> list[int]:
        """The draft's tokens of a prompt, up to where the answer begins; the target's where it has the same words."""
        return self.encode(prompt) if self.same_tokens else encode_prompt(prompt, self.draft_tokenizer)

    def _encoded(self, prompt: str | Messages) -> tuple[list[int], list[int]]:
        """The target's tokens of a prompt and the draft's."""
        ids = self.encode(prompt)
        return ids, ids if self.same_tokens else self.encode_for_draft(prompt)

    def to_target(self, draft_ids: Sequence[int]) -> list[int]:
        """The draft's tokens as the target's; as text where the vocabularies differ."""
        if self.same_tokens:
            return list(draft_ids)
        return encode_continuation(text_behind(draft_ids, self.draft_tokenizer), self.tokenizer)

    def to_draft(self, target_ids: Sequence[int]) -> list[int]:
        """The target's tokens as the draft's; as text where the vocabularies differ."""
        if self.same_tokens:
            return list(target_ids)
        return encode_continuation(text_behind(target_ids, self.tokenizer), self.draft_tokenizer)

    def need_verifier(self) -> Verifier:
        """The verifier, or ValueError with advice."""
        if self.verifier is None:
            raise ValueError(
                'this engine has no verifier: give a trained one, "prompt" or "likelihood", '
                'or use method="target" or "draft"'
            )
        return self.verifier

    def settings(self, **options: Any) -> Settings:
        """Checked settings for `generate_ids`: the keyword arguments of `generate`.

        Raises:
            ValueError: for a setting that is not known or not allowed, or needs a part that this engine lacks.
        """
        names = [field.name for field in dataclasses.fields(Settings)]
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(f"unknown settings {unknown}: use {', '.join(names)}")
        settings = Settings(**options)
        if settings.method == "parse":
            own = self.need_verifier().threshold
            settings = dataclasses.replace(
                settings, threshold=own if settings.threshold is None else settings.threshold
            )
        if settings.method != "target" or settings.lookahead:
            self._reader("draft")
        if self.distributed and settings.temperature and settings.seed is None:
            raise ValueError(
                "seed=None, and the model is split over several processes, each of which would draw tokens of its own: "
                "give all of them the same seed"
            )
        if settings.lookahead and not self.same_tokens:
            raise ValueError(
                f"lookahead={settings.lookahead} lets the draft propose tokens, and its vocabulary is not the "
                "target's: use 0, or a draft with the same tokenizer"
            )
        return settings

    def _budget(self, prompt_ids: Sequence[int], draft_prompt_ids: Sequence[int], settings: Settings) -> int:
        """New tokens that fit: the request's own limit, or what the contexts leave of which the answer needs all."""
        room = settings.max_new_tokens
        suffix = len(self.verifier.suffix_ids) if self.verifier and settings.method == "parse" else 0
        needed = {"target": (len(prompt_ids), suffix)}
        if settings.method == "draft" or settings.lookahead:  # else the target goes on where the draft's context ends
            needed["draft"] = len(draft_prompt_ids), 0
        for role, (prompt, verdict) in needed.items():
            longest = self.readers[role].longest
            if longest is not None:
                room = min(room, longest - prompt - verdict)
            if room < 1:
                asking = f", a verdict takes {verdict}," if verdict else ""
                raise ValueError(
                    f"the prompt has {prompt} tokens{asking} and the context of the {role} holds {longest}, which "
                    "leaves no room for an answer: shorten the prompt"
                )
        return room


def _tokenizer(model: PreTrainedModel, options: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(model.config.name_or_path, **finding(options))
    return cast(PreTrainedTokenizerBase, loaded)


def _compiled(model: PreTrainedModel, wanted: bool | None) -> Compiled | None:
    return None if wanted is False else Compiled(model, 0.0 if wanted else PATIENCE)
