"""A trained verifier that a stock server can give: a linear probe that two more rows of the LM head hold.

With the rows +w/2 and -w/2 the target says, in place of a next token, that the text is right so far or that it is not:
P(right) / (P(right) + P(wrong)) = sigmoid(w . h), where h is the last hidden state as the head reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parse.verifiers.base import Calibration, Evidence, Needs
from parse.verifiers.heads import LinearHead, survival


@dataclass
class Folded:
    """A linear head on the target's last hidden state, at the last token of each segment."""

    head: LinearHead
    layer: int  # the last hidden state's index
    labels: tuple[int, int]  # the tokens whose rows hold the head where it is folded into the target
    served: bool = False  # the target has these rows, and is asked for their scores
    threshold: float = 0.5
    kind: str = "folded"
    calibration: Calibration | None = None

    @property
    def needs(self) -> Needs:
        """The last states of the draft's tokens; of a target with the rows, their scores."""
        if self.served:
            right, wrong = self.labels
            return Needs(labels=((right,), (wrong,)))
        return Needs(layers=(self.layer,))

    def hazards(self, evidence: Evidence) -> Tensor:
        """The hazard of each segment: float32 [K]."""
        if self.served:
            assert evidence.label_scores is not None
            score = evidence.label_scores.double().clamp(1e-9, 1 - 1e-9)  # [K]
            return torch.nn.functional.softplus(-(score.logit() + self.head.bias)).float()
        hazards: Tensor = self.head(last_states(evidence.of_layers((self.layer,))))  # [K]
        return hazards

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        return survival(self.hazards(evidence))


def last_states(evidence: Evidence) -> Tensor:
    """The state of the last token of each prefix, [K, D]."""
    assert evidence.states is not None
    return evidence.states[[end - 1 for end in evidence.ends]]
