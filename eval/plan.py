"""Will PARSE help? What the speed-up would be, before anything is trained, and after a run why it is what it is.

Seconds of forward passes are measured on the recipe's own pair, or follow from a machine's published bandwidth and
arithmetic. The rest is the algorithm: with `right`, the share of a draft's segments that are accepted where those
before them were, the expected seconds of an answer are a sum over where the first rejected segment may stand. After a
run, the same costs of the rounds that it had tell a draft that errs unevenly, such as at the end of its answers alone,
from passes that cost otherwise. What the engine does between passes is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bench.tables import Table, text_table
from eval.costs import HARDWARE, Costs, measured, parameters, published
from recipes.command import run_command
from recipes.schema import Recipe, RecipeError

if TYPE_CHECKING:
    from parse import Engine

LOADS = (1, 8, 32)  # requests at once; the last one is measured on a GPU alone
HORIZONS = (1, 2, 4, 8, None)  # segments that the draft writes at a time; None is the whole answer
RIGHT = (0.8, 0.9, 0.95, 0.98, 1.0)
SIZES = (0.5, 1, 2, 4)  # of the draft, by its time
CUTS = (0.5, 1, 2)  # of the segments' length
SUFFIXES = (0, 2, 8)  # tokens
PHASES = {
    "draft": "drafting",
    "verify": "verifying",
    "target": "the target's own words",
    "other": "between passes",
    "total": "PARSE",
}


@dataclass(frozen=True)
class Workload:
    """What is asked, in tokens, and how good the draft is."""

    prompt: float = 200
    answer: float = 400
    segment: float = 25  # between two cuts
    right: float = 0.95  # share of a draft's segments that are accepted, where those before them were
    suffix: int = 0  # tokens of a verdict's suffix
    handback: str = "segment"  # or "never": after the first rejected segment the target writes to the end


@dataclass(frozen=True)
class Phases:
    """Seconds of one answer, by what they are spent on."""

    draft: float = 0.0
    verify: float = 0.0
    target: float = 0.0
    other: float = 0.0  # between passes: measured, not predicted

    @property
    def total(self) -> float:
        """All of them."""
        return self.draft + self.verify + self.target + self.other

    def plus(self, other: Phases, weight: float = 1.0) -> Phases:
        """The sum with another, so many times."""
        names = ("draft", "verify", "target", "other")
        return Phases(*(getattr(self, name) + weight * getattr(other, name) for name in names))


def target_alone(work: Workload, target: Costs, requests: int = 1) -> Phases:
    """The target reads the prompt and writes the answer."""
    return Phases(target=target.read(work.prompt, requests) + work.answer * target.step(requests))


def parse(work: Workload, target: Costs, draft: Costs, horizon: int | None = None, requests: int = 1) -> Phases:
    """PARSE: after a rejected segment the target writes it, and the draft drafts again.

    Args:
        horizon: segments that the draft writes at a time; None for all that are left.
        requests: at once.
    """
    count = max(round(work.answer / work.segment), 1)
    repair = Phases(target=work.segment * target.repair(requests))
    expected = [Phases()]  # by how many segments are left
    for left in range(1, count + 1):
        written = min(left, horizon or left)
        spent = drafted(work, target, draft, written, left == count, requests)
        for accepted in range(written):
            chance, rejected = work.right**accepted * (1 - work.right), left - accepted  # segments from there on
            rest = (
                repair.plus(expected[rejected - 1]) if work.handback == "segment" else Phases().plus(repair, rejected)
            )
            spent = spent.plus(rest, chance)
        expected.append(spent.plus(expected[left - written], work.right**written))
    return expected[count]


def drafted(work: Workload, target: Costs, draft: Costs, written: int, first: bool, requests: int = 1) -> Phases:
    """A round: the draft writes so many segments, and the target judges them; the first one reads the prompt."""
    tokens = written * work.segment
    unread = work.prompt if first else work.segment  # by the draft, before it writes
    passed = (work.prompt if first else 0) + tokens + written * work.suffix
    return Phases(
        draft=draft.read(unread, requests) + tokens * draft.step(requests), verify=target.read(passed, requests)
    )


@dataclass(frozen=True)
class Way:
    """How an answer came about."""

    work: Workload  # its own prompt and segments
    rounds: Sequence[int]  # the segments that were drafted in each
    repaired: float  # tokens that the target wrote


def as_it_went(ways: Sequence[Way], target: Costs, draft: Costs, requests: int = 1) -> Phases:
    """What the rounds of answers would cost; the mean."""
    spent = Phases()
    for way in ways:
        each = Phases(target=way.repaired * target.repair(requests))
        for i, written in enumerate(way.rounds or [0]):  # also where the draft wrote nothing, the prompt was read
            each = each.plus(drafted(way.work, target, draft, written, not i, requests))
        spent = spent.plus(each, 1 / len(ways))
    return spent


def rounds_of(segments: Sequence[Mapping[str, Any]], horizon: int | None) -> list[int]:
    """The segments of each round of an answer, which ends where the target writes, and at the horizon."""
    rounds = list[int]()
    for source, group in groupby(segments, key=lambda segment: segment["source"]):
        left = len(list(group)) if source == "draft" else 0
        while left:
            rounds.append(min(left, horizon or left))
            left -= rounds[-1]
    return rounds


@dataclass(frozen=True)
class Observed:
    """What an evaluation found of PARSE, at its first number of requests at once."""

    work: Workload
    ways: Sequence[Way]
    horizon: int | None  # segments
    requests: int
    seconds: Phases  # of an answer
    alone: float  # of the target's own answer

    @property
    def speedup(self) -> float:
        """The target's seconds in the engine over PARSE's."""
        return self.alone / self.seconds.total


def observed(recipe: Recipe, encode: Callable[[Any], Sequence[int]]) -> Observed | None:
    """What a run's evaluation was asked, how good its draft was, and what it took; None where there is none."""
    folder = recipe.folder / "eval"
    if not all((folder / name).is_file() for name in ("transcripts.jsonl", "summary.json")):
        return None
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]
    by_method = {name: [row for row in rows if row["method"] == name] for name in ("target", "parse")}
    if not all(by_method.values()):
        return None
    ours, summary = by_method["parse"], json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    judged = accepted = rejected = 0
    for row in ours:
        kept = [segment["accepted"] for segment in row["segments"] if segment["source"] == "draft"]
        before = [True, *(segment["source"] == "target" or segment["accepted"] for segment in row["segments"])]
        firsts = [b and not segment["accepted"] for b, segment in zip(before, row["segments"], strict=False)]
        judged, accepted, rejected = judged + len(kept), accepted + sum(kept), rejected + sum(firsts)
    alone, seconds = (
        {key: sum(row["stats"]["seconds"][key] for row in some) / len(some) for key in row["stats"]["seconds"]}
        for some in by_method.values()
    )
    prompts = [len(encode(row["prompt"])) for row in ours]
    work = Workload(
        prompt=sum(prompts) / len(ours),
        answer=sum(len(row["token_ids"]) for row in by_method["target"]) / len(ours),
        segment=sum(row["stats"]["draft_tokens"] for row in ours) / max(judged, 1),
        right=accepted / max(accepted + rejected, 1),
        suffix=_suffix(summary["verifier"]),
        handback=recipe.engine.handback,
    )
    asked = recipe.engine.horizon
    horizon = 1 if asked == "segment" else max(round(asked / work.segment), 1) if isinstance(asked, int) else None
    ways = []
    for row, prompt in zip(ours, prompts, strict=True):
        rounds, stats = rounds_of(row["segments"], horizon), row["stats"]
        own = replace(work, prompt=prompt, segment=stats["draft_tokens"] / max(sum(rounds), 1))
        ways.append(Way(own, rounds, stats["target_tokens"]))
    return Observed(work, ways, horizon, summary["at_once"], Phases(**seconds), sum(alone.values()))


