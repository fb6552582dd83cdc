"""Stage 5: the verifier, then its threshold.

Trained kinds learn from the target's own verdicts on the draft's answers, read through the same packed pass that the
engine runs. The kind is chosen on held-out prompts, the threshold is set on the calibration prompts, and what both are
worth is measured on the test prompts: no number vouches for a choice that it has decided itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk

from eval.judged import (
    Draft,
    Judged,
    Scored,
    examine,
    judgements,
    known_cuts,
    measure,
    milliseconds_per_cut,
    reader,
    score,
    untrained_kinds,
)
from eval.verdicts import console_table, html_report
from parse import Engine
from parse.trained import (
    SEGMENT_EVIDENCE,
    TOKEN_EVIDENCE,
    Adapter,
    AttentiveHead,
    HazardHead,
    Probe,
    adapt,
    save,
    suffix_of,
    tokenizer_hash,
)
from parse.verifiers import Evidence, Likelihood, Verifier
from train.calibration import NEVER, prompts_needed, thresholds
from train.files import write_text
from train.hazards import AdapterModule, Log, ProbeModule, acceptable, fit
from train.models import load_engine
from train.progress import progress_bar
from train.recipe import AdapterSection, ProbeSection, Recipe, hidden_states
from train.run import Run

HELD_OUT = 6  # every so manieth training prompt decides on epochs and kinds
TIMED = 10  # drafts on which a verdict's cost is measured

Scores = dict[str, list[Scored]]  # by split, of all processes


def run(recipe: Recipe, run: Run) -> None:
    """Write `verifier/`: verifier.json, head and LoRA; report.json and report.html."""
    with run.stage("verifier") as folder:
        promise, settings = recipe.verifier.max_accuracy_loss, recipe.engine
        engine = load_engine(recipe, recipe.draft_folder)
        rollouts = load_from_disk(recipe.rollouts_folder)
        assert isinstance(rollouts, Dataset)
        drafts = labelled(rollouts)
        kinds = {**untrained_kinds(engine), **train_kinds(engine, drafts, recipe, partial(run.log, "verifier"))}
        scores = score_all(engine, kinds, drafts)
        name = choose(recipe.verifier.kind, scores, promise)
        limits = {kind: thresholds(scores[kind]["calibration"], promise, settings.handback) for kind in kinds}
        for kind, verifier in kinds.items():
            verifier.threshold = limits[kind][settings.policy]
        if run.is_main:
            costs = milliseconds_per_cut(engine, kinds, drafts["test"][:TIMED])
            n = len({one.draft.number for one in scores[name]["calibration"]})
            facts = {
                "tokenizer": tokenizer_hash(engine.tokenizer),
                "end_ids": sorted(engine.readers["target"].eos_ids),
                "segments": recipe.segments,
                "thresholds": limits[name],
                "calibration": {
                    "max_accuracy_loss": promise,
                    "prompts": n,
                    "policy": settings.policy,
                    "handback": settings.handback,
                    "horizon": settings.horizon,
                },
            }
            save(folder, kinds[name], engine.target, facts)
            report = report_of(name, kinds, scores, costs, recipe)
            write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
            tested = {kind: found["test"] for kind, found in scores.items()}
            write_text(folder / "report.html", html_report(recipe.name, report, tested))
            print(f"verifier: {n} calibration prompts, at most {promise:.1%} accuracy loss promised")
            print(console_table(report))
            run.log("verifier", {f"{kind}/{key}": v for kind, row in report["kinds"].items() for key, v in row.items()})
            if kinds[name].threshold >= NEVER:
                print(_advice(kinds[name].kind, n, promise))


def labelled(rollouts: Dataset) -> dict[str, list[Draft]]:
    """This process's share of the labelled drafts, by split; of the training prompts some are `held_out`."""
    state = PartialState()
    drafts: dict[str, list[Draft]] = {"train": [], "held_out": [], "calibration": [], "test": []}
    for row in rollouts:
        if row["number"] % state.num_processes == state.process_index:
            held_out = row["split"] == "train" and row["number"] // state.num_processes % HELD_OUT == 0
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
                )
            )
    return drafts


def train_kinds(
    engine: Engine, drafts: dict[str, list[Draft]], recipe: Recipe, log: Log = lambda _: None
) -> dict[str, Verifier]:
    """The trained kinds that the recipe asks for."""
    section, promise = recipe.verifier, recipe.verifier.max_accuracy_loss
    wanted = {"probe", "adapter"} & ({"probe", "adapter"} if section.kind == "best" else {section.kind})
    if not wanted:
        return {}
    layers = hidden_states(section.probe.layers, engine.target.config.num_hidden_layers) if "probe" in wanted else ()
    engine.verifier = replace(Likelihood(), layers=layers, reads_context=bool(layers and section.probe.blocks))
    # where the target is wrong by itself, the labels say nothing of the draft
    usable = {split: [draft for draft in drafts[split] if draft.target_right] for split in ("train", "held_out")}
    fitted, held_out = (gather(engine, map(up_to_first_invalid, some), split) for split, some in usable.items())
    kinds: dict[str, Verifier] = {}
    if "probe" in wanted:
        kinds["probe"] = train_probe(fitted, held_out, layers, section.probe, promise, log)
    if "adapter" in wanted:
        kinds["adapter"] = train_adapter(engine, fitted, held_out, section.adapter, promise, log)
    return kinds


