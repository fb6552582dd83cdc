"""Stage 3: what the draft answers, and which of its prefixes are valid; see `train.labels`.

A prompt's rollout follows the rounds of the engine: where a draft goes wrong, the target's way on from its last valid
prefix is followed up to the next cut, and the draft drafts again from there. So the verifier learns, and its threshold
is calibrated, on the drafts that it will meet: those after a repair as well. To learn from there are also those of
disturbed copies of the draft, which err more often; see `train.disturbed`.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from eval.generation import REFUSED, Row, Work, batched, finish_all
from eval.judges import Agreement, Checked, asked_by, controls, labeller_of
from eval.prompts import prompts_of
from eval.tasks import Task, load_task
from eval.tasks.task import FirstWrong, Prompt
from parse import Engine
from parse.model import ModelSequence
from parse.prompts import opens_thinking
from parse.sampling import GREEDY, Written
from parse.scheduler import run_together
from parse.segments import cut, ends_segment
from parse.text import encode_continuation, text_of, through_stop
from recipes.digests import of_values
from recipes.files import write_text
from recipes.pair import load_engine
from recipes.run import KEPT, Run
from recipes.schema import Recipe, RecipeError, to_dict
from train.disturbed import LEVELS, TRIED, WRONG, disturbed, matrices_of
from train.labels import Asked, Drafted, Labeller, Labels

Item = tuple[str, Prompt]  # a split, and one of its prompts

SAMPLED = 2  # ways on by which a label is asked again
CONTROLS = 24  # prompts whose answers measure the noise of agreement


def run(recipe: Recipe, run: Run) -> None:
    """Write `rollouts/`, one row per draft, and `labels.json`, what the labels cost and how far they can be trusted.

    Columns: split, number (of the prompt), round (repairs before the draft), met (whether the engine would meet it: a
    greedy draft, without a fault put in), prompt, prompt_ids, prefix_ids (the answer so far), draft_ids, ended, ends,
    valid (one a cut), target_right, continuation_ids (the target's, after the last valid prefix).
    """
    write_rollouts(recipe, run, "rollouts", run.path("distill"))


def write_rollouts(recipe: Recipe, run: Run, stage: str, draft_folder: Path) -> None:
    """The stage's body, for the draft in a folder."""
    with run.stage(stage) as folder:
        task, section = load_task(recipe.task, to_dict(recipe.data)), recipe.rollouts
        engine = load_engine(recipe, draft_folder)
        draft = engine.draft
        assert draft is not None
        prompts = sorted(prompts_of(recipe, task, stage).prompts, key=lambda item: item[0] == "train")
        labeller, noise = _labeller(recipe, engine, task, [prompt for _, prompt in prompts])
        budget = TimeBudget(section.minutes)
        known: defaultdict[str, Asked] = defaultdict(dict)  # by prompt

        async def roll(item: Item, met: bool = True) -> Row:
            split, prompt = item
            labels, asked = labels_of(recipe, task, split), known[of_values([prompt])]
            if split == "train" and budget.is_over():
                return {"split": split, "prompt": prompt, "rounds": [], REFUSED: "there was no time left"}
            count = section.rounds if met else 1
            rounds = await roll_out(labeller, prompt, count, labels, recipe.engine.horizon, met, asked)
            if split == "train" and labels == "checker" and met:
                rounds += [fault for row in rounds for fault in with_faults(labeller, prompt, row, section.negatives)]
            return {"split": split, "prompt": prompt, "rounds": rounds}

        def roll_all(name: str, items: list[Item], what: str, met: bool) -> list[Row]:
            work: Work[Item] = batched(partial(roll, met=met), section.batch_size)
            return finish_all(folder / KEPT / name, items, work, what)

        found = roll_all("rollouts", prompts, stage, met=True)
        numbered, noise_levels = [*enumerate(found)], list[float]()
        learnt = {number: item for number, item in enumerate(prompts) if item[0] == "train"}
        aligns = recipe.aligned and stage == "rollouts"  # the draft learns from these, and from its own alone
        for copy in range(1, section.drafts if matrices_of(draft) and not aligns else 1):
            roll_copy, seed = partial(roll_all, met=False), recipe.seed * 997 + copy
            rolled, level = _roll_disturbed(draft, seed, f"copy {copy}", [*learnt.values()], roll_copy)
            if level is None:
                break
            numbered += zip(learnt, rolled, strict=True)
            noise_levels.append(level)
        rows = [
            {"split": row["split"], "number": number, "prompt": row["prompt"], **drafted}
            for number, row in sorted(numbered, key=lambda pair: pair[0])
            for drafted in row["rounds"]
        ]
        if not rows:
            raise RecipeError(
                f"{stage}: the draft of {draft_folder} answered none of {len(prompts)} prompts with a whole segment: "
                "see what it learnt (losses.json), and whether draft and target end their answers alike"
            )
        labels = {split: labels_of(recipe, task, split) for split in ("train", "calibration", "test")}
        again = _ask_again(
            folder / KEPT / "again", labeller, rows, labels, section.recheck, section.batch_size, recipe.seed
        )
        again |= _disagreement(again.pop("places"), rows, labels)
        if run.is_main:
            Dataset.from_list(rows).save_to_disk(folder)
            late = sum(REFUSED in row for row in found)
            summary = {
                **_balance(rows),
                "not_taken_up": late,
                "labels": labels,
                "noise_levels": noise_levels,
                **again,
                **noise,
            }
            write_text(Path(folder) / "labels.json", json.dumps(summary, indent=2) + "\n")
            _explain(stage, summary)
            run.log(stage, {key: value for key, value in summary.items() if isinstance(value, int | float)})


def _roll_disturbed(
    draft: nn.Module, seed: int, name: str, items: list[Item], roll_all: Callable[[str, list[Item], str], list[Row]]
) -> tuple[list[Row], float | None]:
    """What a disturbed copy of the draft answers, and its noise: the first level at which enough of it is wrong.

    Nothing where there is no time left to find the level.
    """
    for level in LEVELS:
        place, what = f"{name}, {level}", f"disturbed {name}, noise {level}"
        with disturbed(draft, level, seed):
            tried = roll_all(place, items[:TRIED], what)
            if any(REFUSED in row for row in tried):
                break
            wrong = sum(not row["rounds"] or not all(row["rounds"][-1]["valid"]) for row in tried)
            if wrong >= WRONG * len(tried) or level == LEVELS[-1]:
                return roll_all(place, items, what), level
    return [], None


class TimeBudget:
    """Some minutes, which begin when it is first asked whether they are over."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds, self._started = 60 * (minutes or math.inf), math.nan

    def is_over(self) -> bool:
        """Whether they are."""
        if math.isnan(self._started):
            self._started = time.monotonic()
        return time.monotonic() - self._started > self._seconds


def labels_of(recipe: Recipe, task: Task, split: str) -> str:
    """Where the labels of a split's drafts come from: "checker", "bisect" or "all".

    Raises:
        RecipeError: where the task's program is asked for what it does not know.
    """
    labels = recipe.rollouts.labels
    knows = program_of(recipe, task) is not None
    if labels == "checker" and not knows:
        raise RecipeError(
            f"rollouts.labels is 'checker', and {recipe.task} has no program that knows the first wrong sentence of an "
            "answer, or rollouts.labeller leaves it out, or drafts are cut within sentences (segments or "
            "engine.horizon is a number): use bisect"
        )
    if labels == "checker" or (split == "train" and knows and labels == "auto"):
        return "checker"
    return "all" if labels == "all" else "bisect"


def program_of(recipe: Recipe, task: Task) -> FirstWrong | None:
    """The task's program that knows the first wrong sentence, where drafts are cut after whole ones."""
    within = isinstance(recipe.segments, int) or isinstance(recipe.engine.horizon, int)
    return None if within or labeller_of(recipe, task) != "task" else task.first_wrong


async def roll_out(
    labeller: Labeller,
    prompt: Prompt,
    rounds: int,
    labels: str,
    horizon: int | str | None = None,
    met: bool = True,
    asked: Asked | None = None,
) -> list[Row]:
    """The drafts of one prompt with their labels, as the engine's rounds meet them.

    A draft that is valid up to the horizon is continued by the next one; one that goes wrong, after a repair.

    Args:
        rounds: the target repairs fewer drafts than that.
        labels: "checker", "bisect" or "all".
        met: whether the engine meets these drafts; those of disturbed copies it does not.
        asked: what is known of prefixes of this prompt's answers; see `Labeller.label`.
    """
    engine, asked = labeller.engine, {} if asked is None else asked
    prompt_ids = engine.encode(prompt)
    target = engine.models["target"].open(prompt_ids)
    draft = engine.models["draft"].open(engine.encode_for_draft(prompt))
    found: list[Row] = []
    prefix: list[int] = []
    repairs = 0
    try:
        while repairs < rounds and len(prefix) < labeller.limit:
            given = await _drafting(labeller, prompt, draft, prefix, horizon)
            if not given.ends:  # the engine lets the target write the rest
                break
            if labels == "checker":
                label = await labeller.label_by_checker(target, given, repair=met)
            else:
                label = await labeller.label(target, given, labels == "all", asked)
            found.append({"round": repairs, "met": met, "prompt_ids": prompt_ids, **_row_of(given, label)})
            if all(label.valid) and given.right is None:
                prefix = [*prefix, *given.written.ids]
                continue
            if all(label.valid) or not label.target_right or repairs + 1 >= rounds:
                break
            repaired = _repaired(engine, given, label)
            if repaired is None:
                break
            prefix, repairs = repaired, repairs + 1
    finally:
        target.close()
        draft.close()
    return found


async def _drafting(
    labeller: Labeller,
    prompt: Prompt,
    draft: ModelSequence,
    prefix: list[int],
    horizon: int | str | None,
) -> Drafted:
    """The draft's next part of an answer, in the target's tokens; where it ends the answer, whether that is right."""
    engine = labeller.engine
    room = labeller.limit - len(prefix)
    drafted = await engine.pair.write_draft(draft, prefix, room, horizon, GREEDY, labeller.stops)
    written = Written(engine.pair.to_target(drafted.ids), drafted.ended)
    answer = [*prefix, *written.ids]
    right, ended = None, written.ended or through_stop(answer, labeller.stops, engine.tokenizer) is not None
    if ended or len(answer) >= labeller.limit:
        right = ended and (await labeller.judge.is_right(prompt, text_of(answer, engine.tokenizer)))
    return Drafted(prompt, prefix, written, cut(written.ids, engine.tokenizer, engine.segments), right)


def _row_of(given: Drafted, label: Labels) -> Row:
    return {
        "prefix_ids": given.prefix,
        "draft_ids": given.written.ids,
        "ended": given.written.ended,
        "ends": given.ends,
        "valid": label.valid,
        "target_right": label.target_right,
        "continuation_ids": label.continuation_ids,
    }


def _repaired(engine: Engine, given: Drafted, label: Labels) -> list[int] | None:
    """The answer up to the end of the target's repair of a draft that went wrong; None where that ends the answer."""
    repair = first_segment(engine, label.continuation_ids)
    if label.continuation_ended and len(repair) == len(label.continuation_ids):
        return None
    return [*given.prefix, *given.written.ids[: [0, *given.ends][label.valid.index(False)]], *repair]


def with_faults(labeller: Labeller, prompt: Prompt, row: Row, count: int) -> list[Row]:
    """A whole draft that is right, with a fault in each copy, where the task makes them; see `eval.tasks.Task`."""
    if not row["ended"] or row["prefix_ids"] or not all(row["valid"]):
        return []
    assert isinstance(labeller.judge, Checked)
    assert labeller.first_wrong is not None
    tokenizer, answer = labeller.engine.tokenizer, text_of(row["draft_ids"], labeller.engine.tokenizer)
    rows = []
    for number in range(count):
        text = labeller.judge.corrupted(prompt, answer, random.Random(f"{labeller.seed} {number} {answer}"))
        if text is None:
            continue
        ids = encode_continuation(text, tokenizer)
        ends = cut(ids, tokenizer, labeller.engine.segments)
        valid = [labeller.first_wrong(prompt, text_of(ids[:end], tokenizer)) is None for end in ends]
        valid[-1] = False  # what was left out is missing at the end
        rows.append({**row, "met": False, "draft_ids": ids, "ends": ends, "valid": valid, "continuation_ids": []})
    return rows


def first_segment(engine: Engine, ids: list[int]) -> list[int]:
    """The tokens up to the first cut, as the engine stops the target there."""
    for length in range(1, len(ids)):
        if ends_segment(ids[:length], engine.tokenizer, engine.segments):
            return ids[:length]
    return ids


def _labeller(recipe: Recipe, engine: Engine, task: Task, prompts: list[Prompt]) -> tuple[Labeller, dict[str, Any]]:
    """The recipe's labeller, and what is known of its noise beforehand."""
    section, limit = recipe.rollouts, recipe.engine.max_new_tokens
    if labeller_of(recipe, task) == "task":
        checked = Checked(task, opens_thinking(engine.tokenizer))
        program = checked.first_wrong if program_of(recipe, task) else None
        return Labeller(engine, checked, limit, program, section.samples, recipe.seed, task.stop), {"labeller": "task"}
    agreement = Agreement(engine, limit, asked_by(recipe, engine))

    def run_all(many: Any) -> list[float]:
        finished = dict(run_together(many, section.batch_size))
        return [finished[i] for i in range(len(finished))]

    noise = controls(agreement, prompts[-CONTROLS:], run_all)  # training prompts
    return Labeller(engine, agreement, limit, None, section.samples, recipe.seed), {"labeller": "agreement", **noise}


def _ask_again(
    folder: Path, labeller: Labeller, rows: list[Row], labels: dict[str, str], count: int, at_once: int, seed: int
) -> dict[str, Any]:
    """Ask about some labelled prefixes by themselves: how often the label is another, and how often by sampled ways on.

    The first is how often bisection and asking about every prefix disagree. The last prefix of a draft is not among
    them: its label is the draft's own outcome. Nor are drafts of disturbed copies.
    """
    known = [row["met"] and (row["target_right"] or labels[row["split"]] == "checker") for row in rows]
    places = [(i, k) for i, row in enumerate(rows) for k in range(len(row["ends"]) - 1) if known[i]]
    chosen = random.Random(seed).sample(places, min(count, len(places)))

    async def ask_again(place: tuple[int, int]) -> Row:
        row, k = rows[place[0]], place[1]
        start = [*row["prefix_ids"], *row["draft_ids"][: row["ends"][k]]]
        target = labeller.engine.models["target"].open(labeller.engine.encode(row["prompt"]))
        try:
            direct, _ = await labeller.finish(target, row["prompt"], start)
            others = 0
            for sample in range(SAMPLED):
                right, _ = await labeller.finish(target, row["prompt"], start, sample)
                others += right != row["valid"][k]
        finally:
            target.close()
        return {"direct": direct != row["valid"][k], "sampled": others / SAMPLED}

    started = time.perf_counter()
    start_of = lambda place: [rows[place[0]][key] for key in ("prompt", "prefix_ids", "draft_ids")] + [place[1]]
    asked = finish_all(folder, chosen, batched(ask_again, at_once), "labels again", start_of)
    seconds = time.perf_counter() - started
    share = lambda key: sum(row[key] for row in asked) / len(asked) if asked else None
    return {
        "places": [(place, row["direct"]) for place, row in zip(chosen, asked, strict=True)],
        "asked_again": len(asked),
        "other_label": share("direct"),
        "other_label_sampled": share("sampled"),
        "seconds_per_label": seconds / ((1 + SAMPLED) * len(asked)) if asked else None,
    }


def _disagreement(asked: list[tuple[tuple[int, int], bool]], rows: list[Row], labels: dict[str, str]) -> dict[str, Any]:
    """How often the target's way on gives another label than the task's program did, of those asked again."""
    found = [other for (i, _), other in asked if labels[rows[i]["split"]] == "checker"]
    return {"checker_asked_again": len(found), "checker_other_label": sum(found) / len(found)} if found else {}


def _balance(rows: list[Row]) -> dict[str, Any]:
    """How many of what there are."""
    met = [row for row in rows if row["met"]]
    first = {row["number"]: True for row in met}  # whether all that is drafted before a repair is valid
    for row in met:
        if row["round"] == 0:
            first[row["number"]] &= all(row["valid"])
    known = [(sum(row["valid"]), row["valid"].count(False)) for row in met]
    return {
        "prompts": dict(Counter({row["number"]: row["split"] for row in rows}.values())),
        "drafts": len(met),
        "drafts_made": len(rows) - len(met),  # by disturbed copies, or with a fault put in
        "drafts_made_wrong": sum(not all(row["valid"]) for row in rows if not row["met"]),
        "drafts_right": sum(first.values()) / max(len(first), 1),
        "prefixes": sum(valid + invalid for valid, invalid in known),
        "valid_prefixes": sum(valid for valid, _ in known),
    }


def _explain(stage: str, summary: dict[str, Any]) -> None:
    share = summary["valid_prefixes"] / summary["prefixes"]
    print(
        f"{stage}: {sum(summary['prompts'].values())} prompts, {summary['drafts']} drafts with those after repairs, "
        f"the first one right in {summary['drafts_right']:.1%}; {share:.1%} of {summary['prefixes']} prefixes valid"
    )
    if summary["drafts_made"]:
        levels = ", ".join(map(str, summary["noise_levels"])) or "no copy"
        print(
            f"  to learn from, {summary['drafts_made']} drafts of disturbed copies (noise {levels}) and with faults, "
            f"{summary['drafts_made_wrong']} of them wrong"
        )
    if summary["not_taken_up"]:
        print(f"  {summary['not_taken_up']} prompts to learn from were not taken up within rollouts.minutes")
    if summary["asked_again"]:
        print(
            f"  labels: {summary['other_label']:.1%} of {summary['asked_again']} are others when asked by themselves, "
            f"{summary['other_label_sampled']:.1%} by sampled ways on; {summary['seconds_per_label']:.2f} s a label"
        )
    if "checker_other_label" in summary:
        print(
            f"  by the task's program: {summary['checker_other_label']:.1%} of {summary['checker_asked_again']} labels "
            "are others by the target's way on"
        )
    if "same_called_different" in summary:
        print(
            f"  agreement: calls {summary['same_called_different']:.1%} of pairs different that say the same, and "
            f"{summary['different_called_same']:.1%} the same that do not"
        )