def _suffix(verifier: str | None) -> int:
    """The tokens that a saved verifier appends to each prefix."""
    record = Path(verifier or "") / "verifier.json"
    return len(json.loads(record.read_text(encoding="utf-8"))["suffix_ids"]) if record.is_file() else 0


def tables(work: Workload, costs: Mapping[str, Costs], loads: Sequence[int] = LOADS) -> Iterator[Table]:
    """The predicted speed-up over what decides it, one thing at a time."""
    gain = partial(speedup, target=costs["target"], draft=costs["draft"])
    names = {horizon: "whole answer" if horizon is None else f"{horizon} segments" for horizon in HORIZONS}
    rows = [
        [f"{right:.0%}", *(_times(gain(replace(work, right=right), horizon=horizon)) for horizon in HORIZONS)]
        for right in RIGHT
    ]
    yield Table("Segments accepted, and how much is drafted at a time", ["accepted", *names.values()], rows)
    rows = [[str(count), _times(gain(work, requests=count))] for count in loads]
    yield Table("Requests at once", ["requests", "speed-up"], rows)
    scaled = {size: speedup(work, costs["target"], costs["draft"].scaled(size)) for size in SIZES}
    rows = [[f"{size:g} times its time", _times(gained)] for size, gained in scaled.items()]
    yield Table("A smaller or larger draft, as often right", ["draft", "speed-up"], rows)
    cuts = {factor: replace(work, segment=factor * work.segment, right=work.right**factor) for factor in CUTS}
    rows = [
        [f"{changed.segment:.0f} tokens", f"{changed.right:.1%}", _times(gain(changed))] for changed in cuts.values()
    ]
    yield Table("Shorter or longer segments, as many faults", ["segment", "accepted", "speed-up"], rows)
    rows = [[str(suffix), _times(gain(replace(work, suffix=suffix)))] for suffix in SUFFIXES]
    yield Table("A verdict's suffix", ["tokens", "speed-up"], rows)


