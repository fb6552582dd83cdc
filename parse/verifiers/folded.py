"""A trained verifier that a stock server can give: a small head over what a few more rows of the LM head would say.

A server shows no hidden states, but it tells which next tokens are the likeliest after each token of a text. So each
row w of the head stands for a token that nobody writes, and what counts is its rise: by how much its logit w . h is
above those of all real tokens, and 0 where it is not. A row that rises is among the likeliest, and told; one that does
not need not be. One request tells the rises after all of a draft's tokens, and a small head says, by the rises and the
token's own margin, how likely it is that the answer goes wrong there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parse.verifiers.base import Calibration, Evidence, Needs
from parse.verifiers.heads import RiseHead, survival


@dataclass
class Folded:
    """A head on the rises of R rows over the target's real tokens, after each token of the draft."""

    head: RiseHead
    layer: int  # the last hidden state's index
    labels: tuple[int, ...]  # R tokens after the vocabulary, whose rows hold the head's where it is folded in
    served: bool = False  # the target has these rows, and tells their rises
    threshold: float = 0.5
    kind: str = "folded"
    calibration: Calibration | None = None

    @property
    def needs(self) -> Needs:
        """The last states and the free evidence of the draft's tokens; of a target with the rows, their rises."""
        if self.served:
            return Needs(rows=self.labels)
        return Needs(token_logprobs=True, layers=(self.layer,))

    def hazards(self, evidence: Evidence) -> Tensor:
        """The hazard of each segment, the sum over its tokens: float32 [K]."""
        rises = evidence.rises  # [N, R]
        if not self.served:
            evidence = evidence.of_layers((self.layer,))
            assert evidence.states is not None
            assert evidence.top is not None
            rises = self.head.rises(evidence.states, evidence.top)
        assert rises is not None
        tokens = self.head(*rise_inputs(rises, evidence))  # [M]
        return torch.stack([tokens[start:stop].sum() for start, stop in evidence.bounds])

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        return survival(self.hazards(evidence))


def rise_inputs(rises: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The head's inputs from rises [N, R]: rises [M, R], and margin and whether it is the end, float32 [M, 2].

    The end-of-sequence token was never read, so it borrows the rises after the last token.
    """
    margin = evidence.margin.float()  # [M]
    missing = len(margin) - len(rises)  # 1 where the draft ended
    is_end = torch.zeros_like(margin)
    is_end[len(rises) :] = 1
    rises = torch.cat([rises, rises[len(rises) - 1 :].expand(missing, -1)])  # [M, R]
    return rises, torch.stack([margin, is_end], dim=-1)
