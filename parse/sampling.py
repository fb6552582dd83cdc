"""How tokens are chosen from logits: greedy or sampled, each request with draws of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-5  # temperatures: logits divided by less are beyond any number


@dataclass(frozen=True)
class Written:
    """Tokens that a model wrote, without the end-of-sequence token."""

    ids: list[int]
    ended: bool  # whether the end-of-sequence token came next


class Sampling:
    """Chooses tokens from logits [V]: greedy at temperature 0, else from the softmax of logits / temperature."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> None:
        """Set up.

        Args:
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: then keep the most likely ones that reach this share of the probability; 1 keeps all.
            seed: the same seed draws the same tokens, on every device; None draws others each time.
            ignore_eos: an end token is a token like others, and ends nothing.
        """
        self.ignore_eos = ignore_eos
        self.greedy, self.temperature = temperature < GREEDY_BELOW, temperature
        self.top_k, self.top_p = top_k, top_p
        self._warpers = LogitsProcessorList([] if self.greedy else [TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self._warpers.append(TopKLogitsWarper(int(top_k)))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(int(seed))

    def ends(self, token: int, eos_ids: frozenset[int]) -> bool:
        """Whether a token ends the text."""
        return token in eos_ids and not self.ignore_eos

    @property
    def state(self) -> Tensor:
        """Which draws come next; may be set back, to draw them again."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def next_seed(self) -> int:
        """A seed for who draws elsewhere; another one each time."""
        return int(torch.randint(2**31, (), generator=self._generator))

    def __call__(self, logits: Tensor) -> int:
        """A token."""
        return int(logits.argmax()) if self.greedy else self._draw(self._probabilities(logits))

    def settle(self, token: int, proposer: Tensor, logits: Tensor) -> int:
        """The token to write where another model proposed one: that one, or another; distributed as by `logits` alone.

        Speculative sampling (Leviathan et al., arXiv 2211.17192): the proposal is kept with the probability
        min(1, p / q), and else replaced by a draw from what of p exceeds q.

        Args:
            token: drawn from `proposer` by this sampler.
            proposer, logits: [V] each; where models pad their vocabulary to other sizes, the proposer's has its own.
        """
        if self.greedy:
            return self(logits)
        ours, theirs = self._probabilities(logits), self._probabilities(proposer)  # [V] each
        theirs = pad(theirs, (0, len(ours) - len(theirs)))  # [V]; cut, where it is longer
        if torch.rand((), generator=self._generator) * theirs[token] < ours[token]:
            return token
        return self._draw((ours - theirs).clamp(min=0))

    def _probabilities(self, logits: Tensor) -> Tensor:
        no_text = cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long))  # these warpers read none
        warped = self._warpers(no_text, cast(torch.FloatTensor, logits.float().cpu()[None]))  # [1, V]
        return warped.softmax(-1)[0]

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))


GREEDY = Sampling()
