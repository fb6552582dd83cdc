"""What a verifier is: what it needs of the target's pass over a draft, and what it makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Labels = tuple[tuple[int, ...], tuple[int, ...]]  # tokens that say yes, and those that say no


@dataclass(frozen=True)
class Needs:
    """What a verifier needs of the target's pass over a draft."""

    token_logprobs: bool = False  # log-probability, entropy and margin of the draft's own tokens
    layers: tuple[int, ...] = ()  # hidden states of the draft's tokens, by index; 0 is the embedding
    context_states: bool = False  # these states of all that stands before the draft as well
    suffix_ids: tuple[int, ...] = ()  # S tokens that follow each prefix
    labels: Labels | None = None  # of these the score after each suffix, or after each prefix itself
    rows: tuple[int, ...] = ()  # tokens after the vocabulary whose rises are told, and the margins of the draft's own
    adapter: Any = (
        None  # a PEFT model, the target under a LoRA that acts on the suffixes: their states are read instead
    )
    draft_logits: Tensor | None = None  # [M, V], those that the draft's tokens were drawn from, to be compared
    draft_end_ids: frozenset[int] = frozenset()  # the tokens that end a text for the draft

    @property
    def parts(self) -> frozenset[str]:
        """Which of `PROVIDED` they are."""
        return frozenset(
            name
            for name, needed in {
                "token_logprobs": self.token_logprobs or self.draft_logits is not None,
                "states": bool(self.layers),
                "label_scores": self.labels is not None,
                "rises": bool(self.rows),
                "adapter": self.adapter is not None,
            }.items()
            if needed
        )


PROVIDED = frozenset({"token_logprobs", "states", "label_scores", "rises", "adapter"})  # what models may provide


@dataclass(frozen=True)
class Evidence:
    """What one packed pass tells about a draft of N tokens and its K prefixes.

    Where the draft ended, that counts as token N+1, in the last segment: the event that the text ends, by any of the
    target's end-of-sequence tokens. M is N, or N+1 where the draft ended; 0 where the verifier does not read the
    draft's own tokens.
    """

    ends: Sequence[int]  # K prefix ends; the last one covers token N+1
    log_prob: Tensor  # [M] float32: the target's log-probability of each token, nats
    entropy: Tensor  # [M] float32: of the target's distribution there, nats
    margin: Tensor  # [M] float32: log-probability of the target's first choice less the token's, nats
    states: Tensor | None = None  # [N, D * layers]: the target's hidden states, where the verifier reads them
    label_scores: Tensor | None = None  # [K] float32 in [0, 1]: P(yes) / (P(yes) + P(no)), where it asks for labels
    suffix_states: Tensor | None = None  # [K, D]: the target's last hidden states there, where the verifier adapts it
    top: Tensor | None = None  # [N] float32: the target's highest logit after each token, beside the log-probabilities
    rises: Tensor | None = None  # [N, R] float32: of rows that were folded into it, see `parse.verifiers.folded`
    divergence: Tensor | None = None  # [M] float32: of the draft's distribution from the target's, where it is at hand
    context_states: Tensor | None = (
        None  # [C, D * layers]: of the C tokens before the draft, where the verifier reads them
    )
    layers: tuple[int, ...] = ()  # which these states are of

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Token range [start, stop) of each segment within 0..M."""
        stops = [*self.ends[:-1], len(self.log_prob)]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def of_layers(self, layers: tuple[int, ...]) -> Evidence:
        """The same with the states of some of its layers alone, as views where those are neighbours."""
        if layers == self.layers:
            return self
        places = [self.layers.index(layer) for layer in layers]

        def some(states: Tensor | None) -> Tensor | None:
            """[n, D * all layers] to [n, D * layers]."""
            if states is None:
                return None
            width = states.shape[-1] // len(self.layers)
            first, last = places[0], places[-1] + 1
            if places == list(range(first, last)):
                return states[:, first * width : last * width]
            return torch.cat([states[:, place * width : (place + 1) * width] for place in places], dim=-1)

        return replace(self, states=some(self.states), context_states=some(self.context_states), layers=layers)


@dataclass(frozen=True)
class Calibration:
    """What a verifier's thresholds were calibrated for: they keep their promise there alone."""

    thresholds: dict[str, float]  # by acceptance policy
    handback: str
    horizon: int | str | None
    segments: str | int

    def threshold(self, policy: str, handback: str, horizon: int | str | None, segments: str | int) -> float:
        """The threshold for these settings of the engine, and its segmenter.

        Raises:
            ValueError: where it was calibrated for others.
        """
        # "whole" lets the target write to the end whatever the handback
        asked: dict[str, Any] = {} if policy == "whole" else {"handback": handback}
        asked |= {"horizon": horizon, "segments": segments}
        if wrong := [name for name, value in asked.items() if getattr(self, name) != value]:
            given = " and ".join(f"{name}={asked[name]!r}" for name in wrong)
            known = " and ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ValueError(
                f"{given}, and the verifier's threshold was calibrated for {known}: use that, calibrate it for yours "
                "(set it in the recipe and run the stage `verifier`), or give a threshold of your "
                "own, which promises nothing"
            )
        return self.thresholds[policy]


class Verifier(Protocol):
    """How confident to be in each prefix of a draft."""

    kind: str
    threshold: float  # confidences at or above it accept
    calibration: Calibration | None  # of its thresholds, where it was saved with one

    @property
    def needs(self) -> Needs:
        """What it needs of the target's pass."""
        ...

    def confidences(self, evidence: Evidence) -> Tensor:
        """Confidence that each prefix is right: float32 [K] in [0, 1]."""
        ...


def label_scores(logits: Tensor, labels: Labels) -> Tensor:
    """P(yes) / (P(yes) + P(no)) by logits [..., V], each of any of its tokens: float32 [...]."""
    yes, no = (logits[..., list(ids)].float().logsumexp(-1) for ids in labels)  # [...] each
    return torch.sigmoid(yes - no)
