"""What `eval.bench` puts into an engine: scripted verdicts, endless answers, a stopwatch, a second device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from statistics import median
from time import perf_counter
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

import parse.answer
import parse.engine
import parse.passes
from parse import Engine
from parse.answer import Answer, Verdict
from parse.decode import Sampling, Written
from parse.passes import Pass, Reader, drive
from parse.verifiers import Calibration, Evidence

MODELS_LABEL = "models"


@dataclass
class Scripted:
    """A verifier that finds a draft right but at chosen places: the engine's speed without a model's skill.

    A draft writes all that is missing of an answer, so its length tells where it begins.
    """

    places: Sequence[int]  # positions in the answer where the draft's first try is wrong
    suffix_ids: list[int]
    answer: int  # tokens of a whole one
    kind: str = "scripted"
    layers: tuple[int, ...] = ()
    threshold: float = 0.5
    adapted: None = None
    reads_draft: bool = True
    calibration: Calibration | None = None

    def confidences(self, evidence: Evidence) -> Tensor:
        """1 for the cuts before the next wrong place, 0 behind it: float32 [K]."""
        begin = self.answer - evidence.ends[-1]
        place = next((place for place in self.places if place >= begin), self.answer)
        return torch.tensor([float(begin + end <= place) for end in evidence.ends])


@dataclass
class Stopwatch:
    """Where the time of calls goes: seconds of each label, without those of the labels inside."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    passes: dict[tuple[str, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    total: float = 0.0  # of all labels
    role: str = ""  # of the model whose pass it is

    def timed(
        self, label: str, call: Callable[..., Any], wide: Callable[..., bool] | None = None
    ) -> Callable[..., Any]:
        """The call, timed; for a model's pass, `wide` tells from its arguments whether it is more than a step."""

        @wraps(call)
        def timing(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started, before = perf_counter(), self.total
            result = call(*args, **kwargs)
            synchronize()
            took = perf_counter() - started
            self.seconds[label] += took - (self.total - before)
            self.total = before + took
            if wide is not None:
                self.passes[self.role, wide(*args, **kwargs)].append(took)
            return result

        return timing

    def reading(self, role: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A reader's call, which sets the role of the passes inside."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.role = role
            return call(*args, **kwargs)

        return noting


@contextmanager
def stopwatch(engine: Engine) -> Iterator[Stopwatch]:
    """Times the parts of an engine."""
    watch = Stopwatch()
    patches: list[tuple[Any, str, Any]] = []
    for model in {reader.model for reader in engine.readers.values()}:
        step = watch.timed(MODELS_LABEL, model.forward, lambda **inputs: inputs["input_ids"].shape[1] > 1)
        patches.append((model, "forward", step))
    for role, reader in engine.readers.items():
        patches.append((reader, "forward", watch.reading(role, reader.forward)))
        if reader.compiled:
            run = watch.timed(MODELS_LABEL, reader.compiled.run, lambda graph, arguments: arguments[0].shape[2] > 1)
            patches.append((reader.compiled, "run", run))
    for label, owner, name in (
        ("numbers and masks", Reader, "_numbers"),
        ("numbers and masks", Reader, "_step_numbers"),
        ("numbers and masks", parse.passes, "masks"),
        ("sampling", Sampling, "__call__"),
        ("packing and cutting", parse.engine, "pack"),
        ("packing and cutting", parse.answer, "cut"),
        ("evidence and verdicts", parse.engine, "token_evidence"),
        ("evidence and verdicts", Scripted, "confidences"),
    ):
        patches.append((owner, name, watch.timed(label, getattr(owner, name))))
    with ExitStack() as stack:
        for owner, name, timed in patches:
            stack.enter_context(patch.object(owner, name, timed))
        yield watch


@contextmanager
def endless(engine: Engine) -> Iterator[None]:
    """Nothing that the engine's models write ends an answer, so that each has the tokens that were asked for."""
    with ExitStack() as stack:
        for reader in engine.readers.values():
            stack.enter_context(patch.object(reader, "eos_ids", frozenset()))
        yield


@contextmanager
def two_devices() -> Iterator[None]:
    """Draft and target compute at the same time, on a core each, as on two devices.

    A packed pass and its verdicts run in a thread of their own; whoever looks at them waits.
    """
    threads, verify = torch.get_num_threads(), Answer.verify

    def started(answer: Answer, draft: Written) -> Generator[Pass | None, Any, Verdict]:
        return cast(Verdict, _Awaited(device.submit(lambda: drive(verify(answer, draft)))))
        yield  # never reached; it makes this a generator, as `Answer.verify` is

    torch.set_num_threads(1)
    try:
        with (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as device,
            patch.object(Answer, "verify", started),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Awaited:
    """What is still being computed."""

    future: Future[Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future.result(), name)


def take_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> Callable[[str, str], float]:
    """Run the ways in turns, once more before for warming up.

    Returns:
        the median over the turns of one way's seconds over another's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = perf_counter()
            way()
            synchronize()
            seconds[name].append(perf_counter() - started)
    return lambda one, other: median(a / b for a, b in zip(seconds[one][1:], seconds[other][1:], strict=True))


synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
