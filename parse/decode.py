"""Token loops: one model reading and writing one text, greedy or sampled, over its own cache."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parse.cache import PrefixCache

Sampler = Callable[[Tensor], int]  # logits [V] -> token id
Stop = Callable[[list[int]], bool]  # tokens written so far -> whether to stop behind the last


@dataclass(frozen=True)
class Written:
    """Tokens that a model wrote, without the end-of-sequence token."""

    ids: list[int]
    ended: bool  # whether the end-of-sequence token came next


def greedy(logits: Tensor) -> int:
    """The most likely token of logits [V]."""
    return int(logits.argmax())


def sampler(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> Sampler:
    """A sampler over logits [V]: greedy at temperature 0, else from the softmax of logits / temperature.

    Args:
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the most likely ones that reach this share of the probability; 1 keeps all.
        seed: the same seed draws the same tokens, on every device; None draws others each time.
    """
    if temperature == 0:
        return greedy
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def sample(logits: Tensor) -> int:
        no_text = cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long))  # these warpers read none
        warped = warpers(no_text, cast(torch.FloatTensor, logits.float().cpu()[None]))  # [1, V]
        return int(torch.multinomial(warped.softmax(-1), 1, generator=generator))

    return sample


@dataclass
class Context:
    """A model and the text that it has read: tokens, their cache, and the logits of what follows."""

    model: PreTrainedModel
    eos_ids: frozenset[int]
    cache: PrefixCache = field(default_factory=PrefixCache)
    ids: list[int] = field(default_factory=list)
    next_logits: Tensor | None = None  # [V]; None where the next token's logits are not known

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Append tokens to the text in one causal pass."""
        start, device = len(self.ids), self.model.device
        output = self.model(
            input_ids=torch.tensor([list(ids)], device=device),  # [1, T]
            position_ids=torch.arange(start, start + len(ids), device=device)[None],  # [1, T]
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.ids.extend(ids)
        self.next_logits = output.logits[0, -1]

    def rollback(self, length: int, next_logits: Tensor | None = None) -> None:
        """Keep the first `length` tokens; `next_logits` [V] are those behind them, where known."""
        if length < len(self.ids) or next_logits is not None:
            self.next_logits = next_logits
        self.cache.truncate(length)
        del self.ids[length:]

    def become(self, ids: Sequence[int]) -> None:
        """Make the text `ids`: keep the prefix that is cached already, drop the rest, read what is new."""
        common = 0
        for mine, theirs in zip(self.ids, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        if common == len(ids) == len(self.ids) and self.next_logits is not None:
            return
        common = min(common, len(ids) - 1)  # the last token is read again where its logits are gone
        self.rollback(common)
        self.read(ids[common:])

    def write(self, limit: int, sample: Sampler = greedy, stop: Stop | None = None) -> Written:
        """Write on, up to `limit` tokens, to the end of sequence, or to where `stop` says so."""
        writing = self.writing(limit, sample, stop)
        while True:
            try:
                next(writing)
            except StopIteration as finished:
                return finished.value  # type: ignore[no-any-return]

    def writing(self, limit: int, sample: Sampler = greedy, stop: Stop | None = None) -> Generator[int, None, Written]:
        """`write`, token by token: each is yielded as soon as it is chosen."""
        written: list[int] = []
        while len(written) < limit:
            if self.next_logits is None:
                raise RuntimeError("the logits behind this text are not known: read or roll back with them")
            token = sample(self.next_logits)
            if token in self.eos_ids:
                return Written(written, ended=True)
            written.append(token)
            yield token
            self.read([token])
            if stop and stop(written):
                break
        return Written(written, ended=False)
