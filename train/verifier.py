"""Stage 5: the verifier, then its threshold.

Trained kinds learn from the target's own verdicts on the draft's answers, read through the same packed pass that the
engine runs. The kind is chosen on held-out prompts, the threshold is set on the calibration prompts, and what both are
worth is measured on the test prompts: no number vouches for a choice that it has decided itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk

from eval.verifier_metrics import (
    Draft,
    Example,
    Scored,
    all_needs,
    curves,
    examine,
    judgements,
    measure,
    milliseconds_per_cut,
    score,
    untrained_kinds,
)
from eval.verifier_report import console_table, html_report
from parse import Engine
from parse.verifiers import Adapter, Folded, Needs, Probe, Verifier
from parse.verifiers.adapter import adapt, suffix_of
from parse.verifiers.heads import SEGMENT_EVIDENCE, HazardHead
from parse.verifiers.saved import save, tokenizer_hash
from recipes.digests import of_values
from recipes.files import write_text
from recipes.pair import hidden_states, load_engine
from recipes.progress import progress_bar
from recipes.run import KEPT, Run
from recipes.schema import Recipe
from recipes.verifier_schema import AdapterSection, FoldedSection
from train.calibration import NEVER, prompts_needed, thresholds
from train.evidence import FREE, gather, up_to_first_invalid
from train.probes import ProbeData, choose_layers, learning_curve
from train.verifier_training import AdapterModule, FoldedModule, Log, acceptable, fit

HELD_OUT = (1 / 6, 1 / 3)  # of the training prompts, at least and at most, decide on epochs, layers and kinds
FEWEST = 2  # of them to make up the promised loss, where there are enough
ENOUGH_RIGHT, FEW_RIGHT = 1.5, 500  # right drafts to learn from for each wrong one, and those that are never too many
EXAMPLES = 4  # of its verdicts that a verifier keeps
TIMED = 10  # drafts on which a verdict's cost is measured

TRAINED = {"probe", "folded", "adapter"}
Scores = dict[str, list[Scored]]  # by split, of all processes


def run(recipe: Recipe, run: Run) -> None:
    """Write `verifier/`: verifier.json, head and LoRA; report.json and report.html."""
    with run.stage("verifier") as folder:
        max_accuracy_loss, settings = recipe.verifier.max_accuracy_loss, recipe.engine
        engine = load_engine(recipe, recipe.draft_folder, served=False)
        rollouts = load_from_disk(recipe.rollouts_folder)
        assert isinstance(rollouts, Dataset)
        drafts = labelled(rollouts, max_accuracy_loss)
        trained = train_kinds(engine, drafts, recipe, folder / KEPT, partial(run.log, "verifier"))
        asking = recipe.verifier.kind in ("best", "prompt")  # else its passes, which are long, are spared
        kinds = {**untrained_kinds(engine, asking), **trained.kinds}
        among = candidates(recipe.verifier.kind, kinds)
        deciding = ["held_out"] if len(among) > 1 else []
        scores = score_all(engine, kinds, drafts, [*deciding, "calibration", "test"])
        name = choose({kind: scores[kind] for kind in among}, max_accuracy_loss)
        limits = {kind: thresholds(scores[kind]["calibration"], max_accuracy_loss, settings.handback) for kind in kinds}
        for kind, verifier in kinds.items():
            verifier.threshold = limits[kind][settings.policy]
        if run.is_main:
            costs = milliseconds_per_cut(engine, kinds, drafts["test"][:TIMED])
            n = len({one.draft.number for one in scores[name]["calibration"]})
            facts = {
                "tokenizer": tokenizer_hash(engine.tokenizer),
                "end_ids": sorted(engine.models["target"].eos_ids),
                "segments": recipe.segments,
                "thresholds": limits[name],
                "calibration": {
                    "max_accuracy_loss": max_accuracy_loss,
                    "prompts": n,
                    "policy": settings.policy,
                    "handback": settings.handback,
                    "horizon": settings.horizon,
                },
            }
            save(folder, kinds[name], engine.target, facts | {"checks": examples_of(scores[name]["test"])})
            for kind, other in best_of_others(name, kinds, scores, max_accuracy_loss).items():
                more = facts | {"thresholds": limits[other], "checks": examples_of(scores[other]["test"])}
                save(folder / "others" / kind, kinds[other], engine.target, more)
            report = report_of(name, kinds, scores, costs, recipe) | {"learning_curve": trained.curve}
            write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
            write_text(folder / "report.html", html_report(recipe.name, report))
            print(f"verifier: {n} calibration prompts, at most {max_accuracy_loss:.1%} accuracy loss promised")
            print(console_table(report))
            run.log("verifier", {f"{kind}/{key}": v for kind, row in report["kinds"].items() for key, v in row.items()})
            if kinds[name].threshold >= NEVER:
                print(_advice(kinds[name].kind, n, max_accuracy_loss))


def labelled(rollouts: Dataset, max_accuracy_loss: float) -> dict[str, list[Draft]]:
    """This process's share of the labelled drafts, by split; of the training prompts some are `held_out`.

    Of those the drafts that the engine would not meet are left out: what it may accept is measured on the others.
    """
    state = PartialState()
    drafts: dict[str, list[Draft]] = {"train": [], "held_out": [], "calibration": [], "test": []}
    numbers = sorted({row["number"] for row in rollouts.select_columns(["number", "split"]) if row["split"] == "train"})
    own = [number for number in numbers if number % state.num_processes == state.process_index]
    set_aside = {*own[:: held_out_every(len(numbers), max_accuracy_loss)]}
    for row in rollouts:
        if row["number"] % state.num_processes != state.process_index:
            continue
        held_out = row["number"] in set_aside
        if held_out and not row["met"]:
            continue
        drafts["held_out" if held_out else row["split"]].append(
            Draft(
                [*row["prompt_ids"], *row["prefix_ids"]],
                row["draft_ids"],
                row["ends"],
                row["ended"],
                row["valid"],
                row["target_right"],
                row["number"],
                row["round"],
                row["met"],
            )
        )
    return drafts


def held_out_every(prompts: int, max_accuracy_loss: float) -> int:
    """Which training prompts are held out: every so manieth, so that the promised loss is more than one of them."""
    least, most = (share * prompts for share in HELD_OUT)
    return round(prompts / min(max(least, FEWEST / max_accuracy_loss), most)) if prompts else 1


@dataclass(frozen=True)
class Trained:
    """The trained kinds, and how the best probe grows with the prompts that it learns from."""

    kinds: dict[str, Verifier]
    curve: list[dict[str, float]]  # prompts, and what may be accepted of the held-out drafts


def train_kinds(
    engine: Engine, drafts: dict[str, list[Draft]], recipe: Recipe, kept: Path, log: Log = lambda _: None
) -> Trained:
    """The trained kinds that the recipe asks for.

    Args:
        kept: the folder of what is kept for another start.
    """
    section, max_accuracy_loss = recipe.verifier, recipe.verifier.max_accuracy_loss
    wanted = TRAINED & (TRAINED if section.kind == "best" else {section.kind})
    if not wanted:
        return Trained({}, [])
    depth = engine.target.config.num_hidden_layers
    layers = hidden_states(section.probe.layers, depth) if "probe" in wanted else ()
    attentive = bool(layers and section.probe.blocks)
    gathered = tuple(sorted({*layers, *([depth] if "folded" in wanted else [])}))
    needs = Needs(token_logprobs=True, layers=gathered, context_states=attentive)
    folder = kept / "evidence" / of_values([gathered, attentive, FREE])[:12]
    # where the target errs too, nothing is lost by accepting: such drafts are not learnt from
    usable = {split: [draft for draft in drafts[split] if draft.target_right] for split in ("train", "held_out")}
    usable["train"] = enough_of(usable["train"])
    train_set, held_out = (
        gather(
            engine,
            [up_to_first_invalid(draft) for draft in some],
            needs,
            folder,
            f"evidence, {split.replace('_', ' ')}",
        )
        for split, some in usable.items()
    )
    kinds: dict[str, Verifier] = {}
    curve: list[dict[str, float]] = []
    if "probe" in wanted:
        data = ProbeData(train_set, held_out, gathered, section.probe, max_accuracy_loss).of_layers(layers)
        if section.probe.layers == "auto":
            data, found = choose_layers(data, log)
        else:
            found = data.fit(log=log)
        kinds["probe"] = Probe(found.module.head.to(engine.target.device), data.layers)
        curve = learning_curve(data, found)
    if "folded" in wanted:
        kinds["folded"] = train_folded(engine, train_set, held_out, section.folded, max_accuracy_loss, log)
    if "adapter" in wanted:
        kinds["adapter"] = train_adapter(engine, train_set, held_out, section.adapter, max_accuracy_loss, log)
    return Trained(kinds, curve)


def enough_of(drafts: list[Draft]) -> list[Draft]:
    """All drafts that go wrong, and not many more of the right ones: each costs a pass of the target.

    Where right ones are left out, the confidences come out too low by as much as that; the threshold makes up for it.
    """
    wrong = sum(not all(draft.valid) for draft in drafts)
    right = [i for i, draft in enumerate(drafts) if all(draft.valid)]
    enough = max(int(ENOUGH_RIGHT * wrong), FEW_RIGHT)
    left_out = {*random.Random(len(right)).sample(right, max(0, len(right) - enough))}
    return [draft for i, draft in enumerate(drafts) if i not in left_out]


def train_folded(
    engine: Engine,
    train_set: Sequence[Example],
    held_out: Sequence[Example],
    section: FoldedSection,
    max_accuracy_loss: float,
    log: Log = lambda _: None,
) -> Folded:
    """Fit rows for tokens after the target's vocabulary, and a head over their rises: the best of several tries.

    So small a head finds its way from some beginnings and not from others, and learns in seconds. The loss on held-out
    drafts decides, as what may be accepted of them jumps with single drafts.
    """
    depth, first = engine.target.config.num_hidden_layers, engine.models["target"].vocabulary
    train_set, held_out = (
        [replace(one, evidence=one.evidence.of_layers((depth,))) for one in some] for some in (train_set, held_out)
    )
    starts = FoldedModule.starts(train_set)
    make = lambda: FoldedModule(*starts, section.rows, section.hidden, section.dropout)
    tries = [
        fit(make, train_set, held_out, section, max_accuracy_loss, "folded", log, f"folded, {n + 1} of {section.tries}")
        for n in range(section.tries)
    ]
    best = min(tries, key=lambda one: one.loss)
    return Folded(best.module.folded().to(engine.target.device), depth, tuple(range(first, first + section.rows)))


def train_adapter(
    engine: Engine,
    train_set: Sequence[Example],
    held_out: Sequence[Example],
    section: AdapterSection,
    max_accuracy_loss: float,
    log: Log = lambda _: None,
) -> Adapter:
    """Fit a LoRA on suffixes and a head after them."""
    suffix = suffix_of(engine.tokenizer, section.suffix)

    def make() -> AdapterModule:
        head = HazardHead(engine.target.config.hidden_size, SEGMENT_EVIDENCE, section.hidden, section.dropout)
        adapted = adapt(engine.target, suffix, section.rank, section.layers)
        return AdapterModule(adapted, engine.target, head.to(engine.target.device), suffix)

    module = fit(make, train_set, held_out, section, max_accuracy_loss, "adapter", log).module
    return Adapter(module.adapted, module.head, suffix)


def score_all(
    engine: Engine, kinds: dict[str, Verifier], drafts: dict[str, list[Draft]], splits: Sequence[str]
) -> dict[str, Scores]:
    """Every kind's confidences in the drafts of all processes that none of them has learnt from."""
    layers = tuple(sorted({layer for kind in kinds.values() for layer in kind.needs.layers}))
    context = any(kind.needs.context_states for kind in kinds.values())
    adapters = {name: kind for name, kind in kinds.items() if kind.needs.adapter is not None}
    others = {name: kind for name, kind in kinds.items() if name not in adapters}
    passes = [(all_needs(engine, layers, context, "prompt" in others), others)]
    passes += [(kind.needs, {name: kind}) for name, kind in adapters.items()]
    scores: dict[str, Scores] = {name: {} for name in kinds}
    for split in splits:
        with progress_bar(f"verdicts, {split.replace('_', ' ')}", total=len(passes) * len(drafts[split])) as bar:
            for needs, judges in passes:
                found: dict[str, list[Scored]] = {name: [] for name in judges}
                for one in examine(engine, drafts[split], needs, with_draft=needs.adapter is None):
                    for name, kind in judges.items():
                        found[name] += score(kind, [one])
                    bar.update()
                for name in judges:
                    scores[name][split] = gather_object(found[name])
    return scores


