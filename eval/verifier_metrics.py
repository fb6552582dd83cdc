"""How well verifiers judge: labelled drafts, the evidence of the packed pass over them, and the figures drawn from it.

A confidence counts up to and including a draft's first invalid cut, which is how "first_fail" uses it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any, cast

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from parse import Engine
from parse.generation import accept
from parse.local.model import LocalModel
from parse.sampling import Written
from parse.scheduler import run, run_together
from parse.verifiers import Divergence, Evidence, Likelihood, Needs, PromptVerifier, Verifier

AT_ONCE = 16  # drafts in a pass
BINS = 10  # of the reliability curve
POINTS = 60  # of the other curves, at most


@dataclass(frozen=True)
class Draft:
    """A draft of N tokens, where it may be cut, and which of its K prefixes are valid."""

    context_ids: list[int]  # the prompt and what of the answer stood before the draft
    ids: list[int]  # N
    ends: list[int]  # K
    ended: bool
    valid: list[bool]  # K
    target_right: bool = True  # from where the draft began or a valid prefix of it, so that something can be lost
    number: int = 0  # of the prompt
    round: int = 0  # above 0 after the target's repair of an earlier draft of the prompt
    met: bool = True  # in the engine; False for those of disturbed copies, or with a fault put in, to learn from


@dataclass(frozen=True)
class Example:
    """A draft and what the packed pass told about it."""

    draft: Draft
    evidence: Evidence


@dataclass(frozen=True)
class Scored:
    """A draft and a verifier's confidence in each prefix."""

    draft: Draft
    confidences: list[float]  # K


def examine(
    engine: Engine,
    drafts: Sequence[Draft],
    needs: Needs,
    with_draft: bool = False,
    then: Callable[[Example], Example] = lambda one: one,
) -> Iterator[Example]:
    """A packed pass over each draft, several drafts at a time; in the order in which they finish.

    What stands before several drafts is read once.

    Args:
        needs: what the passes give.
        with_draft: compare the draft model's distributions too, where it has the target's vocabulary.
        then: is called right after each pass; what it leaves out of the evidence takes no memory meanwhile.
    """
    models = {  # the engine's own stay small
        role: model.with_own_cache(compiled=False)
        for role, model in engine.models.items()
        if isinstance(model, LocalModel)
    }

    async def examples(some: Sequence[Draft]) -> list[Example]:
        target = models["target"].open(some[0].context_ids, needs.layers if needs.context_states else ())
        try:
            found = []
            for draft in some:
                wanted = needs
                if with_draft and _comparable(engine):
                    wanted = replace(
                        needs,
                        draft_logits=await _draft_logits(models["draft"], draft),
                        draft_end_ids=models["draft"].eos_ids,
                    )
                evidence = await target.verify([], Written(draft.ids, draft.ended), draft.ends, wanted)
                found.append(then(Example(draft, evidence)))
            return found
        finally:
            target.close()

    sharing: dict[tuple[int, ...], list[Draft]] = {}  # drafts by what stands before them
    for draft in drafts:
        sharing.setdefault(tuple(draft.context_ids), []).append(draft)
    return (one for _, found in run_together(map(examples, sharing.values()), AT_ONCE) for one in found)


def _comparable(engine: Engine) -> bool:
    return engine.draft is not None and engine.same_tokens


async def _draft_logits(model: LocalModel, draft: Draft) -> Tensor:
    """The draft model's logits of its own tokens and of the end, where it ended: [M, V]."""
    logits = await model.logits([*draft.context_ids, *draft.ids], first=len(draft.context_ids) - 1)  # [N + 1, V]
    return logits[: len(draft.ids) + draft.ended]


def all_needs(engine: Engine, layers: tuple[int, ...] = (), context_states: bool = False, asking: bool = True) -> Needs:
    """What every kind but the adapter needs, in one pass.

    The draft's own positions cannot see the suffixes, so the `prompt` kind's do not touch what the others read.

    Args:
        asking: for the `prompt` kind too, whose suffixes are most of such a pass.
    """
    prompt = PromptVerifier.if_possible(engine.tokenizer) if asking else None
    needs = prompt.needs if prompt else Needs()
    return replace(needs, token_logprobs=True, layers=layers, context_states=context_states)


def untrained_kinds(engine: Engine, asking: bool = True) -> dict[str, Verifier]:
    """Every kind that needs no training, by its name in reports; `prompt` only if `asking`, where it is possible."""
    kinds: dict[str, Verifier] = {}
    for free in (Likelihood, Divergence) if _comparable(engine) else (Likelihood,):
        for rule, scope in itertools.product(("mean", "lowest"), ("segment", "prefix")):
            kinds[f"{free.kind} {rule} {scope}"] = free(rule, scope)
    if asking and (prompt := PromptVerifier.if_possible(engine.tokenizer)):
        kinds["prompt"] = prompt
    return kinds


