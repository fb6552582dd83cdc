"""The engine: a target, a draft and a verifier, ready to answer. The algorithm itself is in `parse.round`."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.generation import Generation, Settings, Stats, whole_number
from parse.local.loading import ATTENTION, Messages, is_distributed, warn_of_unheeded
from parse.local.model import LocalModel
from parse.local.runner import check_packing
from parse.models import load, models_of, verifier_of
from parse.prompts import encode_for_draft, encode_prompt, unsuited
from parse.remote.model import RemoteModel
from parse.round import NoRoom, Pair, Round
from parse.sampling import Written
from parse.scheduler import Scheduler
from parse.segments import Segmenter, check_segmenter
from parse.text import text_of
from parse.verifiers import Verifier


class Engine:
    """A target, a draft and a verifier, ready to answer."""

    def __init__(
        self,
        target: PreTrainedModel | RemoteModel,
        tokenizer: PreTrainedTokenizerBase,
        draft: PreTrainedModel | RemoteModel | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        verifier: Verifier | None = None,
        segments: Segmenter = "sentence",
        compile: bool | None = None,
    ) -> None:
        check_segmenter(segments)
        self.tokenizer, self.draft_tokenizer = tokenizer, draft_tokenizer or tokenizer
        self.models = models_of(target, tokenizer, draft, self.draft_tokenizer, compile is not False)
        # on two devices the next draft is written while the target judges this one; on one each would wait
        devices = {model.device for model in self.models.values() if isinstance(model, LocalModel)}
        self.pair = Pair(self.models["target"], self.models.get("draft"), verifier, segments, len(devices) > 1)
        # then several processes run this engine, in step
        local = [model for model in self.models.values() if isinstance(model, LocalModel)]
        self.distributed = any(is_distributed(model.runner.model) for model in local)
        self.scheduler = Scheduler()
        self._compiles_first, self._warm = bool(compile), 0  # for so many requests at once

    @property
    def target(self) -> PreTrainedModel:
        """The target's own module.

        Raises:
            ValueError: where it is on a server.
        """
        model = self.models["target"]
        if isinstance(model, LocalModel):
            return model.runner.model
        raise ValueError(f"this needs the target's weights on this machine, and it is {model.name}")

    @property
    def draft(self) -> PreTrainedModel | None:
        """The draft's own module; None where there is no draft on this machine."""
        model = self.models.get("draft")
        return model.runner.model if isinstance(model, LocalModel) else None

    @property
    def served(self) -> list[str]:
        """The models that are on servers."""
        return [model.name for model in self.models.values() if isinstance(model, RemoteModel)]

    @property
    def verifier(self) -> Verifier | None:
        """What judges drafts."""
        return self.pair.verifier

    @verifier.setter
    def verifier(self, verifier: Verifier | None) -> None:
        self.pair.check_verifier(verifier)
        self.pair.verifier = verifier

    def judged_by(self, verifier: str | Path) -> Engine:
        """An engine over the same models with another verifier, named as in `from_pretrained`; they share passes."""
        other, model = copy.copy(self), self.models["target"]
        target = model.runner.model if isinstance(model, LocalModel) else model
        other.pair = dataclasses.replace(self.pair, verifier=verifier_of(verifier, target, self.tokenizer))
        return other

    @property
    def segments(self) -> Segmenter:
        """Where answers may be cut."""
        return self.pair.segments

    @segments.setter
    def segments(self, segments: Segmenter) -> None:
        check_segmenter(segments)
        self.pair.segments = segments

    @property
    def same_tokens(self) -> bool:
        """Whether draft and target have the same vocabulary."""
        return self.pair.same_tokens

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
            target, draft: path, hub id, loaded model, or a model on a vLLM server, "http://host:8000/v1#MODEL"; also a
                PEFT folder, which is merged into the model that it names, or a loaded PEFT draft, which runs as it is.
            verifier: "prompt", "likelihood", or the folder of a trained one.
            tokenizer, draft_tokenizer: where the models are given loaded from elsewhere.
            device, dtype: default to the GPU and bfloat16 where there is one, else CPU and float32.
            attention: the target's: "auto", "sdpa" (dense masks) or "flex" (FlexAttention's block masks); see
                `parse.local.loading.ATTENTION`.
            segments: "sentence", "line" or a number of tokens; defaults to the trained verifier's own,
                else "sentence".
            compile: compile forward passes where that pays, see `parse.local.compiled`: True before the first request,
                None when `warm_up` is called, False never. No request waits for a compiler while it is answered.
            target_options, draft_options: more arguments of `transformers`' `from_pretrained` for each, such as
                `{"device_map": "auto"}`, `{"tp_plan": "auto"}` or a `quantization_config`. Draft and target may
                sit on different devices. With a `tp_plan`, all processes ask for the same answers, and get them.
                Those that say which files are meant, such as `revision` or `gguf_file`, find the tokenizer as well.
                Of a model on a server those of `parse.remote.client.Options`.

        Raises:
            ValueError: for an architecture whose cache cannot be rolled back, a verifier made for
                another target, or settings that are not allowed; the message says what is.
            FileNotFoundError: for a verifier folder that is not there.
        """
        if attention not in ATTENTION:
            raise ValueError(f"attention={attention!r} is not known: use one of {', '.join(ATTENTION)}")
        placed: Any = {"device": device, "dtype": dtype}
        target_model, tokenizer = load(target, tokenizer, target_options, **placed, attention=ATTENTION[attention])
        if isinstance(target_model, PreTrainedModel):
            check_packing(target_model)
            warn_of_unheeded(target_model)
        draft_model = None
        if draft is not None:
            draft_model, draft_tokenizer = load(draft, draft_tokenizer, draft_options, **placed)
        loaded = None if verifier is None else verifier_of(verifier, target_model, tokenizer)
        trained_with = loaded.calibration.segments if loaded and loaded.calibration else None
        if segments is not None and trained_with is not None and segments != trained_with:
            raise ValueError(
                f"segments={segments!r}, but the verifier in {verifier} was trained on {trained_with!r}: "
                "leave `segments` out or train a verifier for it"
            )
        chosen = segments if segments is not None else (trained_with or "sentence")
        return cls(target_model, tokenizer, draft_model, draft_tokenizer, loaded, chosen, compile)

    def warm_up(self, at_once: int = 1) -> None:
        """Compile forward passes where that pays, for as many requests at once: up to minutes, kept on disk."""
        for model in self.models.values():
            model.warm_up(at_once)
        self._warm = max(self._warm, at_once)

    def _warm_up_first(self, at_once: int) -> None:
        """Before the first request of its kind, where `compile=True` asks for it: one alone, or several at once."""
        if self._compiles_first and min(at_once, 2) > self._warm:
            self.warm_up(at_once)

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
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        batch_size: int = 16,
        raw: bool = False,
    ) -> list[Generation]:
        """Answer prompts, many at once. Calls from several threads share batches.

        Args:
            prompts: text, chat messages, or a list of either. Text is asked as a user's turn where the
                target has a chat template; what looks like a control token in it, or in a message, is text. A last
                message of the assistant is the beginning of the answer, which is continued.
            max_new_tokens: at most so many of the target's tokens an answer, cut to the end of its context. Where the
                draft's context ends before, the target goes on alone.
            threshold: accept confidences at or above it; None takes the verifier's own, which is calibrated for a
                policy, a handback and a horizon, and refused with others.
            policy: "first_fail" keeps the cuts before the first one below the threshold, "longest" all up
                to the last one above it, "whole" the whole draft or nothing (a cascade).
            handback: after the target's repair of a draft, "segment" lets the draft go on after the next
                cut, "never" lets the target write to the end.
            horizon: draft at most so many tokens a round; "segment" for one segment, None for all.
            method: "parse", "target" (alone) or "draft" (alone).
            temperature, top_k, top_p: 0 is greedy; a positive temperature samples draft and target alike, from
                the k likeliest tokens (0: all) and of those the likeliest that reach p (1: all).
            seed: the same seed gives the same answer, whatever the other prompts.
            lookahead: while the target writes, let the draft propose so many tokens at a time (token-level
                speculation: the target's words, in fewer passes); with other tokens than the target's, as text.
            stop: strings that end an answer where the first of them begins; that one is not part of its text, and its
                tokens are the last ones of the answer.
            ignore_eos: an end token ends nothing, so that answers are as long as they may be: for measurements, as no
                threshold is calibrated for it.
            batch_size: answer at most so many prompts at once. Each goes through its rounds by itself; whatever
                passes they need of a model at a moment run as one. 1 gives the least seconds a request.
            raw: prompts are the whole text that the models read: no chat template, and control tokens count.

        Returns:
            one `Generation` for each prompt. In a list, a prompt that leaves no room for an answer gets an empty one
            with the finish reason "length", an `error` that says why, and a warning.

        Raises:
            ValueError: for a prompt or a setting that is not allowed, before anything is answered.
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
            stop=stop,
            ignore_eos=ignore_eos,
        )
        whole_number("batch_size", batch_size, least=1)
        several = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes | Mapping)
        if not several or (prompts and all(isinstance(turn, Mapping) for turn in prompts)):
            return [self._alone(prompts, settings, raw)]
        return self._all(
            [self._encoded(prompt, raw) for prompt in cast(Sequence[str | Messages], prompts)], settings, batch_size
        )

    def _all(
        self, encoded: Sequence[tuple[list[int], list[int]]], settings: Settings, at_once: int
    ) -> list[Generation]:
        answers: dict[int, Round] = {}
        finished: dict[int, Generation] = {}
        for index, ids in enumerate(encoded):
            try:
                answers[index] = self._start(*ids, settings)
            except NoRoom as error:
                warnings.warn(f"prompt {index} of the list is not answered: {error}", stacklevel=3)
                finished[index] = Generation("", [], "length", [], Stats(), str(error))
        self._warm_up_first(min(at_once, len(answers)))
        places = list(answers)
        for place, result in self.scheduler.completed((answer.answer() for answer in answers.values()), at_once):
            finished[places[place]] = result
        return [finished[index] for index in range(len(encoded))]

    def _alone(self, prompt: Any, settings: Settings, raw: bool) -> Generation:
        answer = self._start(*self._encoded(prompt, raw), settings)
        self._warm_up_first(1)
        return self.scheduler.run(answer.answer())

    def stream(self, prompt: str | Messages, *, raw: bool = False, **options: Any) -> Iterator[str]:
        """Answer one prompt and yield its text piece by piece, as soon as it is certain.

        The pieces join to the text that `generate` gives with the same options: accepted drafts come whole, the
        target's own words token by token. A character that is not complete yet waits for its other bytes.

        Raises:
            ValueError: as `generate` does, at once.
        """
        answer = self._start(*self._encoded(prompt, raw), self.settings(**options))
        self._warm_up_first(1)
        return self._streamed(answer)

    def _streamed(self, answer: Round) -> Iterator[str]:
        shown = 0
        for _ in self.scheduler.watch(answer.answer()):
            text = answer.text
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if rest := answer.text[shown:]:  # others may have run the last step
            yield rest

    def request(self, prompt: str | Messages | Sequence[int], settings: Settings, raw: bool = False) -> Round:
        """An answer in the making, for whoever runs many: its `answer()` is run by the scheduler, its text grows.

        Args:
            prompt: as for `generate`, or the target's tokens.

        Raises:
            NoRoom: where the prompt leaves no room for an answer.
            ValueError: for a prompt that is none.
        """
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], Mapping):
            return self._start(*self._encoded(cast(str | Messages, prompt), raw, warn=False), settings)
        ids = list(cast(Sequence[int], prompt))
        crosses = "draft" in self.models and not self.same_tokens
        words = encode_prompt(text_of(ids, self.tokenizer), self.draft_tokenizer, raw=True) if crosses else ids
        return self._start(ids, words, settings)

    def again(self, answer: Round, settings: Settings) -> Round:
        """The prompt of another answer asked once more."""
        return self._start(answer.prompt_ids, answer.draft_prompt_ids, settings)

    def _start(self, prompt_ids: list[int], draft_prompt_ids: list[int], settings: Settings) -> Round:
        self.models["target"].check_tokens(prompt_ids)
        if "draft" in self.models:
            self.models["draft"].check_tokens(draft_prompt_ids)
        room = self.pair.room(len(prompt_ids), len(draft_prompt_ids), settings)
        return Round(self.pair, prompt_ids, draft_prompt_ids, settings, room)

    def verify(
        self,
        prompt_ids: Sequence[int],
        draft_ids: Sequence[int],
        ends: Sequence[int],
        verifier: Verifier | None = None,
    ) -> Tensor:
        """Confidence in each prefix `draft_ids[:end]` of an answer to the prompt: float32 [K].

        Args:
            verifier: whose; the engine's own by default.

        Raises:
            ValueError: where there is no prompt or no end, or an end lies outside the draft, or a token is none.
        """
        if not prompt_ids or not ends:
            raise ValueError(f"verify takes a prompt and prefix ends: {len(prompt_ids)} tokens, {len(ends)} ends")
        self.models["target"].check_tokens([*prompt_ids, *draft_ids])
        verifier = verifier or self.need_verifier()
        self._warm_up_first(1)

        async def judge() -> Tensor:
            needs = verifier.needs
            sequence = self.pair.target.open(prompt_ids, needs.layers if needs.context_states else ())
            try:
                evidence = await sequence.verify([], Written(list(draft_ids), ended=False), ends, needs)
                return verifier.confidences(evidence)
            finally:
                sequence.close()

        with torch.inference_mode():
            return self.scheduler.run(judge()).float().cpu()

    def encode(self, prompt: str | Messages) -> list[int]:
        """The target's tokens of a prompt, up to where the answer begins."""
        return encode_prompt(prompt, self.tokenizer)

    def encode_for_draft(self, prompt: str | Messages) -> list[int]:
        """The draft's tokens of a prompt, up to where the answer begins; the target's where it has the same words."""
        if self.same_tokens:
            return self.encode(prompt)
        return encode_for_draft(prompt, self.draft_tokenizer, self.tokenizer)

    def _encoded(self, prompt: str | Messages, raw: bool = False, warn: bool = True) -> tuple[list[int], list[int]]:
        """The target's tokens of a prompt and the draft's."""
        if not raw:
            ids = self.encode(prompt)
            if warn and (reason := unsuited(prompt, ids, self.tokenizer)):
                warnings.warn(reason, stacklevel=4)
            return ids, ids if self.same_tokens or "draft" not in self.models else self.encode_for_draft(prompt)
        ids = encode_prompt(prompt, self.tokenizer, raw=True)
        return ids, ids if self.same_tokens else encode_prompt(prompt, self.draft_tokenizer, raw=True)

    def need_verifier(self) -> Verifier:
        """The verifier, or ValueError with advice."""
        if self.verifier is None:
            raise ValueError(
                'this engine has no verifier: give a trained one, "prompt" or "likelihood", '
                'or use method="target" or "draft"'
            )
        return self.verifier

    def settings(self, **options: Any) -> Settings:
        """Checked settings for `request`: the keyword arguments of `generate`.

        Raises:
            ValueError: for a setting that is not known or not allowed, or needs a part that this engine lacks.
        """
        names = [field.name for field in dataclasses.fields(Settings)]
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(f"unknown settings {unknown}: use {', '.join(names)}")
        stop = options.pop("stop", None)
        stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
        settings = Settings(**options, stop=tuple(stops) if isinstance(stops, Sequence) else stops)
        if settings.method == "parse":
            verifier = self.need_verifier()
            if settings.threshold is None:
                own, calibration = verifier.threshold, verifier.calibration
                if calibration:
                    own = calibration.threshold(settings.policy, settings.handback, settings.horizon, self.segments)
                settings = dataclasses.replace(settings, threshold=own)
        if "draft" not in self.models and (settings.method != "target" or settings.lookahead):
            raise ValueError('this engine has no draft model: give one, or use method="target"')
        if settings.lookahead and self.served:
            raise ValueError(
                f"lookahead={settings.lookahead} takes both models on this machine, and {self.served[0]} is on a "
                "server: use lookahead=0, and the server's own speculation where it has one"
            )
        if self.distributed and settings.temperature and settings.seed is None:
            raise ValueError(
                "seed=None, and the model is split over several processes, each of which would draw tokens of its own: "
                "give all of them the same seed"
            )
        return settings
