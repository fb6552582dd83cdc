"""The parts of `python -m eval.bench gpu`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from eval.bench.engine import pass_ways, some_prompts
from eval.bench.fakes import (
    MODELS_LABEL,
    Scripted,
    agreeing,
    endless,
    runners_of,
    seconds_of,
    split_of,
    stopwatch,
    synchronize,
)
from eval.bench.models import EMBEDDED
from eval.bench.shared import FULL, Bench, Rows
from parse import Engine, Generation
from parse.local.loading import FLEX, SDPA
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.scheduler import run_together

ATTEMPTS = 3  # at a measurement in which nothing is compiled
ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_architectures.py", "tests/test_gpu.py")  # those that compile last


@dataclass(frozen=True)
class Part:
    """One part: its name, what it does, the seconds that it may take, and its work."""

    name: str
    what: str
    limit: float
    run: Callable[[Bench, Rows], None]


def tests(bench: Bench, rows: Rows) -> None:
    """Run the tests marked `gpu`, and the exactness tests of every architecture, on this device."""
    _run_tests(f"{bench.sizes.tests} and not flex", TESTS, rows)


def flex(bench: Bench, rows: Rows) -> None:
    """FlexAttention, whose kernels take long to compile: packed passes with its masks, and its tests."""
    for n, k, s in bench.sizes.flex:
        rows.note(table="masks", N=n, K=k, S=s, **_masks(bench, n, k, s))
    if bench.device.type == "cuda":
        _run_tests("flex", TESTS[1:], rows)


def _run_tests(named: str, files: Sequence[str], rows: Rows) -> None:
    if find_spec("pytest") is None:
        raise ModuleNotFoundError("pytest is not installed here: pip install pytest hypothesis, or `make test` once")
    import pytest

    outcomes, failures = Counter[tuple[str, str]](), list[str]()

    class Counting:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.nodeid.split("::")[0], report.outcome] += 1
            if report.failed:
                last = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:3]
                failures.append(f"{report.nodeid}: {' '.join(last)}"[:500])

    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", named]
    status = pytest.main([*arguments, *(str(ROOT / file) for file in files)], plugins=[Counting()])
    torch.compiler.reset()
    for file in files:
        figures = {outcome: outcomes[file, outcome] for outcome in ("passed", "failed", "skipped")}
        failed = [failure for failure in failures if failure.startswith(file)]
        rows.note(table="tests", file=file, **figures, failures=failed)
    if status == pytest.ExitCode.INTERRUPTED:
        raise TimeoutError("the tests took too long, and were interrupted")
    if status != pytest.ExitCode.OK:
        raise AssertionError(f"{sum(row['failed'] for row in rows)} tests failed")


def ceilings(bench: Bench, rows: Rows) -> None:
    """How fast memory is copied, and matrices are multiplied."""
    sizes, device = bench.sizes, bench.device
    source, target = (torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=device) for _ in range(2))
    copy = median(seconds_of({"copy": partial(target.copy_, source)}, 10)["copy"])
    one, other = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=sizes.dtype) for _ in range(2))
    multiply = median(seconds_of({"multiply": lambda: one @ other}, 10)["multiply"])
    rows.note(table="ceilings", bandwidth=2 * sizes.copied / copy, rate=2 * sizes.matrix**3 / multiply)


def engine_speed(bench: Bench, rows: Rows) -> None:
    """Steps, packed passes, and where a pass spends its time."""
    for batch in bench.sizes.batches:
        for role in ("target", "draft"):
            rows.note(table="steps", role=role, batch=batch, **_step(bench, role, batch))
    for i, (n, k, s) in enumerate(bench.sizes.passes):
        rows.note(table="passes", N=n, K=k, S=s, **_packed(bench.runner("target"), n, k, s, bench.sizes.repeats))
        if i == 0:
            rows.note(table="split", N=n, K=k, S=s, **_split(bench, n, k, s))


def _step(bench: Bench, role: str, batch: int) -> dict[str, float]:
    """A decoding step's seconds, its memory floor, and `generate`'s time over our loop's for as many tokens."""
    sizes, runner = bench.sizes, bench.runner(role)
    contexts = [CachedSequence(runner) for _ in range(batch)]
    prompts = some_prompts(runner.model, batch, sizes.prompt)

    def loop(tokens: int) -> None:
        passes = [Pass(runner, c.row, ids, more=tokens - 1) for c, ids in zip(contexts, prompts, strict=True)]
        runner.forward(passes, alone=lambda: True)
        for context in contexts:
            runner.cache.truncate(0, context.row)

    ids = torch.tensor(prompts, device=bench.device)  # [B, L]
    length = {"min_new_tokens": sizes.written, "max_new_tokens": sizes.written}
    model: Any = runner.model

    def generate() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)

    ways: dict[str, Callable[[], None]] = {
        "one": partial(loop, 1),
        "ours": partial(loop, sizes.written),
        "theirs": generate,
    }
    seconds = seconds_of(ways, sizes.repeats)
    one, ours, theirs = (median(seconds[name]) for name in ways)
    step = (ours - one) / (sizes.written - 1)
    floor = _bytes_of_step(runner, batch, sizes.prompt + sizes.written // 2) / _bandwidth(bench)
    return {"step": step, "floor": floor, "floor_share": floor / step, "generate_over_ours": theirs / ours}


def _bandwidth(bench: Bench) -> float:
    return bench.figure("ceilings", "ceilings", "bandwidth") or float("nan")


def _bytes_of_step(runner: ModelRunner, batch: int, length: int) -> int:
    """What a decoding step has to read: all weights but those of an embedding that is no head, and the caches."""
    model, config = runner.model, runner.model.config
    weights = sum(weight.nbytes for weight in model.parameters())
    embedding: Any = model.get_input_embeddings()
    if not config.tie_word_embeddings:
        weights -= embedding.weight.nbytes
    return weights + batch * length * _cache_bytes(model)


def _cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token in a model's cache."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def _packed(runner: ModelRunner, n: int, k: int, s: int, repeats: int) -> dict[str, float]:
    """A packed pass's seconds, over those of a prefill of as many tokens, and those of K passes over them."""
    ways = pass_ways(runner, n, k, s, batch=1)
    seconds = seconds_of({name: ways[name] for name in ("packed", "equal", "sequential")}, repeats)
    packed, equal, sequential = (median(some) for some in seconds.values())
    return {"packed": packed, "over_equal": packed / equal, "sequential_over": sequential / packed}


def _packed_alone(runner: ModelRunner, n: int, k: int, s: int, repeats: int) -> float:
    return median(seconds_of({"packed": pass_ways(runner, n, k, s, batch=1)["packed"]}, repeats)["packed"])


def _split(bench: Bench, n: int, k: int, s: int) -> dict[str, float]:
    """A compiled packed pass's shares: attention, linear layers and head, each as it takes without; and the rest."""
    whole = _packed_alone(bench.runner("target"), n, k, s, bench.sizes.repeats)
    runner = bench.runner("target", compiled=False)
    parts = split_of(runner.model, pass_ways(runner, n, k, s, batch=1)["packed"])
    shares = {name: seconds / whole for name, seconds in parts.items()}
    return {"packed": whole, **shares, "rest": 1 - sum(shares.values())}


def _masks(bench: Bench, n: int, k: int, s: int) -> dict[str, float]:
    """A packed pass that is not compiled, with dense masks and with FlexAttention's."""
    model, seconds = bench.engine.models["target"].runner.model, {}
    for name, attention in (("dense", SDPA), ("flex", FLEX)):
        model.set_attn_implementation(attention)
        try:
            # on a CPU, as the tests: a compiled kernel would take half a minute to make
            with torch.compiler.set_stance("default" if model.device.type == "cuda" else "force_eager"):
                runner = bench.runner("target", compiled=False)
                seconds[name] = _packed_alone(runner, n, k, s, bench.sizes.repeats)
        finally:
            model.set_attn_implementation(SDPA)
    return {**seconds, "flex_over_dense": seconds["flex"] / seconds["dense"]}


def answers(bench: Bench, rows: Rows) -> None:
    """Whole answers whose verdicts a script gives, many at once."""
    for batch in bench.sizes.batches:
        alone = _answers(bench, batch, method="target")[0]
        rows.note(table="answers", batch=batch, kept=None, way="target alone", seconds=alone, speedup=1.0)
        for share in bench.sizes.kept:
            for name, seconds, figures in _by_script(bench, batch, share):
                found = {"batch": batch, "kept": share, "way": name, "seconds": seconds, "speedup": alone / seconds}
                rows.note(table="answers", **found, **figures)


def _by_script(bench: Bench, batch: int, share: float) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Lossless speculation, PARSE, and both, of a draft that is right in so many cases: seconds, and more of PARSE."""
    sizes, lookahead = bench.sizes, 4
    wrong = max(1, round((1 - share) * sizes.answer / sizes.step))
    spacing = sizes.answer // wrong  # tokens: a draft goes as far as it is right on average
    script = Scripted([i * spacing for i in range(wrong)], [7, 8, 9, 10], shift=spacing // 2, reads_draft=False)
    rounds = {"horizon": max(sizes.step, spacing // sizes.step * sizes.step)}
    bench.engine.verifier = script
    with agreeing(share):
        seconds, _ = _answers(bench, batch, method="target", lookahead=lookahead)
    yield "speculation", seconds, {}
    _reset_peak()
    seconds, results = _answers(bench, batch, **rounds)
    accepted = sum(result.stats.accepted_tokens for result in results) / (batch * sizes.answer)
    figures = {"accepted": accepted, **_peak_memory(bench)}
    if share == sizes.kept[len(sizes.kept) // 2]:  # once: it takes another answer
        figures |= _over_ideal(bench, batch, seconds, results, rounds)
    yield "PARSE", seconds, figures
    with agreeing(share):
        seconds, _ = _answers(bench, batch, **rounds, lookahead=lookahead)
    yield "PARSE + speculation", seconds, {}


def _answers(bench: Bench, batch: int, **settings: Any) -> tuple[float, list[Generation]]:
    """Seconds of a batch of whole answers, and the answers; once more where something was compiled on the way."""
    engine, sizes = bench.engine, bench.sizes
    prompts = some_prompts(engine.target, batch, sizes.prompt, seed=batch)
    asked = engine.settings(max_new_tokens=sizes.answer, **settings)
    seconds, results = 0.0, list[Generation]()
    with endless(engine):
        for _ in range(ATTEMPTS):
            before = _compiled_so_far(engine)
            synchronize()
            started = perf_counter()
            steps = (engine._start(ids, ids, asked).answer() for ids in prompts)
            results = [result for _, result in run_together(steps, batch)]
            synchronize()
            seconds = perf_counter() - started
            if _compiled_so_far(engine) == before:
                break
    return seconds, results


def _compiled_so_far(engine: Engine) -> list[tuple[int, int]]:
    """What there is of compiled passes and of recorded steps, and where the buffers of those are."""
    made = []
    for runner in runners_of(engine).values():
        assert runner.compiled
        recorded = list(runner.cache.recorded.values())
        made += [(id(graph), len(recorded) + len(runner.compiled.forms)) for graph in recorded]
    return made


def _over_ideal(
    bench: Bench, batch: int, seconds: float, results: Sequence[Generation], rounds: dict[str, Any]
) -> dict[str, float]:
    """The answers' seconds over the ideal ones, and the models' share of them.

    Ideal are the steps that the answers cannot do without, at the seconds of a step of as many texts (`engine_speed`),
    and their wide passes as they are.
    """
    with stopwatch(bench.engine) as watch:
        watched, _ = _answers(bench, batch, **rounds)
    each = [result.stats for result in results]
    steps = {
        "draft": sum(stats.draft_tokens - stats.rounds for stats in each) / batch,
        "target": sum(stats.target_tokens - stats.rounds for stats in each) / batch,
    }
    step = {role: bench.figure("engine", "steps", "step", role=role, batch=batch) for role in steps}
    wide = sum(sum(watch.passes[role, True]) for role in steps)
    ideal = wide + sum(max(0.0, steps[role]) * (step[role] or float("nan")) for role in steps)
    return {"over_ideal": seconds / ideal, "models_share": watch.seconds[MODELS_LABEL] / watched}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(bench: Bench) -> dict[str, float]:
    """The most memory that was taken, GiB, and over the bytes of weights and caches."""
    if not torch.cuda.is_available():
        return {}
    held = 0
    for runner in runners_of(bench.engine).values():
        held += sum(weight.nbytes for weight in runner.model.parameters())
        held += sum(keys.nbytes + values.nbytes for keys, values in runner.cache.buffers())
    peak = torch.cuda.max_memory_allocated()
    return {"peak_gib": peak / 2**30, "peak_over_held": peak / held}


def pair(bench: Bench, rows: Rows) -> None:
    """The shipped pair on its own task, or a run's draft and verifier: every method on the same prompts."""
    from eval.measure import summarize
    from eval.methods import LOOKAHEAD, compare
    from eval.tasks import draw_prompts, load_task

    sizes, task = bench.sizes, load_task("ledger")
    draft, verifier = _of_run(bench.run)
    compiled = bench.device.type == "cuda"
    models = EMBEDDED / "ledger-target", draft, verifier
    # in float32 the compiler finds what the tests have compiled
    engine = Engine.from_pretrained(*models, device=bench.device, dtype=torch.float32, compile=compiled)
    limit = {"max_new_tokens": 200 if sizes is FULL else 40}
    methods: dict[str, dict[str, Any]] = {
        "target": {**limit, "method": "target"},
        "speculation": {**limit, "method": "target", "lookahead": LOOKAHEAD},
        "draft": {**limit, "method": "draft"},
        "parse": limit,
    }
    prompts = draw_prompts(task, "test", sizes.pair, seed=0)
    outcomes = compare(engine, task, prompts, methods, warmup=min(2, sizes.pair))
    keys = ("accuracy", "speedup", "seconds_per_request", "tokens_per_second", "first_token_seconds")
    for name in methods:
        row = summarize(name, outcomes[name], outcomes["target"], task)
        more = {key: row[key] for key in (*keys, "accepted_fraction", "model_time_fraction", "n")}
        rows.note(table="pair", method=name, draft=Path(draft).name, verifier=Path(verifier).name, **more)


def _of_run(run: Path | None) -> tuple[Path, Path | str]:
    """The draft and the verifier of a run folder, else the shipped draft and the target's own word."""
    if run is None:
        return EMBEDDED / "ledger-draft", "prompt"
    aligned = run / "draft-lora"
    return (aligned if aligned.is_dir() else run / "draft"), run / "verifier"


PARTS = (
    Part("tests", "the tests that need a GPU, and every architecture on it", 105.0, tests),
    Part("ceilings", "copy bandwidth and matrix rate", 10.0, ceilings),
    Part("engine", "steps and packed passes in the shapes of Qwen3-8B and Qwen3-0.6B", 140.0, engine_speed),
    Part("answers", "whole answers with scripted verdicts", 185.0, answers),
    Part("pair", "the shipped pair on its task", 30.0, pair),
    Part("flex", "FlexAttention's masks", 40.0, flex),
)