def score(kind: Verifier, examples: Iterable[Example]) -> list[Scored]:
    """A verifier's confidences in drafts whose evidence holds what it reads."""
    return [Scored(one.draft, kind.confidences(one.evidence).tolist()) for one in examples]


def valid_cuts(valid: Sequence[bool]) -> int:
    """Cuts before the first invalid one; what is valid again after it does not count."""
    return next((k for k, ok in enumerate(valid) if not ok), len(valid))


def known_cuts(valid: Sequence[bool]) -> int:
    """Cuts up to and including the first invalid one."""
    return min(valid_cuts(valid) + 1, len(valid))


def judgements(scored: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and validity of every known cut: float and bool [n].

    Drafts with which nothing can be lost, as the target errs there too, are left out.
    """
    pairs = [
        pair
        for one in scored
        if one.draft.target_right
        for pair in list(zip(one.confidences, one.draft.valid, strict=True))[: known_cuts(one.draft.valid)]
    ]
    return np.array([confidence for confidence, _ in pairs]), np.array([valid for _, valid in pairs], dtype=bool)


def keeps(one: Scored, threshold: float, policy: str = "first_fail") -> int:
    """How many cuts of a draft are kept."""
    return accept(one.confidences, threshold, policy)


def loses(draft: Draft, kept: int) -> bool:
    """Whether keeping so many cuts of the draft makes an answer wrong that the target would have got right."""
    return draft.target_right and kept > 0 and not draft.valid[kept - 1]


def accuracy_loss(scored: Sequence[Scored], threshold: float, policy: str = "first_fail") -> float:
    """The share of prompts of which any draft is kept up to an invalid cut."""
    lost = {one.draft.number for one in scored if loses(one.draft, keeps(one, threshold, policy))}
    return len(lost) / len({one.draft.number for one in scored})


def measure(scored: Sequence[Scored], threshold: float, policy: str = "first_fail") -> dict[str, float]:
    """A verifier's figures at a threshold.

    Drafts that go wrong where the target errs too count in the accepted fractions alone: nothing is lost with them.

    Returns:
        `auc`; `false_accept_rate` of the invalid and `false_reject_rate` of the valid cuts; `first_error_f1`, the
        harmonic mean of how often the first invalid cut of a wrong draft is found and how often none is found in a
        right one (ProcessBench's, arXiv 2412.06559); `accepted_fraction` of the drafts' tokens and
        `oracle_accepted_fraction`, that of who knows the labels; `accuracy_loss`; `ece`, the expected calibration error
        of the confidences as probabilities; `mean_confidence` of all cuts that the policy looks at; `accepted_error`
        and `confidence_error`, the standard errors of those two means by prompts. Not a number where there is nothing
        to measure.
    """
    confidences, valid = judgements(scored)
    kept = [[0, *one.draft.ends][keeps(one, threshold, policy)] for one in scored]
    sizes, numbers = [one.draft.ends[-1] for one in scored], [one.draft.number for one in scored]
    stated = [one.confidences[-1:] if policy == "whole" else one.confidences for one in scored]  # as a server sees them
    oracle = 0
    found: dict[bool, list[bool]] = {True: [], False: []}  # by whether the draft is wrong
    for one in scored:
        ends, labels = [0, *one.draft.ends], one.draft.valid
        if one.draft.target_right:
            found[not all(labels)].append(accept(one.confidences, threshold) == valid_cuts(labels))
        oracle += ends[valid_cuts(labels)]
    located, spared = _mean(found[True]), _mean(found[False])
    return {
        "auc": float(roc_auc_score(valid, confidences)) if 0 < valid.sum() < len(valid) else float("nan"),
        "threshold": threshold,
        "false_accept_rate": _mean(confidences[~valid] >= threshold),
        "false_reject_rate": _mean(confidences[valid] < threshold),
        "first_error_f1": 2 * located * spared / (located + spared) if located + spared else 0.0,
        "accepted_fraction": sum(kept) / sum(sizes),
        "oracle_accepted_fraction": oracle / sum(sizes),
        "accuracy_loss": accuracy_loss(scored, threshold, policy),
        "ece": _calibration_error(confidences, valid),
        "accepted_error": _ratio_error(numbers, kept, sizes),
        "mean_confidence": sum(map(sum, stated)) / max(sum(map(len, stated)), 1),
        "confidence_error": _ratio_error(numbers, list(map(sum, stated)), list(map(len, stated))),
    }


def _ratio_error(numbers: Sequence[int], parts: Sequence[float], wholes: Sequence[float]) -> float:
    """The standard error of the sum of parts over that of their wholes, by a ratio estimate's residuals.

    Cochran, Sampling Techniques (1977), section 6.4, without the correction for a finite population.

    Args:
        numbers: of the prompts, whose drafts are sampled together.
    """
    _, prompts = np.unique(numbers, return_inverse=True)  # [drafts]
    part, whole = (np.bincount(prompts, np.asarray(each, dtype=float)) for each in (parts, wholes))  # [n] each
    if len(part) < 2 or not whole.sum():
        return float("nan")
    residuals = part - part.sum() / whole.sum() * whole  # [n]
    return float(np.sqrt((residuals**2).sum() * len(part) / (len(part) - 1)) / whole.sum())


def _calibration_error(confidences: np.ndarray, valid: np.ndarray) -> float:
    if not len(valid):
        return float("nan")
    return sum(share * abs(stated - true) for share, stated, true in reliability(confidences, valid))


def reliability(confidences: np.ndarray, valid: np.ndarray) -> list[tuple[float, float, float]]:
    """For each bin of confidence that holds any of the n cuts: their share, mean confidence and share of valid ones."""
    true, stated = calibration_curve(valid, confidences, n_bins=BINS)  # [bins that hold any] each
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidences)  # [n], as scikit-learn has them
    shares = np.unique(bins, return_counts=True)[1] / len(bins)  # [bins that hold any]
    return list(zip(shares.tolist(), stated.tolist(), true.tolist(), strict=True))


def curves(scored: Sequence[Scored], policy: str = "first_fail") -> dict[str, list[list[float]]]:
    """What a verifier could do at other thresholds, as points.

    Returns:
        `roc`, invalid against valid cuts accepted; `reliability`, the share of cuts, their stated and their true
        confidence; `use`, a threshold, the accuracy lost there and the share of the drafts' tokens accepted.
    """
    confidences, valid = judgements(scored)
    roc: list[list[float]] = []
    if 0 < valid.sum() < len(valid):
        false, true, _ = roc_curve(valid, confidences)  # [points] each
        roc = np.stack([false, true], axis=1)[_along(false, true)].tolist()
    stated = np.unique([confidence for one in scored for confidence in one.confidences])
    total = sum(one.draft.ends[-1] for one in scored)
    use = []
    for threshold in stated[_spread(len(stated))]:
        kept = sum([0, *one.draft.ends][keeps(one, threshold, policy)] for one in scored)
        use.append([float(threshold), accuracy_loss(scored, threshold, policy), kept / total])
    return {"roc": roc, "reliability": [list(each) for each in reliability(confidences, valid)], "use": use}


def loss_at(use: Sequence[Sequence[float]], threshold: float) -> float:
    """The accuracy lost at a threshold, by the points of `curves`: that of the last one that is not above it."""
    below = [lost for stated, lost, _ in use if stated <= threshold]
    return below[-1] if below else use[0][1]


def _spread(count: int) -> np.ndarray:
    """Indices of at most `POINTS` of so many points, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int))


