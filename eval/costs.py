"""What a model's forward passes cost: measured on this machine, or by a machine's data sheet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from recipes.schema import RecipeError

if TYPE_CHECKING:
    from parse import Engine

HARDWARE = {  # bytes a second of memory, dense bfloat16 operations a second; from the makers' data sheets
    "a100": (2.04e12, 312e12),
    "h100": (3.35e12, 989e12),
    "h200": (4.8e12, 989e12),
    "b200": (8.0e12, 2250e12),
    "l4": (0.30e12, 121e12),
    "l40s": (0.864e12, 362e12),
    "mi300x": (5.3e12, 1307e12),
}
WEIGHT_BYTES = 2
DRAFTS = (16, 64, 256)  # tokens of the passes that are measured
REPEATS = 3


@dataclass(frozen=True)
class Costs:
    """Seconds of a model's forward passes, as points between which they are interpolated."""

    steps: Mapping[int, float]  # of a decoding step, by the requests at once
    passes: Mapping[int, float]  # of a pass over a prompt or a draft, by its tokens
    repairs: Mapping[int, float] | None = None  # of a step in which the target writes within PARSE, if by lookahead

    def step(self, requests: int) -> float:
        """Seconds of a token for one of so many requests."""
        return interpolate(self.steps, requests) / requests

    def repair(self, requests: int) -> float:
        """Seconds of a token that the target writes within PARSE, for one of so many requests."""
        return interpolate(self.repairs, requests) / requests if self.repairs else self.step(requests)

    def read(self, tokens: float, requests: int = 1) -> float:
        """Seconds of a pass over so many tokens for one of so many requests."""
        return interpolate(self.passes, tokens * requests) / requests

    def scaled(self, factor: float) -> Costs:
        """The same model at so many times its seconds."""
        return Costs(*({size: factor * s for size, s in points.items()} for points in (self.steps, self.passes)))


def interpolate(points: Mapping[int, float], at: float) -> float:
    """Seconds at a size between measured ones; beyond the last one they grow in proportion."""
    import numpy as np

    sizes = sorted(points)
    if at > sizes[-1]:
        return points[sizes[-1]] * at / sizes[-1]
    return float(np.interp(at, sizes, [points[size] for size in sizes]))


def published(hardware: str, parameters: float) -> Costs:
    """The costs of a model of so many parameters, by whichever of memory and arithmetic is slower; caches left out."""
    bandwidth, arithmetic = HARDWARE[hardware]
    seconds = lambda tokens: max(WEIGHT_BYTES * parameters / bandwidth, 2 * parameters * tokens / arithmetic)
    sizes = [2**n for n in range(17)]
    return Costs({size: seconds(size) for size in sizes}, {size: seconds(size) for size in sizes})


def parameters(text: str) -> float:
    """A model's size: 8B, 600M, or a number.

    Raises:
        RecipeError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([BM]?)", text.strip().upper())
    if not found or not float(found[1]):
        raise RecipeError(f"{text!r} is no number of parameters: give one such as 8B or 600M")
    return float(found[1]) * {"B": 1e9, "M": 1e6, "": 1}[found[2]]


def measured(engine: Engine, role: str, prompts: Sequence[Sequence[int]], loads: Sequence[int], answer: int) -> Costs:
    """The costs of one of an engine's models: the medians of several measurements, after one to warm up.

    A step costs more as the text grows, so whole answers are written.

    Args:
        role: "target" or "draft".
        prompts: token ids, at least as many as the largest load.
        answer: tokens of an answer; fewer are written where the model's context ends before.
    """
    from eval.bench.fakes import endless
    from eval.generation import write_all
    from parse.sampling import Written
    from parse.scheduler import run
    from parse.verifiers import Needs

    model = engine.models[role]
    room = answer if model.context_length is None else model.context_length - max(map(len, prompts)) - 1
    length = max(min(answer, room), 1)

    def writing(count: int, limit: int) -> float:
        with endless(engine):
            return _seconds(lambda: write_all(model, prompts[:count], limit, count, f"{role}, {count} at once"))

    async def passing(tokens: int) -> float:
        sequence = model.open(prompts[0])
        try:
            await sequence.prefill()
            ids = [prompts[0][i % len(prompts[0])] for i in range(tokens)]
            started = perf_counter()
            evidence = await sequence.verify([], Written(ids, False), [tokens], Needs(token_logprobs=True))
            evidence.log_prob.sum().item()  # waits for the device
            return perf_counter() - started
        finally:
            sequence.close()

    def often(measure: Callable[[], float]) -> float:
        return median([measure() for _ in range(REPEATS + 1)][1:])

    steps = {
        count: often(lambda count=count: (writing(count, 1 + length) - writing(count, 1)) / length)  # type: ignore[misc]
        for count in loads
    }
    passes = {1: steps[min(steps)]} | {size: often(partial(lambda n: run(passing(n)), size)) for size in DRAFTS}
    return Costs(steps, passes)


def _seconds(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def repairing(engine: Engine, prompts: Sequence[Any], lookahead: int, answer: int) -> float:
    """Seconds of a step in which the target writes a token of each answer, the draft proposing so many at a time.

    Args:
        answer: tokens of an answer, at most.
    """

    def writing(limit: int) -> tuple[float, int]:
        started = perf_counter()
        settings: dict[str, Any] = {"method": "target", "lookahead": lookahead, "batch_size": len(prompts)}
        answers = engine.generate(prompts, limit, **settings)
        return perf_counter() - started, sum(len(answer.token_ids) for answer in answers)

    found = []
    for _ in range(REPEATS):
        (first, few), (last, many) = writing(1), writing(1 + answer)
        found.append((last - first) * len(prompts) / max(many - few, 1))
    return median(found)
