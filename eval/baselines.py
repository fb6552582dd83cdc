"""What users have today: `transformers`' own `generate`, alone and with the draft as its assistant.

Greedy, over the same models, tokens and end tokens as the engine's. The assistant proposes tokens that the target
accepts where it would have written them itself; across tokenizers `transformers` aligns the two texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from parse import Engine, Generation
from parse.generation import Segment, Stats
from parse.local.loading import Messages
from parse.text import text_of


class TransformersGenerate:
    """Answers prompts as `Engine.generate` does, by `model.generate` of the engine's target."""

    def __init__(self, engine: Engine, assisted: bool = False) -> None:
        self.engine, self.assisted = engine, assisted
        self.ends = sorted(engine.models["target"].eos_ids)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str | Messages], max_new_tokens: int, batch_size: int = 1) -> list[Generation]:
        """Answers in the prompts' order, so many at once; with an assistant one at a time, as it allows no more."""
        size = 1 if self.assisted else batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [answer for batch in batches for answer in self._answer(batch, max_new_tokens)]

    def _answer(self, prompts: Sequence[str | Messages], limit: int) -> list[Generation]:
        encoded = [self.engine.encode(prompt) for prompt in prompts]
        width, device = max(map(len, encoded)), self.engine.target.device
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)  # [B, L], left-padded
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)  # [B, L]
        clock, started = _FirstToken(), perf_counter()
        model = cast(Any, self.engine.target)
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([clock]),
            **self._assistant(),
        )  # [B, L + T]
        seconds = perf_counter() - started
        return [self._generation(row[width:].tolist(), seconds, clock.at - started) for row in output]

    def _assistant(self) -> dict[str, Any]:
        if not self.assisted:
            return {}
        engine = self.engine
        tokenizers = {"tokenizer": engine.tokenizer, "assistant_tokenizer": engine.draft_tokenizer}
        return {"assistant_model": engine.draft, **({} if engine.same_tokens else tokenizers)}

    def _generation(self, ids: list[int], seconds: float, first: float) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text = text_of(ids[:end], self.engine.tokenizer)
        stats = Stats(target_tokens=end, rounds=1, first_token_seconds=first)
        stats.seconds["target"] = seconds
        segments = [Segment(text, "target", None, True)] if end else []
        return Generation(text, ids[:end], "stop" if end < len(ids) else "length", segments, stats)


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first tokens were written."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """None of the B texts is finished by this."""
        self.at = self.at or perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