def _along(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of at most `POINTS` points of a curve, evenly along it, and those before: so its corners stay."""
    way = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])  # [points]
    after = np.searchsorted(way, np.linspace(0, way[-1], POINTS // 2))  # [POINTS / 2]
    return np.unique([after, np.maximum(after - 1, 0)])


def milliseconds_per_cut(engine: Engine, kinds: dict[str, Verifier], drafts: Sequence[Draft]) -> dict[str, float]:
    """The median over drafts of a pass's milliseconds by each kind, the verdicts included, over the draft's cuts.

    The kinds take turns on each draft; the first is a warm-up. What the passes read of the draft itself is included.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for draft in drafts:
        compared = run(_draft_logits(cast(LocalModel, engine.models["draft"]), draft)) if _comparable(engine) else None
        for name, kind in kinds.items():
            needs = replace(kind.needs, draft_logits=compared) if isinstance(kind, Divergence) else kind.needs
            seconds[name].append(run(_seconds_of_verdicts(engine, draft, kind, needs)) / len(draft.ends))
    return {name: 1000 * median(values[1:] or values) for name, values in seconds.items()}


async def _seconds_of_verdicts(engine: Engine, draft: Draft, kind: Verifier, needs: Needs) -> float:
    """What a packed pass takes after a text that was read before, and the verdicts."""
    target = engine.models["target"].open(draft.context_ids, needs.layers if needs.context_states else ())
    try:
        await target.prefill()
        started = perf_counter()
        evidence = await target.verify([], Written(draft.ids, draft.ended), draft.ends, needs)
        kind.confidences(evidence).tolist()
        return perf_counter() - started
    finally:
        target.close()


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