def candidates(kind: str, kinds: Iterable[str]) -> list[str]:
    """The kinds, by their names in the report, among which the recipe's `verifier.kind` leaves the choice.

    Divergence stands in the report alone: the engine does not keep the draft's distributions.
    """
    usable = [name for name in kinds if not name.startswith("divergence")]
    return [name for name in usable if kind in ("best", name) or name.split()[0] == kind]


def choose(scores: dict[str, Scores], max_accuracy_loss: float) -> str:
    """The kind's name in the report; among several the one that may accept most of the held-out drafts.

    Where several may accept as much, the one whose confidences are nearest to the labels, by their mean squared error
    (Brier's score).
    """

    def merit(name: str) -> tuple[float, float]:
        held_out = scores[name]["held_out"]
        confidences, valid = judgements(held_out)  # [n] each
        return acceptable(held_out, max_accuracy_loss), -float(((confidences - valid) ** 2).mean())

    return max(scores, key=merit) if len(scores) > 1 else next(iter(scores))


def best_of_others(
    chosen: str, kinds: dict[str, Verifier], scores: dict[str, Scores], max_accuracy_loss: float
) -> dict[str, str]:
    """Of each kind that was not chosen the name of what may accept most of the calibration drafts.

    They are kept so that an evaluation can compare the kinds.
    """
    best: dict[str, str] = {}
    by_merit = lambda name: acceptable(scores[name]["calibration"], max_accuracy_loss)
    for name in sorted(candidates("best", kinds), key=by_merit):
        if kinds[name].kind != kinds[chosen].kind:
            best[kinds[name].kind] = name  # the last one stays
    return best


