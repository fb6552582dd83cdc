"""Verifiers: which suffix to append, and how confident to be in each prefix of a draft.

A verifier turns the `Evidence` of one packed pass into K confidences in [0, 1]. Those that need no training are here:
`Likelihood` appends no suffix, `Prompt` asks the target a question. Those that are trained are in `parse.trained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parse.prompts import turn_after_answer
from parse.text import encode_text

QUESTION = "Is the answer above correct so far, as far as it goes? Reply with one word, yes or no."


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
    states: Tensor | None  # [N, D * layers]: the target's hidden states, where the verifier reads them
    suffix_logits: Tensor | None  # [K, V]: behind each suffix copy, where there is a suffix
    suffix_states: Tensor | None = None  # [K, D]: the target's last hidden states there, where the verifier adapts it
    divergence: Tensor | None = None  # [M] float32: of the draft's distribution from the target's, where it is at hand
    context_states: Tensor | None = (
        None  # [C, D * layers]: of the C tokens before the draft, where the verifier reads them
    )

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Token range [start, stop) of each segment within 0..M."""
        stops = [*self.ends[:-1], len(self.log_prob)]
        return list(zip([0, *stops[:-1]], stops, strict=True))


_LOGITS = 2**20  # numbers that are worked on at a time, whole rows over the vocabulary


def token_evidence(
    before: Tensor, logits: Tensor, tokens: Tensor, end_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and margin of the draft's tokens, float32 [M] each; see `Evidence`.

    A few rows at a time, so that there is no second copy of the logits.

    Args:
        before: [V], the target's logits of the first token.
        logits: [N, V], those behind each token.
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


@dataclass(frozen=True)
class Calibration:
    """What a verifier's thresholds were calibrated for: they keep their promise there alone."""

    thresholds: dict[str, float]  # by acceptance policy
    handback: str
    horizon: int | str | None
    segments: str | int

    def threshold(self, policy: str, handback: str, horizon: int | str | None) -> float:
        """The threshold for these settings of the engine.

        Raises:
            ValueError: where it was calibrated for others.
        """
        # "whole" lets the target write to the end whatever the handback
        asked = {"horizon": horizon} if policy == "whole" else {"handback": handback, "horizon": horizon}
        if wrong := [name for name, value in asked.items() if getattr(self, name) != value]:
            given = " and ".join(f"{name}={asked[name]!r}" for name in wrong)
            known = " and ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ValueError(
                f"{given}, and the verifier's threshold was calibrated for {known}: use that, calibrate it for yours "
                "(set it in the recipe's section `engine` and run the stage `verifier`), or give a threshold of your "
                "own, which promises nothing"
            )
        return self.thresholds[policy]


class Verifier(Protocol):
    """What the engine asks of a verifier."""

    kind: str
    suffix_ids: list[int]  # S tokens; empty where the verdict is read from the draft itself
    reads_draft: bool  # whether it reads the evidence of the draft's own tokens, which takes the target's logits there
    layers: tuple[int, ...]  # indices into the model's `hidden_states` that `Evidence.states` joins
    threshold: float  # confidences at or above it accept
    calibration: Calibration | None  # of its thresholds, where it was saved with one

    @property
    def reads_context(self) -> bool:
        """Whether it reads these states of all that stands before the draft as well."""
        ...

    @property
    def adapted(self) -> PeftModel | None:
        """The target under a LoRA that acts on the suffixes alone, where the verifier has one."""
        ...

    def confidences(self, evidence: Evidence) -> Tensor:
        """Confidence that each prefix is right: float32 [K] in [0, 1]."""
        ...


@dataclass
class Likelihood:
    """Free baseline: the target's mean or lowest token probability, in the segment or so far."""

    rule: str = "lowest"  # "mean" or "lowest"
    scope: str = "prefix"  # "segment" or "prefix"
    threshold: float = 0.1
    kind: str = "likelihood"
    suffix_ids: list[int] = field(default_factory=list)
    reads_draft: bool = True
    layers: tuple[int, ...] = ()
    reads_context: bool = False
    adapted: None = None
    calibration: Calibration | None = None

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


@dataclass
class Prompt:
    """The paper's verdict: P(yes) / (P(yes) + P(no)) behind a chat turn that asks for it."""

    suffix_ids: list[int]
    yes_ids: list[int]
    no_ids: list[int]
    threshold: float = 0.5
    kind: str = "prompt"
    layers: tuple[int, ...] = ()
    reads_context: bool = False
    reads_draft: bool = False
    adapted: None = None
    calibration: Calibration | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, threshold: float = 0.5) -> Prompt:
        """Ask in the tokenizer's chat template; its `verdict_question`, if it has one, is the question.

        Raises:
            ValueError: if the tokenizer has no chat template, one without room for the question, or no single token for
                yes and no.
        """
        question = tokenizer.init_kwargs.get("verdict_question", QUESTION)
        if not tokenizer.chat_template:
            raise ValueError(
                'verifier="prompt" asks in a chat turn, and the target\'s tokenizer has no chat template: '
                'use "likelihood" or a trained verifier'
            )
        suffix = encode_text(turn_after_answer(question, tokenizer), tokenizer)
        yes, no = (_single_tokens(tokenizer, word) for word in ("yes", "no"))
        return cls(suffix, yes, no, threshold)

    @classmethod
    def if_possible(cls, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
        """The same; None where the tokenizer does not allow it."""
        try:
            return cls.of(tokenizer)
        except ValueError:
            return None

    def confidences(self, evidence: Evidence) -> Tensor:
        """P(yes) against P(no) behind each suffix copy: float32 [K]."""
        assert evidence.suffix_logits is not None
        return self.weigh(evidence.suffix_logits)

    def weigh(self, logits: Tensor) -> Tensor:
        """P(yes) against P(no) of logits [..., V]: float32 [...]."""
        yes, no = (logits[..., ids].float().logsumexp(-1) for ids in (self.yes_ids, self.no_ids))  # [...] each
        return torch.sigmoid(yes - no)


def _single_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    spellings = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    unknown = tokenizer.unk_token_id
    encoded = [encode_text(spelling, tokenizer) for spelling in spellings]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not found:
        raise ValueError(f'verifier="prompt" needs "{word}" as one token, and the tokenizer has none')
    return found
