"""Parity of training and serving: what training saw of prompts and answers, against what the engine feeds.

A draft that was trained on other tokens than it meets in the engine is accepted less often, and nothing fails. Training
keeps what it saw of the first answers, as ids and masks, after the library's own collator; here they are compared,
token by token, with what the engine makes of the same prompts today. A chat template that changed, or that writes the
date, another tokenizer, a mask that leaves out the end: each is named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parse import Engine
from parse.text import text_of
from recipes.command import run_command
from recipes.files import write_text
from recipes.schema import Recipe

EXAMPLES = "examples.json"  # in a draft's folder
COUNT = 20  # prompts that are compared


class Check(NamedTuple):
    """One comparison: how many prompts were alike, and the first that was not, in words."""

    name: str
    alike: int
    compared: int  # 0 where training left no record
    difference: str = ""

    @property
    def text(self) -> str:
        """The outcome in words."""
        if not self.compared:
            return "not compared: training left no record"
        return self.difference or f"alike in all of {self.compared} prompts"


def main(arguments: Sequence[str]) -> int:
    """Print a line for each comparison; the status is 1 where any differs."""
    parser = argparse.ArgumentParser(prog="python -m eval parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a YAML file whose run is trained")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    return run_command(lambda _: _main(options))


def _main(options: argparse.Namespace) -> int:
    from recipes.pair import load_engine
    from recipes.schema import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    checks = compare(load_engine(recipe, recipe.evaluated[0]), recipe)
    for check in checks:
        print(f"{check.name:24s}{check.text}")
    return int(any(check.difference for check in checks))


def save_examples(folder: Path, prompts: Sequence[Any], answers: Sequence[str], batch: dict[str, Any]) -> None:
    """Keep what training saw of the first answers.

    Args:
        folder: of the draft.
        batch: as the trainer's collator gives it: input_ids, attention_mask and labels, int64 [B, T], of which -100 is
            not learnt.
    """
    rows = []
    names = ("input_ids", "attention_mask", "labels")
    for prompt, answer, ids, mask, labels in zip(
        prompts, answers, *(batch[name].tolist() for name in names), strict=True
    ):
        shown = [i for i, attended in enumerate(mask) if attended]
        tokens, learnt = [ids[i] for i in shown], [labels[i] != -100 for i in shown]
        rows.append({"prompt": prompt, "answer": answer, "input_ids": tokens, "learnt": learnt})
    write_text(folder / EXAMPLES, json.dumps(rows))


def compare(engine: Engine, recipe: Recipe) -> list[Check]:
    """Every comparison that the run's folder, or the evaluated draft's, has the records for."""
    return [*_of_target(engine, recipe), *(_of_draft(engine, recipe) if "draft" in engine.models else ())]


def _of_target(engine: Engine, recipe: Recipe) -> list[Check]:
    """The target's prompts, as its answers and the verifier's labels were made after them."""
    answers, rollouts = (_rows(folder) for folder in (recipe.folder / "answers", recipe.rollouts_folder))
    starts = [row["completion_mask"].index(1) for row in answers]
    prompts = [row["input_ids"][:start] for row, start in zip(answers, starts, strict=True)]
    fed = [engine.encode(row["prompt"]) for row in answers]
    judged, judged_fed = [row["prompt_ids"] for row in rollouts], [engine.encode(row["prompt"]) for row in rollouts]
    return [
        _tokens("target's prompt", prompts, fed, engine.tokenizer),
        _ends("target's end", answers, engine.models["target"].eos_ids),
        _tokens("verifier's prompt", judged, judged_fed, engine.tokenizer),
    ]


def _of_draft(engine: Engine, recipe: Recipe) -> list[Check]:
    """The draft's prompts, what it learnt of the answers, and where they end."""
    rows, tokenizer = _examples(recipe), engine.draft_tokenizer
    starts = [[*row["learnt"], True].index(True) for row in rows]
    prompts = [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)]
    learnt = [[id_ for id_, wanted in zip(row["input_ids"], row["learnt"], strict=True) if wanted][:-1] for row in rows]
    texts = [text_of(ids, tokenizer).strip() for ids in learnt]
    return [
        _tokens("draft's prompt", prompts, [engine.encode_for_draft(row["prompt"]) for row in rows], tokenizer),
        _equal("draft's answer", texts, [row["answer"].strip() for row in rows]),
        _equal("draft learns the end", [row["learnt"][-1] for row in rows], [True] * len(rows)),
        _ends("draft's end", rows, engine.models["draft"].eos_ids),
    ]


def _tokens(name: str, seen: Sequence[Sequence[int]], fed: Sequence[Sequence[int]], tokenizer: Any) -> Check:
    """Token ids; the first that differs is named with its text."""

    def shown(ids: Sequence[int], place: int) -> str:
        return f"{tokenizer.decode(ids[place : place + 1])!r} ({ids[place]})" if place < len(ids) else "the end"

    def words(ours: Sequence[int], theirs: Sequence[int]) -> str:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        return f"token {place} was {shown(ours, place)} in training and is {shown(theirs, place)} in the engine"

    return _check(name, [list(ids) for ids in seen], [list(ids) for ids in fed], words)


def _equal(name: str, seen: Sequence[Any], fed: Sequence[Any]) -> Check:
    return _check(name, seen, fed, lambda ours, theirs: f"{ours!r:.80} in training, {theirs!r:.80} expected")


def _ends(name: str, rows: Sequence[dict[str, Any]], ends: frozenset[int]) -> Check:
    """The last token that was learnt is one at which the engine stops."""
    seen = [row["input_ids"][-1] for row in rows]
    fed = [last if last in ends else min(ends, default=-1) for last in seen]
    stops = f"the engine stops at {sorted(ends)}"
    return _check(name, seen, fed, lambda ours, _: f"token {ours} ended the answer in training, {stops}")


def _check(name: str, seen: Sequence[Any], fed: Sequence[Any], words: Callable[[Any, Any], str]) -> Check:
    """Compare what training saw with what the engine feeds, one entry per prompt."""
    others = [i for i, (ours, theirs) in enumerate(zip(seen, fed, strict=True)) if ours != theirs]
    difference = ""
    if others:
        first = others[0]
        difference = f"differs in {len(others)} of {len(seen)} prompts; in number {first + 1} "
        difference += words(seen[first], fed[first])
    return Check(name, len(seen) - len(others), len(seen), difference)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The first rows of a data set of the run; none where it is not made."""
    from datasets import Dataset, load_from_disk

    if not (folder / "dataset_info.json").is_file():
        return []
    rows = load_from_disk(folder)
    assert isinstance(rows, Dataset)
    return list(rows.select(range(min(COUNT, len(rows)))))


def _examples(recipe: Recipe) -> list[dict[str, Any]]:
    """What the evaluated draft's training kept, or that of the run's draft that a LoRA was added to."""
    own = [] if recipe.eval.draft else [recipe.folder / "draft"]
    for folder in (recipe.evaluated[0], *own):
        if (file := folder / EXAMPLES).is_file():
            rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
            return rows[:COUNT]
    return []
