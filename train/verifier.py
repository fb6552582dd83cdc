"""Stage 5: the verifier, then its threshold.

The head learns from the target's own verdicts on the draft's answers, read through the same packed
pass that the engine runs. The threshold is not guessed: conformal risk control on the calibration
split picks the smallest one that keeps the expected accuracy loss under the recipe's promise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from transformers import AutoTokenizer

from eval.judged import Judged, examine, known_cuts, measure_kind, reader, untrained_kinds
from parse import Engine
from parse.answer import accept
from parse.models import load_model
from parse.verifiers import Probe, ProbeHead, Verifier, probe_inputs, save, tokenizer_hash
from train.recipe import Recipe
from train.run import Run, progress_bar, write_text

NEVER = 1.01  # a threshold that no confidence reaches: accept nothing


def run(recipe: Recipe, run: Run) -> None:
    """Write `verifier/`: the head, verifier.json, report.json."""
    with run.stage("verifier") as folder:
        target, tokenizer = load_model(recipe.target), AutoTokenizer.from_pretrained(recipe.target)
        engine = Engine(target, tokenizer, segments=recipe.segments)
        layers = _layers(recipe.verifier.layers, target.config.num_hidden_layers)
        rollouts = load_from_disk(run.path("rollouts"))
        assert isinstance(rollouts, Dataset)
        judged = {split: gather(engine, rollouts, split, layers) for split in ("train", "calibration")}
        kinds: dict[str, Verifier] = untrained_kinds(engine)
        if recipe.verifier.kind == "probe":
            kinds["probe"] = train_probe(judged["train"], layers, recipe)
        report = {name: _calibrated(kind, judged["calibration"], recipe) for name, kind in kinds.items()}
        name = recipe.verifier.kind if recipe.verifier.kind != "likelihood" else _best_rule(report)
        _explain(name, report, len(judged["calibration"]), recipe.verifier.max_accuracy_loss)
        facts: dict[str, Any] = {
            "tokenizer": tokenizer_hash(tokenizer),
            "segments": recipe.segments,
            "thresholds": _thresholds(kinds[name], judged["calibration"], recipe),
            "calibration": {
                "max_accuracy_loss": recipe.verifier.max_accuracy_loss,
                "prompts": len(judged["calibration"]),
                "policy": recipe.engine.policy,
            },
        }
        save(folder, kinds[name], target, facts)
        content = {"kinds": report, "n_prompts": len(judged["calibration"]), **facts["calibration"]}
        write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")


def gather(engine: Engine, rollouts: Dataset, split: str, layers: tuple[int, ...]) -> list[Judged]:
    """Run the packed pass over every draft of a split and keep its evidence.

    The pass carries the `prompt` kind's suffixes where the target has a chat template; the draft's own
    positions cannot see them, so one pass serves every kind.
    """
    engine.verifier = reader(engine, layers)
    rows = rollouts.filter(lambda row: row["split"] == split and len(row["draft_ids"]) > 0)
    judged = []
    with progress_bar(f"evidence, {split}", total=len(rows)) as bar:
        for row in rows:
            evidence = examine(engine, row["prompt_ids"], row["draft_ids"], row["ends"], row["ended"])
            judged.append(Judged(evidence, row["valid"], row["target_right"]))
            bar.update()
    return judged


def train_probe(judged: Sequence[Judged], layers: tuple[int, ...], recipe: Recipe) -> Probe:
    """Fit the probe's head by the likelihood of where each draft first goes wrong.

    Every sixth draft is held out; the weights of the best epoch on those are kept.
    """
    section = recipe.verifier
    torch.manual_seed(recipe.seed)
    usable = [item for item in judged if item.target_right]  # elsewhere the labels say nothing of the draft
    held_out, fitted = usable[::6], [item for i, item in enumerate(usable) if i % 6]
    width = _states(judged[0]).shape[-1]
    head = ProbeHead(width, section.hidden)
    steps = section.epochs * -(-len(fitted) // 16)
    optimizer = torch.optim.AdamW(head.parameters(), lr=section.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, section.learning_rate, total_steps=steps)
    best, kept = float("inf"), head.state_dict()
    with progress_bar("verifier", total=section.epochs) as bar:
        for _ in range(section.epochs):
            head.train()
            for chunk in torch.randperm(len(fitted)).split(16):
                loss = torch.stack([survival_loss(head, fitted[i]) for i in chunk.tolist()]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            head.eval()
            with torch.no_grad():
                loss_held_out = torch.stack([survival_loss(head, item) for item in held_out]).mean().item()
            if loss_held_out < best:
                best, kept = loss_held_out, {k: v.clone() for k, v in head.state_dict().items()}
            bar.set_postfix(held_out=f"{loss_held_out:.3f}", best=f"{best:.3f}", refresh=False)
            bar.update()
    head.load_state_dict(kept)
    return Probe(head.eval(), layers)


def survival_loss(head: ProbeHead, judged: Judged) -> Tensor:
    """Negative log-likelihood, in nats, of surviving each valid segment and failing in the first invalid one."""
    hazards = nn.functional.softplus(head(*probe_inputs(judged.evidence)))  # [M]
    sums = torch.stack([hazards[start:stop].sum() for start, stop in judged.evidence.bounds])  # [K]
    known = known_cuts(judged.valid)
    survived = sums[: sum(judged.valid[:known])].sum()
    if all(judged.valid):
        return survived
    return survived - torch.log(-torch.expm1(-sums[known - 1].clamp(min=1e-6)))


def calibrate(
    confidences: Sequence[Sequence[float]],
    valid: Sequence[Sequence[bool]],
    max_accuracy_loss: float,
    policy: str = "first_fail",
) -> float:
    """The smallest threshold whose expected accuracy loss is bounded, by conformal risk control.

    The loss of a prompt is 1 where the accepted prefix is invalid. With n prompts the threshold is the
    smallest one with (losses + 1) / (n + 1) <= max_accuracy_loss (Angelopoulos et al., arXiv 2208.02814,
    for losses in [0, 1] that never rise with the threshold).

    Args:
        confidences, valid: K values for each of the n prompts.

    Returns:
        the threshold, or `NEVER` where the data cannot support the promise.
    """
    fatal = []  # the highest threshold at which each prompt would still be lost
    for scores, labels in zip(confidences, valid, strict=True):
        candidates = [s for s in scores if _loses(scores, labels, s, policy)]
        if candidates:
            fatal.append(max(candidates))
    allowed = int(max_accuracy_loss * (len(confidences) + 1) + 1e-9) - 1
    if allowed < 0:
        return NEVER
    fatal.sort(reverse=True)
    if len(fatal) <= allowed:
        return 0.0
    above = float(torch.nextafter(torch.tensor(fatal[allowed]), torch.tensor(2.0)))
    return above if above <= 1 else NEVER


def _loses(scores: Sequence[float], labels: Sequence[bool], threshold: float, policy: str) -> bool:
    k = accept(scores, threshold, policy)
    return k > 0 and not labels[k - 1]


def _calibrated(kind: Verifier, judged: Sequence[Judged], recipe: Recipe) -> dict[str, float]:
    """Set a kind's threshold and measure it on the calibration prompts."""
    policy = recipe.engine.policy
    kind.threshold = _thresholds(kind, judged, recipe)[policy]
    return measure_kind(kind, judged, kind.threshold, policy)