def up_to_first_invalid(draft: Draft) -> Draft:
    """The draft without what comes behind its first invalid cut: nobody asks there."""
    known = known_cuts(draft.valid)
    end = draft.ends[known - 1]
    ended = draft.ended and known == len(draft.ends)
    return replace(draft, ids=draft.ids[:end], ends=draft.ends[:known], valid=draft.valid[:known], ended=ended)


def gather(engine: Engine, drafts: Iterable[Draft], split: str) -> list[Judged]:
    """The evidence of a packed pass over every draft, in the computer's memory."""
    judged, drafts = [], list(drafts)
    with progress_bar(f"evidence, {split.replace('_', ' ')}", total=len(drafts)) as bar:
        for one in examine(engine, drafts):
            judged.append(replace(one, evidence=_kept(one.evidence)))
            bar.update()
    return judged


def train_probe(
    fitted: Sequence[Judged],
    held_out: Sequence[Judged],
    layers: tuple[int, ...],
    section: ProbeSection,
    promise: float,
    log: Log = lambda _: None,
) -> Probe:
    """Fit a head to the states of the draft's own tokens."""
    states = fitted[0].evidence.states if fitted else None
    width = 1 if states is None else states.shape[-1]

    def make() -> ProbeModule:
        sizes = width, TOKEN_EVIDENCE, section.hidden, section.dropout
        return ProbeModule(AttentiveHead(*sizes, section.blocks) if section.blocks else HazardHead(*sizes))

    module = fit(make, fitted, held_out, section, promise, "probe", log)
    return Probe(module.head, layers)


def train_adapter(
    engine: Engine,
    fitted: Sequence[Judged],
    held_out: Sequence[Judged],
    section: AdapterSection,
    promise: float,
    log: Log = lambda _: None,
) -> Adapter:
    """Fit a LoRA on suffixes and a head behind them."""
    suffix = suffix_of(engine.tokenizer, section.suffix)

    def make() -> AdapterModule:
        head = HazardHead(engine.target.config.hidden_size, SEGMENT_EVIDENCE, section.hidden, section.dropout)
        adapted = adapt(engine.target, suffix, section.rank, section.layers)
        return AdapterModule(adapted, engine.target, head.to(engine.target.device), suffix)

    module = fit(make, fitted, held_out, section, promise, "adapter", log)
    assert isinstance(module, AdapterModule)
    return Adapter(module.adapted, module.head, suffix)


def score_all(engine: Engine, kinds: dict[str, Verifier], drafts: dict[str, list[Draft]]) -> dict[str, Scores]:
    """Every kind's confidences in the drafts of all processes that none of them has learnt from."""
    layers = next((kind.layers for kind in kinds.values() if kind.layers), ())
    context = any(kind.reads_context for kind in kinds.values())
    adapters = {name: kind for name, kind in kinds.items() if kind.adapted}
    passes = [(reader(engine, layers, context), {name: kind for name, kind in kinds.items() if not kind.adapted})]
    passes += [(kind, {name: kind}) for name, kind in adapters.items()]
    scores: dict[str, Scores] = {name: {} for name in kinds}
    for split in ("held_out", "calibration", "test"):
        with progress_bar(f"verdicts, {split.replace('_', ' ')}", total=len(passes) * len(drafts[split])) as bar:
            for verifier, judges in passes:
                engine.verifier = verifier
                found: dict[str, list[Scored]] = {name: [] for name in judges}
                for one in examine(engine, drafts[split], with_draft=not verifier.adapted):
                    for name, kind in judges.items():
                        found[name] += score(kind, [one])
                    bar.update()
                for name in judges:
                    scores[name][split] = gather_object(found[name])
    return scores


def choose(kind: str, scores: dict[str, Scores], promise: float) -> str:
    """The kind's name in the report; among several the one that may accept most of the held-out drafts.

    Where several may accept as much, the one whose confidences are nearest to the labels, by their mean squared error
    (Brier's score). Divergence stands in the report alone: the engine does not keep the draft's distributions.
    """
    usable = [name for name in scores if not name.startswith("divergence")]
    among = [name for name in usable if kind in ("best", name) or name.split()[0] == kind]

    def merit(name: str) -> tuple[float, float]:
        held_out = scores[name]["held_out"]
        confidences, valid = judgements(held_out)  # [n] each
        return acceptable(held_out, promise), -float(((confidences - valid) ** 2).mean())

    return max(among, key=merit)


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
        "n_prompts": len({one.draft.number for one in tested}),
        "n_prefixes": sum(len(one.draft.ends) for one in tested),
        "max_accuracy_loss": recipe.verifier.max_accuracy_loss,
        "realised_accuracy_loss": figures[name]["accuracy_loss"],
    }


def _advice(kind: str, n: int, promise: float) -> str:
    """What to do where nothing can be accepted."""
    if n < (needed := prompts_needed(promise)):
        remedy = f"at least {needed - n} more (rollouts.calibration: {needed}), and still more with a weak verifier"
    else:
        remedy = f"a verifier that is less sure of wrong prefixes than this {kind}: more rollouts.train, another kind"
    return (
        f"  No threshold keeps the promise with these {n} prompts, so nothing will be accepted. It takes {remedy}; "
        "or a larger verifier.max_accuracy_loss."
    )


def _kept(evidence: Evidence) -> Evidence:
    """What training reads of the evidence, in the computer's memory."""
    tensors = {name: getattr(evidence, name) for name in ("log_prob", "entropy", "margin", "states", "context_states")}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}
    return replace(evidence, **moved)
