"""Verifiers for nothing: how likely the target finds the draft's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parse.verifiers.base import Calibration, Evidence, Needs


@dataclass
class Likelihood:
    """Free baseline: the target's mean or lowest token probability, in the segment or so far."""

    rule: str = "lowest"  # "mean" or "lowest"
    scope: str = "prefix"  # "segment" or "prefix"
    threshold: float = 0.1
    kind: str = "likelihood"
    calibration: Calibration | None = None

    @property
    def needs(self) -> Needs:
        """The probabilities of the draft's own tokens."""
        return Needs(token_logprobs=True)

    def confidences(self, evidence: Evidence) -> Tensor:
        """The probability that the rule gives for each prefix or segment: float32 [K]."""
        return self.pool(evidence.log_prob, evidence).exp()

    def pool(self, values: Tensor, evidence: Evidence) -> Tensor:
        """The mean or the lowest of the tokens' values [M], in each segment or up to its end: [K]."""
        starts = [0 if self.scope == "prefix" else start for start, _ in evidence.bounds]
        spans = [values[start:stop] for start, (_, stop) in zip(starts, evidence.bounds, strict=True)]
        return torch.stack([span.mean() if self.rule == "mean" else span.min() for span in spans])


@dataclass
class Divergence(Likelihood):
    """Free baseline: the same rules over how near the draft's distribution is to the target's, minus their divergence.

    After "Revisiting Judge Decoding" (arXiv 2601.04766), for prefixes. It needs the draft's probabilities, which the
    engine does not keep: it is there to compare with.
    """

    kind: str = "divergence"

    def confidences(self, evidence: Evidence) -> Tensor:
        """exp(-KL) by the rule, for each prefix or segment: float32 [K]."""
        assert evidence.divergence is not None
        return self.pool(-evidence.divergence, evidence).exp()