def speedup(work: Workload, target: Costs, draft: Costs, horizon: int | None = None, requests: int = 1) -> float:
    """Seconds of the target alone over those of PARSE."""
    return target_alone(work, target, requests).total / parse(work, target, draft, horizon, requests).total


def advice(work: Workload, costs: Mapping[str, Costs]) -> list[str]:
    """Where the break-even is, and which horizon to take."""
    gain = partial(speedup, target=costs["target"], draft=costs["draft"])
    best = max(HORIZONS, key=lambda horizon: gain(work, horizon=horizon))
    tokens = "null" if best is None else str(round(best * work.segment))
    words = "the whole answer at a time" if best is None else f"{best} segments at a time"
    lines = [f"Predicted: {gain(work, horizon=best):.2f}x with {words} (engine.horizon: {tokens})."]
    even = [right / 100 for right in range(101) if gain(replace(work, right=right / 100), horizon=best) >= 1]
    if even:
        lines.append(f"It pays from {even[0]:.0%} of the segments accepted on.")
    else:
        lines.append("It does not pay with this draft, however much is accepted: take a faster one.")
    return lines


def explained(run: Observed, costs: Mapping[str, Costs]) -> Table:
    """What is predicted of a run beside what was measured: seconds an answer by phase, and the speed-up."""
    evenly = parse(run.work, costs["target"], costs["draft"], run.horizon, run.requests)
    went = as_it_went(run.ways, costs["target"], costs["draft"], run.requests)
    rows = []
    for name, words in PHASES.items():
        first, second, measured = (getattr(phases, name) for phases in (evenly, went, run.seconds))
        rows.append([words, f"{first:.4f}", f"{second:.4f}", f"{measured:.4f}", f"{measured - second:+.4f}"])
    alone = target_alone(run.work, costs["target"], run.requests).total
    rows.append(["target alone", *[f"{alone:.4f}"] * 2, f"{run.alone:.4f}", f"{run.alone - alone:+.4f}"])
    gains = alone / evenly.total, alone / went.total, run.speedup
    rows.append(["speed-up", *map(_times, gains), f"{gains[2] / gains[1] - 1:+.1%}"])
    return Table("The run's seconds an answer", ["phase", "by the shares", "by its rounds", "measured", "gap"], rows)


def _times(value: float) -> str:
    return f"{value:.2f}x"


