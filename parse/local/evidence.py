"""What logits tell about the tokens of a draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOGITS = 2**20  # numbers that are worked on at a time, whole rows over the vocabulary


def token_evidence(
    before: Tensor, logits: Tensor, tokens: Tensor, end_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and margin of the draft's tokens, float32 [M] each; see `Evidence`.

    A few rows at a time, so that there is no second copy of the logits.

    Args:
        before: [V], the target's logits of the first token.
        logits: [N, V], those after each token.
        tokens: int64 [N].
        end_ids: where the draft ended, the tokens that end a text: token N+1 is any of them.
    """
    parts: list[Tensor] = []
    start, m = 0, len(tokens) + bool(end_ids)
    for chunk in _by_rows(logits):
        known = chunk if parts else torch.cat([before[None], chunk])  # [rows, V]
        log_probs = known[: m - start].float().log_softmax(-1)  # [rows, V]
        chosen = tokens[start : start + len(log_probs)]  # [rows], or one less where the last row is the end's
        token = log_probs[: len(chosen)].gather(1, chosen[:, None])[:, 0]
        if len(chosen) < len(log_probs):
            token = torch.cat([token, log_probs[-1:, list(end_ids)].logsumexp(-1)])  # [rows]
        start += len(known)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # [rows]
        parts.append(torch.stack([token, entropy, torch.maximum(log_probs.amax(-1), token) - token]))
    log_prob, entropy, margin = torch.cat(parts, dim=1)  # [3, M]
    return log_prob, entropy, margin


def token_divergence(target: Tensor, draft: Tensor, end_ids: Sequence[int] = ()) -> Tensor:
    """KL divergence in nats of the draft's distribution from the target's, from logits [M, V] each: float32 [M].

    Where models pad their vocabulary to other sizes, what both have counts.

    Args:
        end_ids: the tokens that end a text for either model: one outcome, whichever of them each model prefers.
    """
    width = min(target.shape[1], draft.shape[1])
    ends = [token for token in end_ids if token < width]
    parts = []
    for ours, theirs in zip(_by_rows(target[:, :width]), _by_rows(draft[:, :width]), strict=True):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)  # [rows, V] each
        terms = log_q.exp() * (log_q - log_p)  # [rows, V]
        if len(ends) > 1:
            end_p, end_q = log_p[:, ends].logsumexp(-1), log_q[:, ends].logsumexp(-1)  # [rows] each
            terms[:, ends] = 0
            terms[:, ends[0]] = end_q.exp() * (end_q - end_p)
        parts.append(terms.sum(-1))
    return torch.cat(parts)


def _by_rows(logits: Tensor) -> tuple[Tensor, ...]:
    """Logits [M, V], some rows at a time."""
    return torch.split(logits, max(1, _LOGITS // logits.shape[1]))
