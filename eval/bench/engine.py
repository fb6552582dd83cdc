"""How close the engine comes to its models' own forward passes.

Every figure is a median of ratios within one process, the parts of each measured one after the other, so that a
machine that drifts slows them alike. What the models answer plays no part: a script says where a draft is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.bench.fakes import MODELS_LABEL, Scripted, ScriptedEngine, endless, stopwatch, take_turns, two_devices
from eval.bench.models import load_pair, load_smollm2
from eval.bench.tables import Columns, Table, of_rows, percent, plain, times
from parse import Engine
from parse.layout import pack
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from recipes.pair import with_layers
from recipes.progress import progress_bar

PROMPT_TOKENS = 64
SHAPES = ((128, 8), (256, 16))  # draft tokens N, cuts K
SUFFIXES = (1, 4)  # suffix tokens S
MODELS = ("embedded", "smollm2")
STEP = 16  # tokens from cut to cut in whole answers
ANSWER = 128  # tokens of a whole answer
WRONG = (37, 90)  # where in it the draft is wrong
HORIZONS = (STEP, 2 * STEP, 4 * STEP)  # tokens of a round's draft, against all of the answer at once
AHEAD_LAYERS = 4  # of the draft where drafting ahead is measured, out of the target's 30
PROMPT = "list : " + " ; ".join(f"#{i} fig rome {3 * i}" for i in range(1, 9)) + " ."
COMPILE = True
PASS_RATIOS = ("verify_over_prefill", "verify_over_equal_prefill", "sequential_over_verify", "evidence_over_verify")


def measure(models: Sequence[str], batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """All rows: of passes, decoding loops and whole answers."""
    rows: list[dict[str, Any]] = []
    for name in models:
        target, draft, tokenizer = load_pair(name)
        shapes = [(n, k, s, b) for b in batches for n, k in SHAPES for s in SUFFIXES]
        if name == "smollm2":  # minutes a pass otherwise
            shapes = [(n, k, s, b) for n, k, s, b in shapes if b * (n + k * s) <= 2560]
        ahead = name == "smollm2" and target.device.type == "cpu" and torch.get_num_threads() > 1
        figures = len(shapes) + 2 * len(batches) + 1 + 2 * len(HORIZONS) * ahead
        with progress_bar(name, total=figures) as bar:
            for n, k, s, b in shapes:
                ratios = pass_ratios(target, n, k, s, b, max(2, repeats // b))
                rows.append({"model": name, "N": n, "K": k, "S": s, "batch": b, **ratios})
                bar.update()
            for b in batches:
                for role, model in {"target": target, "draft": draft}.items():
                    if role == "target" or model is not target:
                        ratio = decode_ratio(model, tokenizer, b, repeats)
                        rows.append({"model": name, "role": role, "batch": b, "decode_over_generate": ratio})
                bar.update()
            script = Scripted(WRONG, suffix_ids=[7, 8, 9, 10])
            engine = ScriptedEngine(target, tokenizer, draft, tokenizer, script, segments=STEP, compile=COMPILE)
            for b in batches:
                whole = answer_figures(engine, b, repeats)
                rows.append({"model": name, "N": ANSWER, "K": ANSWER // STEP, "S": 4, "batch": b, **whole})
                bar.update()
            rows += [{"model": name, "N": ANSWER, **row} for row in horizon_ratios(engine, repeats)]
            bar.update()
            if ahead:
                small = with_layers(load_smollm2()[0], AHEAD_LAYERS)
                engine = ScriptedEngine(target, tokenizer, small, tokenizer, script, segments=STEP, compile=False)
                for row in ahead_ratios(engine, max(2, repeats // 2)):
                    rows.append({"model": name, "N": ANSWER, **row})
                    bar.update()
    return rows


def some_prompts(
    model: PreTrainedModel, count: int, length: int = PROMPT_TOKENS, seed: int | None = None
) -> list[list[int]]:
    """Random tokens: a list of `length` a prompt; the same for the same seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (count, length), generator=generator).tolist()  # type: ignore[no-any-return]