def examples_of(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Some drafts with the confidences in them, by which a server that has the same target is known."""
    ordered = sorted((one for one in scored if one.confidences), key=lambda one: min(one.confidences))
    chosen = [*ordered[: EXAMPLES // 2], *ordered[len(ordered) // 2 :][-EXAMPLES // 2 :]]
    return [
        {
            "prompt_ids": one.draft.context_ids,
            "draft_ids": one.draft.ids,
            "ended": one.draft.ended,
            "ends": one.draft.ends,
            "confidences": one.confidences,
        }
        for one in chosen
    ]


def report_of(
    name: str, kinds: dict[str, Verifier], scores: dict[str, Scores], costs: dict[str, float], recipe: Recipe
) -> dict[str, Any]:
    """What `report.json` holds: every kind at its calibrated threshold on the test prompts."""
    tested = scores[name]["test"]
    figures = {
        kind: measure(scores[kind]["test"], verifier.threshold, recipe.engine.policy)
        | {"milliseconds_per_cut": costs[kind]}
        for kind, verifier in kinds.items()
    }
    return {
        "kinds": figures,
        "chosen": name,
        "policy": recipe.engine.policy,
        "curves": {kind: curves(scores[kind]["test"], recipe.engine.policy) for kind in kinds},
        "n_prompts": len({one.draft.number for one in tested}),
        "n_prefixes": sum(len(one.draft.ends) for one in tested),
        "max_accuracy_loss": recipe.verifier.max_accuracy_loss,
        "realised_accuracy_loss": figures[name]["accuracy_loss"],
    }


def _advice(kind: str, n: int, max_accuracy_loss: float) -> str:
    """What to do where nothing can be accepted."""
    if n < (needed := prompts_needed(max_accuracy_loss)):
        remedy = f"at least {needed - n} more (rollouts.calibration: {needed}), and still more with a weak verifier"
    else:
        remedy = f"a verifier that is less sure of wrong prefixes than this {kind}: more rollouts.train, another kind"
    return (
        f"  No threshold keeps the promise with these {n} prompts, so nothing will be accepted. It takes {remedy}; "
        "or a larger verifier.max_accuracy_loss."
    )
