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
    from parse.model import Model

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


def measured(
    engine: Engine, prompts: Sequence[Any], loads: Sequence[int], answer: int, lookahead: int = 0
) -> dict[str, Costs]:
    """The costs of an engine's target and draft: medians over turns, after one to warm up.

    All is measured in each turn, as a machine is faster at one moment than at another. A step costs more as the text
    grows, so whole answers are written.

    Args:
        prompts: at least as many as the largest load.
        loads: requests at once.
        answer: tokens of an answer; fewer are written where a model's context ends before.
        lookahead: tokens that the draft proposes at a time where the target writes within PARSE.
    """
    from recipes.progress import progress_bar

    ids = {"target": list(map(engine.encode, prompts)), "draft": list(map(engine.encode_for_draft, prompts))}
    ways: dict[tuple[str, str, int], Callable[[], float]] = {}
    for role, texts in ids.items():
        ways |= {(role, "steps", count): partial(_step, engine, role, texts[:count], answer) for count in loads}
        ways |= {(role, "passes", size): partial(_pass, engine.models[role], texts[0], size) for size in DRAFTS}
    if lookahead:
        repair = partial(_repair, engine, lookahead=lookahead, answer=answer)
        ways |= {("target", "repairs", count): partial(repair, prompts[:count]) for count in loads}
    taken = {way: list[float]() for way in ways}
    with progress_bar("measuring passes", total=len(ways) * (REPEATS + 1)) as bar:
        for _ in range(REPEATS + 1):
            for way, measure in ways.items():
                taken[way].append(measure())
                bar.update()
    costs = {}
    for role in ids:
        steps, passes, repairs = (
            {size: median(seconds[1:]) for (of, what, size), seconds in taken.items() if (of, what) == (role, name)}
            for name in ("steps", "passes", "repairs")
        )
        costs[role] = Costs(steps, {1: steps[min(steps)]} | passes, repairs or None)
    return costs


def _step(engine: Engine, role: str, prompts: Sequence[Sequence[int]], answer: int) -> float:
    """Seconds of a decoding step with so many prompts (token ids) at once."""
    from eval.bench.fakes import endless
    from eval.generation import write_after
    from parse.scheduler import run_together

    model = engine.models[role]
    room = answer if model.context_length is None else model.context_length - max(map(len, prompts)) - 1
    length = max(min(answer, room), 1)

    def writing(limit: int) -> float:
        started = perf_counter()
        with endless(engine):
            list(run_together((write_after(model, ids, limit) for ids in prompts), len(prompts)))
        return perf_counter() - started

    return (writing(1 + length) - writing(1)) / length


def _pass(model: Model, prompt: Sequence[int], tokens: int) -> float:
    """Seconds of a verification of so many tokens after a prompt (token ids)."""
    from parse.sampling import Written
    from parse.scheduler import run
    from parse.verifiers import Needs

    async def passing() -> float:
        sequence = model.open(prompt)
        try:
            await sequence.prefill()
            ids = [prompt[i % len(prompt)] for i in range(tokens)]
            started = perf_counter()
            evidence = await sequence.verify([], Written(ids, False), [tokens], Needs(token_logprobs=True))
            evidence.log_prob.sum().item()  # waits for the device
            return perf_counter() - started
        finally:
            sequence.close()

    return run(passing())


def _repair(engine: Engine, prompts: Sequence[Any], lookahead: int, answer: int) -> float:
    """Seconds of a step in which the target writes a token of each answer, the draft proposing so many at a time."""

    def writing(limit: int) -> tuple[float, int]:
        started = perf_counter()
        settings: dict[str, Any] = {"method": "target", "lookahead": lookahead, "batch_size": len(prompts)}
        answers = engine.generate(prompts, limit, **settings)
        return perf_counter() - started, sum(len(answer.token_ids) for answer in answers)

    (first, few), (last, many) = writing(1), writing(1 + answer)
    return (last - first) * len(prompts) / max(many - few, 1)