def pass_ratios(model: PreTrainedModel, n: int, k: int, s: int, batch: int, repeats: int) -> dict[str, float]:
    """The packed pass over N draft tokens, K cuts and S suffix tokens, against plain passes after the same prompt.

    Returns:
        its time over a prefill of the draft alone, over a prefill of as many tokens, and the time of K passes
        one after the other, each reusing the cache, over its own.
    """
    ratio = take_turns(pass_ways(ModelRunner(model), n, k, s, batch), repeats)
    return {
        "verify_over_prefill": ratio("packed", "prefill"),
        "verify_over_equal_prefill": ratio("packed", "equal"),
        "sequential_over_verify": ratio("sequential", "packed"),
        "evidence_over_verify": ratio("evidence", "packed"),
    }


def pass_ways(runner: ModelRunner, n: int, k: int, s: int, batch: int) -> dict[str, Callable[[], None]]:
    """A packed pass, and what it is compared with, after prompts that are read here.

    The packed pass gives the logits after every cut and every suffix, a plain one those after its last token.
    "evidence" is the packed pass with the logits of all draft tokens, which verifiers of the free evidence read.
    """
    draft, suffix = some_prompts(runner.model, 1, n)[0], some_prompts(runner.model, 1, s)[0]
    ends = [n * (i + 1) // k for i in range(k)]
    equal = [*draft, *some_prompts(runner.model, 1, k * s)[0]]
    contexts = [CachedSequence(runner) for _ in range(batch)]
    prompts = some_prompts(runner.model, batch)
    runner.forward([Pass(runner, c.row, ids) for c, ids in zip(contexts, prompts, strict=True)])

    def forget(length: int = PROMPT_TOKENS) -> None:
        for context in contexts:
            runner.cache.truncate(length, context.row)

    def plain(ids: list[int]) -> None:
        runner.forward([Pass(runner, context.row, ids) for context in contexts])
        forget()

    def packed(all_tokens: bool) -> None:
        layout = pack(draft, ends, suffix, past=PROMPT_TOKENS)
        keep = [*(range(n) if all_tokens else (end - 1 for end in ends)), *layout.last_suffix]
        runner.forward([Pass(runner, context.row, layout.ids, layout, keep) for context in contexts])
        forget()

    def sequential() -> None:
        for start, stop in pairwise([0, *ends]):
            ids = [*draft[start:stop], *suffix]
            runner.forward([Pass(runner, context.row, ids) for context in contexts])
            forget(PROMPT_TOKENS + stop)
        forget()

    return {
        "packed": partial(packed, False),
        "evidence": partial(packed, True),
        "prefill": partial(plain, draft),
        "equal": partial(plain, equal),
        "sequential": sequential,
    }


def decode_ratio(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, repeats: int, tokens: int = 64
) -> float:
    """`transformers` generate's seconds over those of our own loop for as many tokens, greedy, compiled if it pays."""
    engine = Engine(model, tokenizer, compile=COMPILE)
    ids = torch.tensor([engine.encode(PROMPT)] * batch, device=model.device)  # [B, L]

    def theirs() -> None:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)  # type: ignore[operator]

    def ours() -> None:
        engine.generate([PROMPT] * batch, tokens, method="target", batch_size=batch)

    with endless(engine), torch.inference_mode():
        return take_turns({"ours": ours, "theirs": theirs}, repeats)("theirs", "ours")


def answer_figures(engine: Engine, batch: int, repeats: int) -> dict[str, Any]:
    """Whole answers by a script: the models' share of the wall time, where the rest goes, and wall over ideal time.

    Ideal is what the forward passes take that the algorithm cannot do without: wide ones as they were, and steps
    at the median step.
    """
    settings: dict[str, Any] = {"max_new_tokens": ANSWER, "batch_size": batch}
    fractions, over_ideal, profiles = [], [], []
    with endless(engine):
        engine.generate([PROMPT] * batch, **settings)
        for _ in range(repeats):
            with stopwatch(engine) as watch:
                started = perf_counter()
                stats = engine.generate([PROMPT] * batch, **settings)[0].stats
                wall = perf_counter() - started
            step = {role: median(watch.passes[role, False]) for role in engine.models}
            wide = {role: watch.passes[role, True] for role in engine.models}
            ideal = (stats.draft_tokens - stats.rounds) * step["draft"]  # the last token need not be read
            ideal += (stats.target_tokens - (stats.rounds - 1)) * step["target"]  # nor the first of a repair
            ideal += sum(wide["target"]) + sum(wide["draft"])  # prompts, packed passes, repairs that the draft reads
            over_ideal.append(wall / ideal)
            fractions.append(watch.seconds[MODELS_LABEL] / wall)
            rest = {"bookkeeping": wall - sum(watch.seconds.values())}
            profiles.append({label: seconds / wall for label, seconds in {**watch.seconds, **rest}.items()})
    return {
        "model_time_fraction": median(fractions),
        "wall_over_ideal": median(over_ideal),
        "profile": {label: median(profile[label] for profile in profiles) for label in profiles[0]},
    }


