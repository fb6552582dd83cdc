"""The methods that are compared, each a way to call the engine; and how they are run fairly.

Every method answers the same prompts in the same process. For each prompt the methods take turns, in
an order that rotates, so that a machine that drifts slows all of them alike.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from eval.baselines import TransformersGenerate, can_assist
from eval.judges import Agreement, AskedTarget, Checked, Judge
from eval.tasks import Task
from eval.tasks.rows import key_of
from eval.tasks.task import Prompt
from parse import Engine, Generation
from parse.generation import Segment, Stats
from parse.prompts import opens_thinking
from parse.scheduler import run_together
from recipes.machine import gpu_memory
from recipes.progress import progress_bar
from recipes.schema import Recipe, RecipeError

JUDGED_AT_ONCE = 16
LOADS = (1, 8, 32)  # requests at once; the last one on a GPU
BLOCK = 4  # prompts for each request at once: after so many the next method has its turn
TURNS = 5  # of each method at least, where the prompts suffice: an interval takes several measurements
LOOKAHEAD = 4  # tokens that the draft proposes at a time in token-level speculation, where the recipe names no number
WHAT = {
    "target": "target alone",
    "generate": "the target by transformers' own generate",
    "assisted": "the same with the draft as its assistant, one request at a time",
    "speculation": "the target's own words, the draft proposing a few tokens at a time",
    "draft": "draft alone",
    "cascade": "the whole draft, or the target's own answer",
    "sequential": "one segment and one pass at a time, by the threshold of PARSE, which is not calibrated for it",
    "parse": "every prefix of the draft in one pass",
    "parse_lookahead": "the same, and the draft proposes a few tokens at a time while the target writes",
    "parse_probe": "every prefix in one pass, judged by a probe of the target's states",
    "parse_folded": "every prefix in one pass, judged by more rows of the target's LM head",
    "parse_adapter": "every prefix in one pass, judged by an adapter",
    "parse_prompt": "every prefix in one pass, the target asked in words",
    "parse_likelihood": "every prefix in one pass, judged by its likelihood",
}
HERE = {"generate", "assisted", "speculation", "parse_lookahead"}  # what takes both models on this machine
ALONE = {"target", "generate"}  # what takes no draft
UNJUDGED = ALONE | {"assisted", "speculation", "draft"}  # what takes no verifier
KINDS = {name: name.removeprefix("parse_") for name in WHAT if name.startswith("parse_") and name != "parse_lookahead"}


@dataclass(frozen=True)
class Outcome:
    """One method's answer to one prompt."""

    prompt: Prompt
    generation: Generation
    right: bool
    seconds: float  # wall time of the whole request; of several at once, their time over their number
    turn: int = 0  # in which it was timed, alone or with others
    error: str | None = None  # why the request failed, or could not be checked; then it counts as wrong
    gpu_memory_gib: float | None = None  # the most that was allocated in that turn; None without a GPU

    @property
    def record(self) -> dict[str, Any]:
        """As a line of `transcripts.jsonl` holds it."""
        own = {"prompt": self.prompt, "right": self.right, "seconds": self.seconds, "failure": self.error}
        return {**own, **asdict(self.generation)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Outcome:
        """The outcome that a record was made of, less the turn and the memory."""
        values = {field.name: record[field.name] for field in fields(Generation)}
        values["segments"] = [Segment(**segment) for segment in record["segments"]]
        generation = Generation(**{**values, "stats": Stats(**record["stats"])})
        return cls(record["prompt"], generation, record["right"], record["seconds"], error=record["failure"])


def methods_of(recipe: Recipe, engine: Engine, prompts: Sequence[Prompt]) -> list[str]:
    """The recipe's methods, or all that its models can do.

    Raises:
        RecipeError: for what is asked for and cannot be done by these models, or by models on servers.
    """
    named = recipe.eval.methods
    if engine.served:
        return _of_served(named, engine.served[0])
    assisted = can_assist(engine, prompts, recipe.engine.max_new_tokens)
    if named is not None:
        if "assisted" in named and not assisted:
            raise RecipeError(
                "eval.methods has 'assisted', which transformers refuses for this draft: its tokens are others in a "
                "vocabulary of the same size, or its context does not hold prompts with answers; leave the method out"
            )
        return list(named)
    left_out = {*KINDS, *([] if assisted else ["assisted"]), *(["parse_lookahead"] if recipe.engine.lookahead else [])}
    return [name for name in WHAT if name not in left_out]


def parts_of(recipe: Recipe) -> tuple[Path | None, Path | None]:
    """The folders of the draft and of the verifier, None for what none of the recipe's methods takes."""
    draft, verifier = recipe.evaluated
    names = recipe.eval.methods or WHAT.keys()
    return (draft if {*names} - ALONE else None), (verifier if {*names} - UNJUDGED else None)


def _of_served(named: Sequence[str] | None, server: str) -> list[str]:
    """What can be done where a model is on a server: what is named, or all."""
    if named is None:
        return [name for name in WHAT if name not in KINDS and name not in HERE]
    if wrong := [name for name in named if name in HERE]:
        raise RecipeError(
            f"eval.methods has {', '.join(wrong)}, which take both models on this machine, and {server} is on a "
            "server: leave them out"
        )
    return list(named)


def loads_of(recipe: Recipe) -> list[int]:
    """The recipe's numbers of requests at once, or those of `LOADS` that have two prompts for each request."""
    if recipe.eval.concurrency is not None:
        return recipe.eval.concurrency
    usable = LOADS if torch.cuda.is_available() else LOADS[:-1]
    return [count for count in usable if count == 1 or 2 * count <= recipe.eval.prompts]


def settings_of(recipe: Recipe, thresholds: dict[str, float], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings of methods, arguments of `Engine.generate` or of `TransformersGenerate`'s.

    Args:
        thresholds: the calibrated threshold for each acceptance policy.
        names: the methods.
    """
    section = recipe.engine
    limit = {"max_new_tokens": section.max_new_tokens}
    rounds = {"policy": section.policy, "handback": section.handback, "lookahead": section.lookahead}
    whole = {"policy": "whole", "lookahead": section.lookahead}
    threshold = {"threshold": thresholds.get(section.policy)}
    every: dict[str, dict[str, Any]] = {
        "target": {**limit, "method": "target"},
        "generate": limit,
        "assisted": limit,
        "speculation": {**limit, "method": "target", "lookahead": section.lookahead or LOOKAHEAD},
        "draft": {**limit, "method": "draft"},
        "cascade": {**limit, **whole, "threshold": thresholds.get("whole"), "horizon": section.horizon},
        "sequential": {**limit, **rounds, **threshold, "horizon": "segment"},
        "parse": {**limit, **rounds, **threshold, "horizon": section.horizon},
    }
    every["parse_lookahead"] = {**every["parse"], "lookahead": section.lookahead or LOOKAHEAD}
    every |= {name: {**every["parse"], "threshold": None} for name in KINDS}  # the kind's own
    return {name: every[name] for name in names}


def compare(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    methods: dict[str, dict[str, Any]],
    warmup: int,
    what: str = "methods",
    agreement: Agreement | None = None,
    at_once: int = 1,
    others: Mapping[str, Engine | TransformersGenerate] | None = None,
) -> dict[str, list[Outcome]]:
    """Answer every prompt with every method, interleaved; the first `warmup` prompts run twice.

    Where the task cannot check answers, those are right that are called the same as the target's, asked afterwards.
    A request that fails ends nothing: it is kept with its `error`.

    Args:
        agreement: who compares them; None: the target.
        at_once: requests; with several, methods take turns on blocks of prompts, of which so many run at a time.
        others: what runs a method instead of the engine, by name.
    """
    if task.stop:
        methods = {name: {**settings, "stop": list(task.stop)} for name, settings in methods.items()}
    names = list(methods)
    runs: dict[str, Engine | TransformersGenerate] = {name: (others or {}).get(name, engine) for name in names}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    fewest = min(TURNS, len(prompts) // at_once)
    turns = len(prompts) if at_once == 1 else max(len(prompts) // (BLOCK * at_once), fewest, 1)
    for start in range(0, warmup, at_once):
        for name in names:
            _answers(runs[name], prompts[start : start + at_once], at_once, methods[name])
    gc.collect()
    with progress_bar(what, total=len(prompts) * len(names)) as bar:
        for turn, some in enumerate(_evenly(prompts, turns)):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                gpu_memory()  # from here on
                started = perf_counter()
                generations = _answers(runs[name], some, at_once, methods[name])
                seconds = (perf_counter() - started) / len(some)
                memory = gpu_memory().get("gpu_memory_gib")
                for prompt, generation in zip(some, generations, strict=True):
                    outcomes[name].append(Outcome(prompt, generation, False, seconds, turn, generation.error, memory))
                bar.update(len(some))
    return {name: _judged(engine, task, some, outcomes.get("target", []), agreement) for name, some in outcomes.items()}


def _answers(
    run: Engine | TransformersGenerate, some: Sequence[Prompt], at_once: int, settings: dict[str, Any]
) -> list[Generation]:
    """A method's answers. Where a request fails among others, each is asked once more, alone."""
    try:
        return run.generate(some, batch_size=at_once, **settings)
    except Exception as error:
        if len(some) == 1:
            return [Generation("", [], "length", [], Stats(), f"{type(error).__name__}: {error}")]
    return [answer for prompt in some for answer in _answers(run, [prompt], 1, settings)]


def _evenly(prompts: Sequence[Prompt], count: int) -> list[Sequence[Prompt]]:
    """The prompts in so many parts, of which none is more than one longer than another."""
    borders = [len(prompts) * i // count for i in range(count + 1)]
    return [prompts[start:stop] for start, stop in pairwise(borders)]


def _judged(
    engine: Engine, task: Task, some: list[Outcome], target: list[Outcome], agreement: Agreement | None
) -> list[Outcome]:
    """The outcomes with what is right among them."""
    judge: Judge = Checked(task, opens_thinking(engine.tokenizer))
    if not task.checks:
        own = {key_of(outcome.prompt): outcome.generation.text for outcome in target}
        judge = replace(agreement or Agreement(engine, limit=0, asked=AskedTarget(engine)), references=own)

    async def judged(outcome: Outcome) -> Outcome:
        if outcome.generation.finish_reason != "stop":
            return outcome
        try:
            return replace(outcome, right=await judge.is_right(outcome.prompt, outcome.generation.text))
        except Exception as error:
            return replace(outcome, error=f"not checked, {type(error).__name__}: {error}")

    found = dict(run_together(map(judged, some), JUDGED_AT_ONCE))
    return [found[i] for i in range(len(some))]
