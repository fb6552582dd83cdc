"""A trained verifier without a suffix: a head on the target's states at the draft's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parse.verifiers.base import Calibration, Evidence, Needs
from parse.verifiers.heads import AttentiveHead, HazardHead, survival, text_inputs, token_inputs


@dataclass
class Probe:
    """A trained head on the target's states at the draft's own tokens; needs no suffix and no mask.

    One with attention reads the states of what stands before the draft as well.
    """

    head: HazardHead | AttentiveHead
    layers: tuple[int, ...]
    threshold: float = 0.5
    kind: str = "probe"
    calibration: Calibration | None = None

    @property
    def attends(self) -> bool:
        """Whether the head attends to what stands before the draft."""
        return isinstance(self.head, AttentiveHead)

    @property
    def needs(self) -> Needs:
        """The free evidence and the states of the draft's tokens; with attention, of what stands before them too."""
        return Needs(token_logprobs=True, layers=self.layers, context_states=self.attends)

    def hazards(self, evidence: Evidence) -> Tensor:
        """The hazard of each segment, the sum over its tokens: float32 [K]."""
        evidence = evidence.of_layers(self.layers)
        inputs = text_inputs([evidence]) if self.attends else token_inputs(evidence)
        tokens = self.head(*inputs)  # [M]
        return torch.stack([tokens[start:stop].sum() for start, stop in evidence.bounds])

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        return survival(self.hazards(evidence))