def horizon_ratios(engine: Engine, repeats: int) -> list[dict[str, Any]]:
    """What a horizon does to an answer that is kept whole: its first token's time and its own, over those without."""
    horizons = (None, *HORIZONS)
    seconds: dict[int | None, list[tuple[float, float]]] = {horizon: [] for horizon in horizons}
    with endless(engine):
        for _ in range(repeats + 1):
            for horizon in horizons:
                started = perf_counter()
                stats = engine.generate(PROMPT, ANSWER, threshold=0.0, horizon=horizon)[0].stats
                seconds[horizon].append((stats.first_token_seconds, perf_counter() - started))
    rows: list[dict[str, Any]] = []
    for horizon in HORIZONS:
        turns = list(zip(seconds[horizon], seconds[None], strict=True))[1:]  # the first one was for warming up
        first, last = (median(mine[i] / whole[i] for mine, whole in turns) for i in range(2))
        rows.append({"horizon": horizon, "first_token_over_whole": first, "seconds_over_whole": last})
    return rows


def ahead_ratios(engine: Engine, repeats: int) -> Iterator[dict[str, Any]]:
    """Seconds of an answer that waits for each verdict before it drafts on, over those of one that drafts ahead.

    On two devices, each a core. The draft is kept whole, or wrong where the script says so.
    """

    def answer(apart: bool, **settings: Any) -> None:
        engine.pair.apart = apart
        engine.generate(PROMPT, ANSWER, **settings)

    with endless(engine), two_devices():
        for horizon, (kept, threshold) in product(HORIZONS, (("whole", 0.0), ("in part", None))):
            settings = {"horizon": horizon, "threshold": threshold}
            ways = {"waiting": partial(answer, False, **settings), "ahead": partial(answer, True, **settings)}
            ratio = take_turns(ways, repeats)("waiting", "ahead")
            yield {"horizon": horizon, "kept": kept, "waiting_over_ahead": ratio}


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The rows as tables: passes, decoding loops, whole answers and where their time went, horizons, drafting ahead."""
    for title, mark, columns in TABLES:
        if marked := [row for row in rows if mark in row]:
            yield of_rows(title, columns, marked)


def _shares(profile: dict[str, float]) -> str:
    return ", ".join(f"{label} {share:.1%}" for label, share in profile.items())


TABLES: tuple[tuple[str, str, Columns], ...] = (  # title, a key that its rows have and others have not, columns
    (
        "A packed pass of N draft tokens, K cuts and S suffix tokens",
        "verify_over_prefill",
        (
            ("model", "model", plain),
            ("texts", "batch", plain),
            ("N", "N", plain),
            ("K", "K", plain),
            ("S", "S", plain),
            ("/ prefill", "verify_over_prefill", times),
            ("/ equal prefill", "verify_over_equal_prefill", times),
            ("K passes /", "sequential_over_verify", times),
            ("evidence /", "evidence_over_verify", times),
        ),
    ),
    (
        "Decoding: seconds of transformers' generate over ours",
        "decode_over_generate",
        (
            ("model", "model", plain),
            ("role", "role", plain),
            ("texts", "batch", plain),
            ("generate / ours", "decode_over_generate", times),
        ),
    ),
    (
        "Whole answers: wall time over the ideal, and its parts",
        "profile",
        (
            ("model", "model", plain),
            ("texts", "batch", plain),
            ("wall time / ideal", "wall_over_ideal", times),
            ("models' share", "model_time_fraction", percent),
            ("parts", "profile", _shares),
        ),
    ),
    (
        "A horizon: seconds to the first token and of the whole answer, over those without one",
        "seconds_over_whole",
        (
            ("model", "model", plain),
            ("horizon", "horizon", plain),
            ("first token", "first_token_over_whole", times),
            ("answer", "seconds_over_whole", times),
        ),
    ),
    (
        "Drafting ahead, on two devices of a core each: the answer's seconds without it over those with it",
        "waiting_over_ahead",
        (
            ("model", "model", plain),
            ("horizon", "horizon", plain),
            ("draft kept", "kept", plain),
            ("without / with", "waiting_over_ahead", times),
        ),
    ),
)
