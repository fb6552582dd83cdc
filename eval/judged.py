"""How well a verifier judges: the target's evidence on labelled drafts, and the figures drawn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import roc_auc_score

from parse import Engine
from parse.answer import accept
from parse.verifiers import Evidence, Likelihood, Prompt, Verifier


@dataclass(frozen=True)
class Judged:
    """One draft answer: what the pass told about it, and which of its K prefixes are valid."""

    evidence: Evidence
    valid: list[bool]  # K
    target_right: bool = True  # whether the target's own answer is right, so that something can be lost


def examine(engine: Engine, prompt_ids: list[int], draft_ids: list[int], ends: list[int], ended: bool) -> Evidence:
    """The evidence of one packed pass over a draft of N tokens with K prefix ends."""
    context = engine.context("target")
    context.read(prompt_ids)
    return engine.examine(context, draft_ids, ends, ended)[0]


def reader(engine: Engine, layers: tuple[int, ...]) -> Verifier:
    """A verifier that makes the pass yield states and, where the target can be asked, verdicts."""
    if engine.tokenizer.chat_template:
        return dataclasses.replace(Prompt.of(engine.tokenizer), layers=layers, reads_draft=True)
    return dataclasses.replace(Likelihood(), layers=layers)


def untrained_kinds(engine: Engine) -> dict[str, Verifier]:
    """Every kind that needs no training, by its name in reports."""
    kinds: dict[str, Verifier] = {
        f"likelihood {rule} {scope}": Likelihood(rule, scope)
        for rule in ("mean", "lowest")
        for scope in ("segment", "prefix")
    }
    if engine.tokenizer.chat_template:
        kinds["prompt"] = Prompt.of(engine.tokenizer)
    return kinds


def measure_kind(kind: Verifier, judged: Sequence[Judged], threshold: float, policy: str) -> dict[str, float]:
    """A verifier's figures over the cuts up to and including each draft's first invalid one."""
    scores, labels = [], []
    accepted = oracle = total = lost = 0
    for item in judged:
        confidences = kind.confidences(item.evidence).tolist()
        known = known_cuts(item.valid)
        scores += confidences[:known]
        labels += item.valid[:known]
        ends = [0, *item.evidence.ends]
        k = accept(confidences, threshold, policy)
        lost += item.target_right and k > 0 and not item.valid[k - 1]
        accepted += ends[k]
        oracle += ends[sum(item.valid)]
        total += ends[-1]
    pairs = list(zip(scores, labels, strict=True))
    invalid = [score for score, ok in pairs if not ok]
    valid = [score for score, ok in pairs if ok]
    return {
        "auc": roc_auc_score(labels, scores) if invalid and valid else float("nan"),
        "threshold": threshold,
        "false_accept_rate": sum(s >= threshold for s in invalid) / max(len(invalid), 1),
        "false_reject_rate": sum(s < threshold for s in valid) / max(len(valid), 1),
        "accepted_fraction": accepted / max(total, 1),
        "oracle_accepted_fraction": oracle / max(total, 1),
        "accuracy_loss": lost / max(len(judged), 1),
    }


def known_cuts(valid: Sequence[bool]) -> int:
    """Cuts up to and including the first invalid one."""
    return min(sum(valid) + 1, len(valid))
