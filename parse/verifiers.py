"""Verifiers: which suffix to append, and how confident to be in each prefix of a draft.

A verifier turns the `Evidence` of one packed pass into K confidences in [0, 1]. `Likelihood` and
`Probe` append no suffix, `Prompt` asks the target a question. What is trained is saved beside a
`verifier.json` that names the base model, the segmenter and the calibrated threshold, and is
refused for another base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.models import encode_text, render

QUESTION = "Is the answer above correct so far, as far as it goes? Reply with one word, yes or no."


@dataclass(frozen=True)
class Evidence:
    """What one packed pass tells about a draft of N tokens and its K prefixes.

    Where the draft ended, its end-of-sequence token counts as token N+1, in the last segment.
    M is N, or N+1 where the draft ended; 0 where the verifier does not read the draft's own tokens.
    """

    ends: Sequence[int]  # K prefix ends; the last one covers token N+1
    log_prob: Tensor  # [M] float32: the target's log-probability of each token, nats
    entropy: Tensor  # [M] float32: of the target's distribution there, nats
    margin: Tensor  # [M] float32: log-probability of the target's first choice less the token's, nats
    states: Tensor | None  # [N, D * layers]: the target's hidden states, where the verifier reads them
    suffix_logits: Tensor | None  # [K, V]: behind each suffix copy, where there is a suffix

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Token range [start, stop) of each segment within 0..M."""
        stops = [*self.ends[:-1], len(self.log_prob)]
        return list(zip([0, *stops[:-1]], stops, strict=True))


_ROWS = 32  # token rows over the vocabulary that are worked on at a time


def token_evidence(before: Tensor, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and margin of the draft's tokens, float32 [M] each; see `Evidence`.

    A few rows at a time, so that there is no second copy of the logits.

    Args:
        before: [V], the target's logits of the first token.
        logits: [N, V], those behind each token; the last row predicts the end of sequence, where M is N+1.
        tokens: int64 [M].
    """
    parts = []
    start = 0
    for chunk in (before[None], *torch.split(logits, _ROWS)):
        chosen = tokens[start : start + len(chunk)]  # [rows]
        rows = chunk[: len(chosen)].float()  # [rows, V]
        start += len(chunk)
        total = rows.logsumexp(-1)  # [rows]
        token = rows.gather(1, chosen[:, None])[:, 0]  # [rows]
        mean = ((rows - total[:, None]).exp() * rows).sum(-1)  # [rows], of the logits
        parts.append(torch.stack([token - total, total - mean, rows.amax(-1) - token]))
    log_prob, entropy, margin = torch.cat(parts, dim=1)  # [3, M]
    return log_prob, entropy, margin


class Verifier(Protocol):
    """What the engine asks of a verifier."""

    kind: str
    suffix_ids: list[int]  # S tokens; empty where the verdict is read from the draft itself
    reads_draft: bool  # whether it reads the evidence of the draft's own tokens, which takes the target's logits there
    layers: tuple[int, ...]  # indices into the model's `hidden_states` that `Evidence.states` joins
    threshold: float  # confidences at or above it accept

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

    def confidences(self, evidence: Evidence) -> Tensor:
        """The probability that the rule gives for each prefix or segment: float32 [K]."""
        values = []
        for start, stop in evidence.bounds:
            span = evidence.log_prob[0 if self.scope == "prefix" else start : stop]
            values.append(span.mean() if self.rule == "mean" else span.min())
        return torch.stack(values).exp()  # [K]


@dataclass
class Prompt:
    """The paper's verdict: P(yes) / (P(yes) + P(no)) behind a chat turn that asks for it."""

    suffix_ids: list[int]
    yes_ids: list[int]
    no_ids: list[int]
    threshold: float = 0.5
    kind: str = "prompt"
    layers: tuple[int, ...] = ()
    reads_draft: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, threshold: float = 0.5) -> Prompt:
        """Ask in the tokenizer's chat template; its `verdict_question`, if it has one, is the question.

        Raises:
            ValueError: if the tokenizer has no chat template or no single token for yes and no.
        """
        question = tokenizer.init_kwargs.get("verdict_question", QUESTION)
        if not tokenizer.chat_template:
            raise ValueError(
                'verifier="prompt" asks in a chat turn, and the target\'s tokenizer has no chat template: '
                'use "likelihood" or a trained verifier'
            )
        turns = [("user", "prompt"), ("assistant", "DRAFT-ENDS-HERE"), ("user", question)]
        # rendered once, and only what follows the draft is kept
        text = render([{"role": role, "content": content} for role, content in turns], tokenizer)
        suffix = encode_text(text.split("DRAFT-ENDS-HERE")[1], tokenizer)
        yes, no = (_single_tokens(tokenizer, word) for word in ("yes", "no"))
        return cls(suffix, yes, no, threshold)

    def confidences(self, evidence: Evidence) -> Tensor:
        """P(yes) against P(no) behind each suffix copy: float32 [K]."""
        assert evidence.suffix_logits is not None
        logits = evidence.suffix_logits.float()  # [K, V]
        yes, no = logits[:, self.yes_ids].logsumexp(-1), logits[:, self.no_ids].logsumexp(-1)  # [K] each
        return torch.sigmoid(yes - no)


def _single_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    spellings = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    unknown = tokenizer.unk_token_id
    encoded = [encode_text(spelling, tokenizer) for spelling in spellings]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not found:
        raise ValueError(f'verifier="prompt" needs "{word}" as one token, and the tokenizer has none')
    return found


