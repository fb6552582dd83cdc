"""What users have today: `transformers`' own `generate`, alone and with the draft as its assistant.

Greedy, over the same models, tokens and end tokens as the engine's, and like the engine without penalties or beams that
a model's generation config may ask for. The assistant proposes tokens that the target accepts where it would have
written them itself; across tokenizers `transformers` aligns the two texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from parse import Engine, Generation
from parse.generation import Segment, Stats
from parse.local.loading import Messages
from parse.text import before_stop, says, text_of, through_stop


class TransformersGenerate:
    """Answers prompts as `Engine.generate` does, by `model.generate` of the engine's target."""

    def __init__(self, engine: Engine, assisted: bool = False) -> None:
        self.engine = engine
        self.target = _plain(engine.target)
        self.draft = _plain(engine.draft) if assisted and engine.draft is not None else None
        self.ends = sorted(engine.models["target"].eos_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int,
        batch_size: int = 1,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answers in the prompts' order, so many at once; with an assistant one at a time, as it allows no more."""
        size = batch_size if self.draft is None else 1
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [answer for batch in batches for answer in self._answer(batch, max_new_tokens, stop)]

    def _answer(self, prompts: Sequence[str | Messages], limit: int, stops: Sequence[str]) -> list[Generation]:
        encoded = [self.engine.encode(prompt) for prompt in prompts]
        width, device = max(map(len, encoded)), self.engine.target.device
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)  # [B, L], left-padded
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)  # [B, L]
        at_stop = [_AtStop(says(stops, [], self.engine.tokenizer), width)] if stops else []
        clock, started = _FirstToken(), perf_counter()
        output = self.target.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([clock, *at_stop]),
            **self._assistant(),
        )  # [B, L + T]
        seconds = perf_counter() - started
        return [self._generation(row[width:].tolist(), seconds, clock.at - started, stops) for row in output]

    def _assistant(self) -> dict[str, Any]:
        if self.draft is None:
            return {}
        engine = self.engine
        tokenizers = {"tokenizer": engine.tokenizer, "assistant_tokenizer": engine.draft_tokenizer}
        return {"assistant_model": self.draft, **(tokenizers if _widths_differ(engine) else {})}

    def _generation(self, ids: list[int], seconds: float, first: float, stops: Sequence[str]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        stopped = through_stop(ids[:end], stops, self.engine.tokenizer)
        ended, end = end < len(ids) or stopped is not None, end if stopped is None else stopped
        text = before_stop(text_of(ids[:end], self.engine.tokenizer), stops)
        stats = Stats(target_tokens=end, rounds=1, first_token_seconds=first)
        stats.seconds["target"] = seconds
        segments = [Segment(text, "target", None, True)] if end else []
        return Generation(text, ids[:end], "stop" if ended else "length", segments, stats)


def _plain(model: PreTrainedModel) -> Any:
    """The same model without what its generation config asks for."""
    plain: Any = copy.copy(model)
    plain.generation_config = GenerationConfig()
    return plain


def can_assist(engine: Engine, prompts: Sequence[str | Messages], limit: int) -> bool:
    """Whether the draft can be an assistant: `transformers` tells other tokens by the vocabularies' sizes alone.

    And whether its context holds every prompt with an answer of `limit` tokens.
    """
    if engine.draft is None or engine.served or not (engine.same_tokens or _widths_differ(engine)):
        return False
    longest = engine.models["draft"].context_length
    return longest is None or max(len(engine.encode_for_draft(prompt)) for prompt in prompts) + limit <= longest


def _widths_differ(engine: Engine) -> bool:
    assert engine.draft is not None
    return bool(engine.target.config.vocab_size != engine.draft.config.vocab_size)


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first tokens were written."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """None of the B texts is finished by this."""
        if not self.at:
            input_ids[0, -1].item()  # which waits for the device
            self.at = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _AtStop(StoppingCriteria):
    """Stops a text that holds a stop string; transformers' own fails for tokenizers that cannot spell any word."""

    def __init__(self, said: Callable[[list[int]], bool], width: int) -> None:
        self.said, self.width = said, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which of the B texts are finished: bool [B]."""
        finished = [self.said(row[self.width :].tolist()) for row in input_ids]
        return torch.tensor(finished, device=input_ids.device)