def _thresholds(kind: Verifier, judged: Sequence[Judged], recipe: Recipe) -> dict[str, float]:
    """The calibrated threshold of each acceptance policy; "whole" judges the last cut alone."""
    confidences = [kind.confidences(item.evidence).tolist() for item in judged]
    # where the target alone is wrong there is nothing to lose, whatever is accepted
    valid = [item.valid if item.target_right else [True] * len(item.valid) for item in judged]
    promise = recipe.verifier.max_accuracy_loss
    whole = calibrate([c[-1:] for c in confidences], [v[-1:] for v in valid], promise)
    rounds = {p: calibrate(confidences, valid, promise, p) for p in ("first_fail", "longest")}
    return {**rounds, "whole": whole}


def _best_rule(report: dict[str, dict[str, float]]) -> str:
    rules = [name for name in report if name.startswith("likelihood")]
    return max(rules, key=lambda name: report[name]["accepted_fraction"])


def _explain(name: str, report: dict[str, dict[str, float]], n: int, promise: float) -> None:
    print(f"verifier: {n} calibration prompts, at most {promise:.1%} accuracy loss promised")
    print(
        f"  {'kind':28s}{'AUC':>7s}{'threshold':>11s}{'accepted':>10s}   (an oracle accepts "
        f"{report[name]['oracle_accepted_fraction']:.1%})"
    )
    for kind, figures in report.items():
        chosen = "   <- saved" if kind == name else ""
        print(
            f"  {kind:28s}{figures['auc']:7.3f}{figures['threshold']:11.4f}{figures['accepted_fraction']:10.1%}{chosen}"
        )
    if report[name]["threshold"] >= 1:
        needed = int(1 / promise)
        print(
            f"  No threshold keeps the promise with these {n} prompts, so nothing will be accepted. It takes at "
            f"least {needed} prompts (rollouts.calibration), more with a weak verifier, or a larger "
            "verifier.max_accuracy_loss."
        )


def _layers(chosen: Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices into `hidden_states` (0 is the embedding, `depth` the last), from the end where negative."""
    layers = tuple(layer if layer >= 0 else depth + 1 + layer for layer in chosen)
    if any(not 0 <= layer <= depth for layer in layers):
        raise ValueError(f"verifier.layers={list(chosen)}: the target has hidden states 0 to {depth}")
    return layers


def _states(judged: Judged) -> Tensor:
    assert judged.evidence.states is not None
    return judged.evidence.states
