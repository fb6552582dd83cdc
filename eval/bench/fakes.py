"""What `eval.bench` puts into an engine: scripted verdicts, endless answers, a stopwatch, a second device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from statistics import median
from time import perf_counter
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import parse.local.model
import parse.local.runner
import parse.round
from parse import Engine
from parse.local.graphs import GROUPED, attending, grouped_attention
from parse.local.model import LocalModel, LocalSequence
from parse.local.runner import ModelRunner
from parse.round import Round
from parse.sampling import Sampling, Written
from parse.scheduler import run
from parse.verifiers import Calibration, Evidence, Needs

MODELS_LABEL = "models"


@dataclass(frozen=True)
class Placed(Evidence):
    """Evidence that tells where its draft begins."""

    begin: int = 0  # the tokens of the answer before it
    text: int = 0  # a number of the text's own: its first token


@dataclass
class Scripted:
    """A verifier that finds a draft right but at chosen places: the engine's speed without a model's skill."""

    places: Sequence[int]  # positions in the answer where the draft's first try is wrong
    suffix_ids: list[int]
    shift: int = 0  # texts are wrong elsewhere, by up to so many tokens, so that those of a batch fall out of step
    kind: str = "scripted"
    threshold: float = 0.5
    reads_draft: bool = True
    calibration: Calibration | None = None

    @property
    def needs(self) -> Needs:
        """As much as a real verifier's."""
        return Needs(token_logprobs=self.reads_draft, suffix_ids=tuple(self.suffix_ids))

    def confidences(self, evidence: Evidence) -> Tensor:
        """1 for the cuts before the next wrong place, 0 after it: float32 [K]."""
        assert isinstance(evidence, Placed), "a script needs a `ScriptedEngine`"
        begin, later = evidence.begin, evidence.text % (self.shift + 1)
        place = next((place + later for place in self.places if place + later >= begin), None)
        return torch.tensor([float(place is None or begin + end <= place) for end in evidence.ends])


class _PlacedSequence(LocalSequence):
    async def verify(self, ids: Sequence[int], draft: Written, ends: Sequence[int], needs: Needs) -> Evidence:
        evidence = await super().verify(ids, draft, ends, needs)
        return Placed(**vars(evidence), begin=len(ids), text=self.prompt_ids[0])


class _PlacedModel(LocalModel):
    def open(self, prompt_ids: Sequence[int], layers: tuple[int, ...] = ()) -> LocalSequence:
        return _PlacedSequence(self, prompt_ids, layers)


class ScriptedEngine(Engine):
    """An engine that tells its verifier where in an answer a draft begins."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        target = self.models["target"]
        self.models["target"] = self.pair.target = _PlacedModel(target.runner, target.tokenizer)


@contextmanager
def agreeing(share: float) -> Iterator[None]:
    """The target's own choice is what was proposed in so many cases, evenly: token-level speculation by a script."""
    asked = 0

    def settle(sampling: Sampling, token: int, proposer: Tensor, logits: Tensor) -> int:
        nonlocal asked
        asked += 1
        own = sampling(logits)  # takes its time either way
        if int(asked * share) > int((asked - 1) * share):
            return token
        return own if own != token else (token + 1) % len(logits)

    with patch.object(Sampling, "settle", settle):
        yield


