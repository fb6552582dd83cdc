"""What makes the demonstration worth anything: properties of the pair of models, measured.

A task on which the free rules separate right from wrong, or on which the draft writes what the target
would have written, needs no semantic verifier. These figures say whether it is so.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from eval.generation import write_all
from eval.judges import Checked
from eval.methods import Outcome
from eval.tasks import Task
from eval.tasks.task import Prompt
from eval.verifier_metrics import Draft, Example, all_needs, examine, measure, score, untrained_kinds, valid_cuts
from parse import Engine
from parse.local.model import LocalModel
from parse.prompts import opens_thinking
from parse.segments import cut
from parse.text import text_of
from recipes.progress import progress_bar

JUDGED = 100  # of the draft's answers: a pass of the target each


def judge_drafts(
    engine: Engine, task: Task, outcomes: Sequence[Outcome], layers: tuple[int, ...] = ()
) -> list[Example]:
    """The draft's own answers with the target's evidence, each prefix labelled by the task's program."""
    checked = Checked(task, opens_thinking(engine.tokenizer))
    drafts = []
    for number, outcome in enumerate(outcomes):
        ids, ended = outcome.generation.token_ids, outcome.generation.finish_reason == "stop"
        ends = cut(ids, engine.tokenizer, engine.segments)
        prefixes = [text_of(ids[:end], engine.tokenizer) for end in ends]
        valid = [checked.first_wrong(outcome.prompt, prefix) is None for prefix in prefixes]
        if ids:
            valid[-1] = outcome.right if ended else valid[-1]
            drafts.append(Draft(engine.encode(outcome.prompt), ids, ends, ended, valid, number=number))
    examples = []
    with progress_bar("the draft's answers judged", total=len(drafts)) as bar:
        for one in examine(engine, drafts, all_needs(engine, layers), with_draft=True):
            examples.append(one)
            bar.update()
    return examples


def measure_pair(engine: Engine, task: Task, target: Sequence[Outcome], draft: Sequence[Outcome]) -> dict[str, Any]:
    """The properties of target and draft on the same prompts, of a task that knows the first wrong sentence.

    What takes a pass over the draft's answer (AUC, kept tokens) is of the first `JUDGED` prompts.
    """
    examples = judge_drafts(engine, task, draft[:JUDGED])
    kinds = untrained_kinds(engine)
    lengths = [len(outcome.generation.token_ids) for outcome in target]
    oracle = sum([0, *one.draft.ends][valid_cuts(one.draft.valid)] for one in examples)
    seconds = [
        sum(o.seconds for o in side) / sum(len(o.generation.token_ids) for o in side) for side in (target, draft)
    ]
    draft_layers = engine.draft.config.num_hidden_layers if engine.draft else 0
    return {
        "answer_tokens": {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)},
        "target_accuracy": sum(o.right for o in target) / len(target),
        "target_accuracy_after_foreign_prefix": foreign_accuracy(engine, task, [o.prompt for o in target]),
        "draft_accuracy": sum(o.right for o in draft) / len(draft),
        "judged": len(examples),
        "auc": {name: measure(score(kind, examples), 0.5)["auc"] for name, kind in kinds.items()},
        "oracle_tokens": oracle / len(examples),
        "lossless_tokens": sum(_agreeing(one) for one in examples) / len(examples),
        "target_layers": engine.target.config.num_hidden_layers,
        "draft_layers": draft_layers,
        "cost_ratio": seconds[0] / seconds[1],
        "generate_over_target_loop": generate_over_target_loop(engine, [o.prompt for o in target[:4]]),
    }


def generate_over_target_loop(engine: Engine, prompts: Sequence[Prompt], limit: int = 128) -> float:
    """Seconds of `transformers` generate over those of our own target-alone loop, in turns, greedy, the same tokens."""
    ours = theirs = 0.0
    with progress_bar("transformers' generate", total=len(prompts)) as bar:
        for prompt in prompts:
            ids = torch.tensor([engine.encode(prompt)], device=engine.target.device)  # [1, L]
            started = time.perf_counter()
            engine.generate(prompt, limit, method="target")
            middle = time.perf_counter()
            with torch.inference_mode():
                engine.target.generate(
                    ids, max_new_tokens=limit, do_sample=False, pad_token_id=engine.tokenizer.eos_token_id
                )
            ours += middle - started
            theirs += time.perf_counter() - middle
            bar.update()
    return theirs / ours


def foreign_accuracy(engine: Engine, task: Task, prompts: Sequence[Prompt]) -> float | None:
    """How often the target finishes rightly a right prefix in a foreign manner; None where the task has none."""
    if task.foreign_prefix is None:
        return None
    rng = random.Random(0)
    prefixes = [task.foreign_prefix(prompt, rng) for prompt in prompts]
    encode = engine.tokenizer.encode
    ids = [
        [*engine.encode(prompt), *encode(prefix, add_special_tokens=False)]
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    target = engine.models["target"]
    plain = target.with_own_cache(compiled=False) if isinstance(target, LocalModel) else target  # compiling takes long
    written = write_all(plain, ids, 256, 50, "foreign prefixes")
    return sum(
        answer.ended and task.check(prompt, f"{prefix} {engine.tokenizer.decode(answer.ids)}")
        for prompt, prefix, answer in zip(prompts, prefixes, written, strict=True)
    ) / len(prompts)


def _agreeing(example: Example) -> int:
    """Leading tokens of a draft that the target would have written itself: what lossless speculation keeps."""
    agrees = (example.evidence.margin[: example.evidence.ends[-1]] <= 0).long()  # [N]
    return int(agrees.cumprod(0).sum())
