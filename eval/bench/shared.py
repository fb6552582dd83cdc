"""What the parts of `python -m eval.bench gpu` share: sizes, models that are made when first needed, figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eval.bench.fakes import Scripted, ScriptedEngine, runners_of
from eval.bench.models import EMBEDDED
from parse.local.compiled import Compiled
from parse.local.runner import ModelRunner

QWEN3: dict[str, Any] = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936, "rms_norm_eps": 1e-6}
SMALL: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 4, "vocab_size": 600}


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    target: dict[str, Any]  # configurations of Qwen3
    draft: dict[str, Any]
    dtype: torch.dtype
    copied: int  # bytes
    matrix: int  # rows and columns
    batches: tuple[int, ...]  # the middle one is measured last
    prompt: int  # tokens
    written: int  # tokens after it, where steps are measured
    passes: tuple[tuple[int, int, int], ...]  # N, K, S; the first is the one that is split up
    flex: tuple[tuple[int, int, int], ...]
    answer: int  # tokens
    step: int  # tokens from cut to cut in it
    kept: tuple[float, ...]  # shares of an answer's segments
    repeats: int
    pair: int  # prompts
    tests: str = "test"  # those with this in their names


FULL = Sizes(
    target={**QWEN3, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "tie_word_embeddings": False, "max_position_embeddings": 40_960},
    draft={**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "tie_word_embeddings": True, "max_position_embeddings": 40_960},
    dtype=torch.bfloat16,
    copied=2**32,
    matrix=8192,
    batches=(1, 32, 8),
    prompt=448,
    written=64,
    passes=(
        (1024, 64, 4),
        *((n, k, s) for n in (256, 1024, 2048) for k in (16, 64) for s in (1, 4) if n + k * s != 1280),
    ),
    flex=((1024, 64, 4), (2048, 64, 4)),
    answer=512,
    step=16,
    kept=(0.5, 0.8, 0.95),
    repeats=3,
    pair=24,
)
TINY = Sizes(
    target={**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": False},
    draft={**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True},
    dtype=torch.float32,
    copied=2**22,
    matrix=128,
    batches=(1, 2),
    prompt=12,
    written=4,
    passes=((32, 4, 2), (16, 4, 1)),
    flex=((32, 4, 2),),
    answer=32,
    step=4,
    kept=(0.5, 0.75),
    repeats=1,
    pair=2,
    tests="(llama or gpu)",
)


class Rows(list[dict[str, Any]]):
    """A part's figures, said and kept as they come."""

    def __init__(self, name: str, keep: Callable[[], None]) -> None:
        super().__init__()
        self._name, self._keep, self._started = name, keep, perf_counter()

    def note(self, **row: Any) -> None:
        """Add a row; its `table` names the table that it belongs to."""
        self.append(row)
        self._keep()
        said = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if not isinstance(value, list | dict))
        print(f"[{self._name}] {perf_counter() - self._started:5.1f} s  {said}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Bench:
    """What the parts share: sizes, the record of those before, and models that are made when first needed."""

    sizes: Sizes
    record: dict[str, Any]
    run: Path | None
    device: torch.device = field(default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def engine(self) -> ScriptedEngine:
        """Target and draft with random weights, made on the device, whose passes are compiled at once."""
        sizes, tokenizer = self.sizes, AutoTokenizer.from_pretrained(EMBEDDED / "ledger-target")
        models = [_random_model(config, sizes.dtype, self.device) for config in (sizes.target, sizes.draft)]
        script = Scripted((), suffix_ids=[7, 8, 9, 10], reads_draft=False)
        engine = ScriptedEngine(models[0], tokenizer, models[1], tokenizer, script, sizes.step, compile=True)
        if self.device.type == "cpu":  # the same way, but for what a GPU's compiler and CUDA graphs do
            for runner in runners_of(engine).values():
                runner.compiled = Compiled(runner.model, backend=lambda graph, inputs, **_: graph)
                runner.compiled.graph, runner.compiled.pays = True, {"steps": True, "wide": True}
        engine.warm_up(max(sizes.batches))
        return engine

    def runner(self, role: str, compiled: bool = True) -> ModelRunner:
        """A runner of the "target" or the "draft" with a cache of its own; nothing that is written ends a text."""
        shared = self.engine.models[role].runner
        return ModelRunner(shared.model, frozenset(), shared.compiled if compiled else None)

    def figure(self, part: str, table: str, key: str, **where: Any) -> float | None:
        """A figure that an earlier part left, if it did."""
        rows = self.record["parts"].get(part, {}).get("rows", [])
        found = [row[key] for row in rows if row["table"] == table and all(row[k] == v for k, v in where.items())]
        return float(found[0]) if found else None


def _random_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    made = AutoConfig.for_model("qwen3", **config, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(made, dtype=dtype)
    return model.eval()  # type: ignore[no-any-return, no-untyped-call]
