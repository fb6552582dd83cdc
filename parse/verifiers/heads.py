"""The trained heads: from the target's states to hazards, that the answer goes wrong, and from these to confidences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from parse.verifiers.base import Evidence

TOKEN_EVIDENCE = 4  # log-probability, entropy, margin, and whether it is the end-of-sequence token
INNER, HEAD_WIDTH = 192, 48  # of a probe's attention: its width, and that of each of its heads
LARGEST = 65504.0  # of float16, in which states are kept to learn from: heads never see larger numbers
RISE_EVIDENCE = 2  # margin, and whether it is the end-of-sequence token
RISE, HIGHEST = 4.0, 40.0  # of a row's rise what counts as one, and as the most
SEGMENT_EVIDENCE = 13  # of the three their lowest, mean and highest so far and in the segment where they tell; the end


class LayerNorms(nn.Module):
    """The states of several layers, each layer's normalised by itself: upper ones are many times larger."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] of any floating-point type to float32 [..., width]."""
        known = states.float().clamp(-LARGEST, LARGEST)  # [..., width]
        parts = known.view(*states.shape[:-1], self.layers, self.width // self.layers)  # [..., layers, D]
        return nn.functional.layer_norm(parts, parts.shape[-1:]).flatten(-2) * self.weight + self.bias


class HazardHead(nn.Module):
    """From a state and free evidence to the hazard that the answer goes wrong there.

    The confidence of a prefix is the chance to have survived every hazard up to its end, exp(-sum softplus(hazard)): a
    discrete-time survival model, so confidences never rise along a draft.
    """

    def __init__(self, width: int, evidence: int, hidden: int = 128, dropout: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        self.norm = LayerNorms(width, layers)
        self.body = nn.Sequential(
            nn.Linear(width + evidence, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.dropout = nn.Dropout(dropout)  # of the states
        nn.init.constant_(cast(nn.Linear, self.body[-1]).bias, -5.0)  # most are right

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make a head of the same shape."""
        first = cast(nn.Linear, self.body[0])
        own = {"evidence": first.in_features - self.norm.width, "hidden": first.out_features}
        return {"width": self.norm.width, "layers": self.norm.layers, **own}

    def forward(self, states: Tensor, evidence: Tensor) -> Tensor:
        """States [..., width] and evidence [..., E] to hazards [...], none of them negative."""
        joined = torch.cat([self.dropout(self.norm(states)), evidence], dim=-1)  # [..., width + E]
        return nn.functional.softplus(self.body(joined).squeeze(-1))


class RiseHead(nn.Module):
    """From the rises of R rows over all real tokens, see `parse.verifiers.folded`, and free evidence to the hazard."""

    def __init__(self, width: int, rows: int, hidden: int = 16) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(rows, width))
        self.body = nn.Sequential(nn.Linear(rows + RISE_EVIDENCE, hidden), nn.GELU(), nn.Linear(hidden, 1))
        nn.init.constant_(cast(nn.Linear, self.body[-1]).bias, -5.0)  # most are right

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make a head of the same shape."""
        return {
            "width": self.rows.shape[1],
            "rows": len(self.rows),
            "hidden": cast(nn.Linear, self.body[0]).out_features,
        }

    def rises(self, states: Tensor, top: Tensor) -> Tensor:
        """By how much each row's logit exceeds the highest real one, 0 where it does not: float32 [N, R].

        Args:
            states: [N, D], the last ones, as the LM head reads them.
            top: [N], the highest logit after each.
        """
        return (states.float() @ self.rows.T - top[:, None]).clamp(min=0)

    def forward(self, rises: Tensor, evidence: Tensor) -> Tensor:
        """Rises [M, R] and evidence [M, 2] to hazards [M], none of them negative."""
        known = rises.clamp(max=HIGHEST) / RISE  # [M, R]
        return nn.functional.softplus(self.body(torch.cat([known, evidence], dim=-1)).squeeze(-1))


class Attention(nn.Module):
    """A pre-normalised block of causal attention and a small network, over the target's states; it needs no positions.

    Those are in the states that it reads.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        b, t, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(b, t, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, 48]
        query, key, value = parts.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, T, 48]
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + cast(Tensor, self.body(self.norms[1](x)))


class AttentiveHead(nn.Module):
    """A `HazardHead` after blocks of attention over what stands before the draft, and the draft.

    So a token is judged beside what it should agree with: the prompt, and what was said before.
    """

    def __init__(
        self,
        width: int,
        evidence: int,
        hidden: int = 128,
        dropout: float = 0.0,
        layers: int = 1,
        blocks: int = 2,
        inner: int = INNER,
    ) -> None:
        super().__init__()
        self.norm, self.into = LayerNorms(width, layers), nn.Linear(width, inner)
        self.blocks = nn.ModuleList(Attention(inner, dropout) for _ in range(blocks))
        self.head = HazardHead(inner, evidence, hidden, dropout)
        self.dropout = nn.Dropout(dropout)  # of the states

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make a head of the same shape."""
        own = {"width": self.norm.width, "layers": self.norm.layers, "blocks": len(self.blocks)}
        return {**self.head.sizes, **own, "inner": self.into.out_features}

    def forward(self, texts: Tensor, places: Tensor, evidence: Tensor) -> Tensor:
        """Hazards [M] of the drafts' tokens, none of them negative.

        Args:
            texts: [B, T, width], the states of each text up to its draft's end, padded after it.
            places: int64 [M, 2], text and index of each draft's tokens.
            evidence: [M, E], theirs.
        """
        x = self.into(self.dropout(self.norm(texts)))  # [B, T, inner]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x[places[:, 0], places[:, 1]], evidence))


def survival(hazards: Tensor) -> Tensor:
    """The chance that nothing went wrong up to each segment's end, from the hazards [K] of the segments."""
    return torch.exp(-hazards.cumsum(0))


def token_inputs(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The probe's inputs: states [M, width] of any floating-point type, and evidence float32 [M, 4].

    The end-of-sequence token was never read, so it borrows the state that predicted it.
    """
    assert evidence.states is not None
    states = evidence.states  # [N, width]
    missing = len(evidence.log_prob) - len(states)  # 1 where the draft ended
    states = torch.cat([states, states[len(states) - 1 :].expand(missing, -1)])  # [M, width]
    is_end = torch.zeros_like(evidence.log_prob)
    is_end[len(evidence.log_prob) - missing :] = 1
    columns = [evidence.log_prob, evidence.entropy, evidence.margin, is_end]
    return states, torch.stack(columns, dim=-1)


def text_inputs(evidences: Sequence[Evidence]) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a probe with attention, of B drafts: texts [B, T, width], places [M, 2] and evidence [M, 4].

    See `AttentiveHead`, and `token_inputs` for the end-of-sequence token.
    """
    rows, places, columns = [], [], []
    for number, evidence in enumerate(evidences):
        assert evidence.context_states is not None
        assert evidence.states is not None
        _, free = token_inputs(evidence)  # [M, 4]
        first, count = len(evidence.context_states), len(evidence.states)
        rows.append(torch.cat([evidence.context_states, evidence.states]))  # [C + N, width]
        index = torch.arange(len(free), device=free.device).clamp(max=count - 1) + first  # [M]
        places.append(torch.stack([torch.full_like(index, number), index], dim=-1))
        columns.append(free)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.cat(places), torch.cat(columns)


def segment_evidence(evidence: Evidence) -> Tensor:
    """Free evidence of each segment and of the draft so far: float32 [K, 13]."""
    rows = []
    for start, stop in evidence.bounds:
        row = [torch.tensor(float(stop > evidence.ends[-1]), device=evidence.log_prob.device)]
        for since in (start, 0):
            log_prob, entropy, margin = (
                part[since:stop] for part in (evidence.log_prob, evidence.entropy, evidence.margin)
            )
            row += [log_prob.min(), log_prob.mean(), entropy.max(), entropy.mean(), margin.max(), margin.mean()]
        rows.append(torch.stack(row))
    return torch.stack(rows)  # [K, 13]