def main(arguments: Sequence[str]) -> int:
    """Print the prediction; of a recipe with measured costs, beside its run where there is one."""
    parser = argparse.ArgumentParser(prog="python -m eval plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipe", nargs="?", help="a YAML file: its target and draft are measured on this machine")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), help="instead of a recipe, by its data sheet")
    parser.add_argument("--target", help="parameters of the target, such as 8B")
    parser.add_argument("--draft", help="parameters of the draft, such as 600M")
    for name, kind, what in (
        ("prompt", float, "tokens of a prompt"),
        ("answer", float, "tokens of an answer"),
        ("segment", float, "tokens between two cuts"),
        ("right", float, "share of the draft's segments that are accepted, 0 to 1"),
        ("suffix", int, "tokens of a verdict's suffix"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=what)
    options = parser.parse_args(arguments)
    return run_command(lambda _: _main(options))


def _main(options: argparse.Namespace) -> int:
    given = {key: getattr(options, key) for key in ("prompt", "answer", "segment", "right", "suffix")}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        most, words = (1.0, "a share from 0 to 1") if key == "right" else (1e9, "a number of tokens from 0 on")
        if not 0 <= value <= most or (not value and key in ("answer", "segment")):
            raise RecipeError(f"--{key} is {value:g}: give {words}")
    if options.hardware:
        if not options.target or not options.draft or options.recipe:
            raise RecipeError("--hardware goes with --target and --draft, the models' parameters, and without a recipe")
        costs = {role: published(options.hardware, parameters(getattr(options, role))) for role in ("target", "draft")}
        work, run, origin = Workload(), None, f"predicted from the data sheet of {options.hardware}, not measured"
    elif options.recipe:
        costs, work, run = _of_recipe(options, given)
        origin = "forward passes measured on this machine; the speed-ups are predicted from them"
    else:
        raise RecipeError("name a recipe, or give --hardware, --target and --draft")
    work = replace(work, **given)
    print(f"{origin}\n")
    print(
        f"prompts of {work.prompt:.0f} tokens, answers of {work.answer:.0f}, segments of {work.segment:.0f}, "
        f"{work.right:.1%} of them accepted\n"
    )
    loads = [count for count in LOADS if count <= max(costs["target"].steps)]
    for table in tables(work, costs, loads):
        print(f"{text_table(table)}\n")
    if run is not None:
        print(f"{text_table(explained(run, costs))}\n")
    print("\n".join(advice(work, costs)))
    return 0


def _of_recipe(
    options: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[dict[str, Costs], Workload, Observed | None]:
    """The costs of the recipe's pair, and what its run was asked and took, where there is one."""
    import torch

    from eval.prompts import prompts_of
    from eval.tasks import load_task
    from recipes.schema import load_recipe, to_dict

    recipe = load_recipe(options.recipe, options.overrides)
    engine = _engine_of(recipe)
    usable = LOADS if torch.cuda.is_available() else LOADS[:-1]
    if recipe.engine.compile is not False:
        engine.warm_up(max(usable))
    task = load_task(recipe.task, to_dict(recipe.data))
    prompts = [prompt for _, prompt in prompts_of(recipe, task, "eval").prompts][: max(usable)]
    loads = [count for count in usable if count <= len(prompts)]
    run = observed(recipe, engine.encode)
    work = run.work if run else Workload(prompt=len(engine.encode(prompts[0])), handback=recipe.engine.handback)
    answer = min(round(given.get("answer", work.answer)), recipe.engine.max_new_tokens)
    costs = measured(engine, prompts, loads, answer, recipe.engine.lookahead)
    return costs, work, run


def _engine_of(recipe: Recipe) -> Engine:
    """The recipe's pair: a draft that is not trained yet takes as long as one that is."""
    from recipes.pair import first_draft, load_engine

    trained, _ = recipe.evaluated
    source = trained if trained.exists() else recipe.draft
    if isinstance(source, str | Path):
        return load_engine(recipe, Path(source), compile=recipe.engine.compile)
    with tempfile.TemporaryDirectory() as folder:
        draft, tokenizer = first_draft(recipe)
        draft.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_engine(recipe, Path(folder), compile=recipe.engine.compile)