@dataclass
class Stopwatch:
    """Where the time of calls goes: seconds of each label, without those of the labels inside."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    passes: dict[tuple[str, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    total: float = 0.0  # of all labels
    depth: int = 0  # passes that are running, one within the other
    role: str = ""  # of the model whose pass it is

    def timed(
        self, label: str, call: Callable[..., Any], wide: Callable[..., bool] | None = None
    ) -> Callable[..., Any]:
        """The call, timed; for a model's pass, `wide` tells from its arguments whether it is more than a step."""

        @wraps(call)
        def timing(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started, before = perf_counter(), self.total
            self.depth += wide is not None
            result = call(*args, **kwargs)
            self.depth -= wide is not None
            synchronize()
            took = perf_counter() - started
            self.seconds[label] += took - (self.total - before)
            self.total = before + took
            if wide is not None and not self.depth:
                self.passes[self.role, wide(*args, **kwargs)].append(took)
            return result

        return timing

    def reading(self, role: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A runner's call, which sets the role of the passes inside."""

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.role = role
            return call(*args, **kwargs)

        return noting


def runners_of(engine: Engine) -> dict[str, ModelRunner]:
    """What runs the passes of each of an engine's models."""
    return {role: model.runner for role, model in engine.models.items()}


@contextmanager
def stopwatch(engine: Engine) -> Iterator[Stopwatch]:
    """Times the parts of an engine."""
    watch = Stopwatch()
    patches: list[tuple[Any, str, Any]] = []
    for model in {runner.model for runner in runners_of(engine).values()}:
        step = watch.timed(MODELS_LABEL, model.forward, lambda **inputs: inputs["input_ids"].shape[1] > 1)
        patches.append((model, "forward", step))
    for role, runner in runners_of(engine).items():
        patches.append((runner, "forward", watch.reading(role, runner.forward)))
        if runner.compiled:
            run = watch.timed(
                MODELS_LABEL, runner.compiled.run, lambda shape, arguments, cache: arguments[0].shape[2] > 1
            )
            patches.append((runner.compiled, "run", run))
    for label, owner, name in (
        ("numbers and masks", ModelRunner, "_numbers"),
        ("numbers and masks", ModelRunner, "_step_numbers"),
        ("numbers and masks", parse.local.runner, "masks"),
        ("sampling", Sampling, "__call__"),
        ("packing and cutting", parse.local.model, "pack"),
        ("packing and cutting", parse.round, "cut"),
        ("evidence and verdicts", parse.local.model, "token_evidence"),
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
        for runner in runners_of(engine).values():
            stack.enter_context(patch.object(runner, "eos_ids", frozenset()))
        yield


@contextmanager
def two_devices() -> Iterator[None]:
    """Draft and target compute at the same time, on a core each, as on two devices.

    A packed pass and its verdicts run in a thread of their own; whoever looks at them waits.
    """
    threads, verify = torch.get_num_threads(), Round.verify

    async def started(answer: Round, draft: Written, ends: Sequence[int]) -> Tensor:
        return cast(Tensor, _Awaited(device.submit(lambda: run(verify(answer, draft, ends)))))

    torch.set_num_threads(1)
    try:
        with (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as device,
            patch.object(Round, "verify", started),
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
    seconds = seconds_of(ways, repeats)
    return lambda one, other: median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def seconds_of(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The seconds of each way, so many times, in turns; once more before for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = perf_counter()
            way()
            synchronize()
            seconds[name].append(perf_counter() - started)
    return {name: some[1:] for name, some in seconds.items()}


def split_of(model: PreTrainedModel, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of attention, of the linear layers and of the head in a pass that is not compiled.

    Each is timed on the device where it stands among the others, not waited for.
    """
    spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    def begin(label: str) -> Callable[[], None]:
        if not torch.cuda.is_available():
            started = perf_counter()
            return lambda: spans[label].append(partial(float, perf_counter() - started))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()

        def end() -> None:
            last.record()
            spans[label].append(lambda: first.elapsed_time(last) / 1e3)

        return end

    def attend(*arguments: Any, **named: Any) -> Any:
        end = begin("attention")
        output = grouped_attention(*arguments, **named)
        end()
        return output

    running: list[Callable[[], None]] = []
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            label = "head" if module is model.get_output_embeddings() else "linear"
            handles.append(module.register_forward_pre_hook(lambda *_, label=label: running.append(begin(label))))  # type: ignore[misc]
            handles.append(module.register_forward_hook(lambda *_: running.pop()()))
    try:
        with attending(model), patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {GROUPED: attend}):
            run()
            spans.clear()
            run()
            synchronize()
    finally:
        for handle in handles:
            handle.remove()
    return {label: sum(span() for span in spans[label]) for label in ("attention", "linear", "head")}


def synchronize() -> None:
    """Wait for the GPU, where there is one and its work is not just being recorded."""
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