class ProbeHead(nn.Module):
    """Reads every token of a draft and gives the hazard that the answer goes wrong there.

    The confidence of prefix k is the chance to have survived every token up to its end,
    exp(-sum softplus(hazard)): a discrete-time survival model, so confidences never rise.
    """

    EVIDENCE = 4  # log-probability, entropy, margin, and whether it is the end-of-sequence token

    def __init__(self, width: int, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(
            nn.Linear(width + self.EVIDENCE, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        nn.init.constant_(cast(nn.Linear, self.body[-1]).bias, -5.0)  # most tokens are right

    def forward(self, states: Tensor, evidence: Tensor) -> Tensor:
        """States [..., M, width] and evidence [..., M, 4] to hazards [..., M]."""
        joined = torch.cat([self.norm(states.float()), evidence], dim=-1)  # [..., M, width + 4]
        return self.body(joined).squeeze(-1)  # type: ignore[no-any-return]


def probe_inputs(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The probe's inputs: states [M, width] and evidence [M, 4], both float32.

    The end-of-sequence token was never read, so it borrows the state that predicted it.
    """
    assert evidence.states is not None
    states = evidence.states.float()  # [N, width]
    missing = len(evidence.log_prob) - len(states)  # 1 where the draft ended
    states = torch.cat([states, states[len(states) - 1 :].expand(missing, -1)])  # [M, width]
    is_end = torch.zeros_like(evidence.log_prob)
    is_end[len(evidence.log_prob) - missing :] = 1
    columns = [evidence.log_prob, evidence.entropy, evidence.margin, is_end]
    return states, torch.stack(columns, dim=-1)


@dataclass
class Probe:
    """A trained head on the target's states at the draft's own tokens; needs no suffix and no mask."""

    head: ProbeHead
    layers: tuple[int, ...]
    threshold: float = 0.5
    kind: str = "probe"
    suffix_ids: list[int] = field(default_factory=list)
    reads_draft: bool = True

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        hazards = nn.functional.softplus(self.head(*probe_inputs(evidence)))  # [M]
        stops = torch.tensor([stop - 1 for _, stop in evidence.bounds], device=hazards.device)  # [K]
        return torch.exp(-hazards.cumsum(0)[stops])  # [K]


def save(folder: Path, verifier: Verifier, target: PreTrainedModel, facts: dict[str, Any]) -> None:
    """Write `verifier.json`, and the head where there is one.

    Args:
        facts: what else to record: segmenter, tokenizer hash, calibration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": verifier.kind,
        "base": fingerprint(target),
        "base_name": target.config.name_or_path,
        "layers": list(verifier.layers),
        "suffix_ids": verifier.suffix_ids,
        "threshold": verifier.threshold,
        **facts,
    }
    if isinstance(verifier, Likelihood):
        record |= {"rule": verifier.rule, "scope": verifier.scope}
    if isinstance(verifier, Probe):
        width = verifier.head.norm.normalized_shape[0]
        record |= {"width": width, "hidden": verifier.head.body[0].out_features}
        tensors = {name: value.contiguous() for name, value in verifier.head.state_dict().items()}
        save_file(tensors, folder / "head.safetensors")
    (folder / "verifier.json").write_text(json.dumps(record, indent=2) + "\n")


def load(
    name: str | Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Verifier, dict[str, Any]]:
    """Load a saved verifier, or make an untrained one: "prompt" or "likelihood".

    Returns:
        the verifier and its record (empty for untrained kinds).

    Raises:
        FileNotFoundError: if the folder holds no `verifier.json`.
        ValueError: if the verifier was made for another target or another tokenizer.
    """
    if name == "prompt":
        return Prompt.of(tokenizer), {}
    if name == "likelihood":
        return Likelihood(), {}
    path = Path(name) / "verifier.json"
    if not path.is_file():
        raise FileNotFoundError(
            f'verifier={str(name)!r}: no such verifier; use "prompt", "likelihood", or a folder that holds '
            "verifier.json (the `verifier` stage of `python -m train` writes one)"
        )
    record = json.loads(path.read_text())
    if record["base"] != fingerprint(target):
        raise ValueError(
            f"the verifier in {path.parent} was trained on {record['base_name']!r} (weights {record['base'][:12]}), "
            f"and the target is {target.config.name_or_path!r} (weights {fingerprint(target)[:12]}): "
            "train a verifier for this target or load that one"
        )
    if record["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the verifier in {path.parent} was trained with another tokenizer or chat template "
            f"({record['tokenizer'][:12]}, the target's is {tokenizer_hash(tokenizer)[:12]}): train it again"
        )
    threshold = float(record["threshold"])
    if record["kind"] == "prompt":
        return Prompt.of(tokenizer, threshold), record
    if record["kind"] == "likelihood":
        return Likelihood(record["rule"], record["scope"], threshold), record
    head = ProbeHead(record["width"], record["hidden"])
    head.load_state_dict(load_file(path.parent / "head.safetensors"))
    return Probe(head.to(target.device).eval(), tuple(record["layers"]), threshold), record


def fingerprint(model: PreTrainedModel) -> str:
    """The identity of a model's weights, whatever the path and the floating-point type: hex sha256.

    Hashes names, shapes and the first eight values of each parameter, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:8].to(torch.bfloat16).float().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {values}".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The identity of a vocabulary and its chat template: hex sha256."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
