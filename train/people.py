"""python -m train.people OUT [--data FOLDER | --target FOLDER | --mix FILE ...]: rows to teach the task `restaurants`.

Each row is a prompt of the task and, as its reference, an answer made of descriptions by people, out of the cleaned E2E
NLG data (CC BY-SA 4.0, see `eval.tasks.restaurants`): of a folder of its CSV files, or from the hub. With `--target`, a
model that was taught so answers instead: of two sampled answers the right paragraphs are kept, so that it learns which
of its ways to say things are right. With `--mix` the right paragraphs of such files are put together anew, with other
names and values, as often as one likes: a small model learns from them to find in a prompt what it has to say. The
task's own target and draft were made by all three.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from eval.tasks import TASKS, draw_prompts
from eval.tasks.restaurants import (
    LEAST,
    MOST,
    PLACES,
    VALUES,
    Place,
    draw_attributes,
    is_wrong,
    paragraphs_of,
    prompt_text,
    read_prompt,
    sentences_of,
    split_of,
    wanted_values,
)
from eval.tasks.wordings import NAMES, NEAR, plain, stated
from recipes.files import write_text
from recipes.progress import progress_bar

HUB = "tuetschek/e2e_nlg_cleaned"
TEMPERATURE = 0.6  # at which a target answers
SAMPLES = 2  # answers to each prompt
AT_ONCE = 64
APART = 1000  # added to the seed, so that the prompts are others than a run's
_COLUMNS = {"eatType": "type", "priceRange": "price", "customer rating": "rating", "familyFriendly": "family"}
_STYLES = {  # values that stand for the same levels, in the same order, in words and in numbers
    "price": (("cheap", "moderate", "high"), ("less than £20", "£20-25", "more than £30")),
    "rating": (("low", "average", "high"), ("1 out of 5", "3 out of 5", "5 out of 5")),
    "area": (("riverside", "city centre"),),
    "type": (VALUES["type"],),
    "food": (tuple(food for food in VALUES["food"] if food != "Fast food"),),
}
_SPELLINGS = {  # how people spell such values, so that one can stand in the other's place
    "price": (
        ("cheap", "moderately priced", "expensive"),
        ("low price range", "moderate price range", "high price range"),
        ("cheap price range", "moderate price range", "high price range"),
        ("less than £20", "£20-25", "more than £30"),
    ),
    "rating": (
        ("low customer rating", "average customer rating", "high customer rating"),
        ("1 out of 5", "3 out of 5", "5 out of 5"),
    ),
    "area": (("in the riverside area", "in the city centre"), ("on the riverside", "in the city centre")),
    "type": _STYLES["type"],
    "food": _STYLES["food"],
}


def main(arguments: list[str] | None = None) -> int:
    """Write the rows as JSONL."""
    parser = argparse.ArgumentParser(prog="python -m train.people", description=__doc__)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--data", type=Path, help=f"a folder of CSV files (mr, ref); else {HUB} from the hub")
    parser.add_argument("--target", type=Path, help="a model, or a LoRA, that answers in people's place")
    parser.add_argument("--mix", type=Path, nargs="+", default=[], help="files of rows whose paragraphs are mixed anew")
    parser.add_argument("--rows", type=int, default=16_000, help="rows, or prompts that the target is asked")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.data, options.target, options.mix))) > 1:
        parser.error("give --data, --target or --mix, one of them")
    try:
        if options.target:
            found = _by_target(options.target, options.rows, options.seed)
        elif options.mix:
            found = retold(_answers_in(options.mix), options.rows, options.seed)
        else:
            found = people(_rows(options.data), options.rows, options.seed)
        lines = []
        with progress_bar("rows", total=options.rows) as bar:
            for prompt, answer in found:
                if answer is not None:
                    lines.append(json.dumps({"prompt": prompt, "reference": answer, "split": "answers"}) + "\n")
                bar.update()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, "".join(lines))
    return 0


def _rows(folder: Path | None) -> Iterable[Mapping[str, str]]:
    if folder is not None:
        return list(rows_of(folder))
    from datasets import load_dataset

    return load_dataset(HUB, split="train")  # type: ignore[no-any-return]


def _answers_in(files: Iterable[Path]) -> list[tuple[str, str]]:
    """The prompts and references of files that this command wrote."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    try:
        return [(row["prompt"], row["reference"]) for row in map(json.loads, lines)]
    except (KeyError, TypeError) as error:
        raise ValueError("--mix takes JSONL files of rows with `prompt` and `reference`, as --target writes") from error


def _by_target(target: Path, count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """Training prompts, and an answer to each of what the target says rightly; None where that is not all of it."""
    import torch

    from parse import Engine

    engine = Engine.from_pretrained(target, dtype=torch.bfloat16)
    prompts = [str(prompt) for prompt in draw_prompts(TASKS["restaurants"], "train", count, APART + seed)]
    for start in range(0, count, AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answers = [
            engine.generate(
                some, 256, method="target", batch_size=AT_ONCE, temperature=TEMPERATURE, seed=start + sample
            )
            for sample in range(SAMPLES)
        ]
        for prompt, *told in zip(some, *answers, strict=True):
            yield prompt, best_of(prompt, [answer.text for answer in told])


def people(rows: Iterable[Mapping[str, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts, and answers made of people's descriptions, of the split "train" alone.

    Descriptions that the checker calls wrong are left out. Names and values are exchanged for others, in the set and in
    the text alike, so that each is seen beside all others and what a text says cannot be guessed from its wording. Then
    the set is another one, and has to belong to the split too. Sets have the attributes that the prompts' sets have,
    listed in the order in which the text states them: so a model learns to go through the list.

    Args:
        rows: `mr` and `ref`, or `meaning_representation` and `human_reference`, a person's description each.
        count: how many.
        seed: of the draws; the first n are the same whatever the count.

    Raises:
        ValueError: where the rows have other columns, or no description is right.
    """
    described = [
        (_in_order(place, text), text)
        for place, text in map(_described, rows)
        if place and _well_put(text) and not is_wrong(place, text)
    ]
    if not described:
        raise ValueError("none of the rows holds a description that is right: are they those of the E2E NLG data?")
    return _mixed(described, count, seed)


def retold(rows: Iterable[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts, and answers made of the right paragraphs of other answers: as `people`, in a model's own manner.

    Args:
        rows: prompts of the task and answers to them.
        count: how many.
        seed: of the draws.

    Raises:
        ValueError: where no paragraph is right.
    """
    told = [
        (place, text) for prompt, answer in rows for place, text in _told(prompt, answer) if not is_wrong(place, text)
    ]
    if not told:
        raise ValueError("none of the rows holds a paragraph that is right: are they prompts and answers of this task?")
    return _mixed(told, count, seed)


def _told(prompt: str, answer: str) -> Iterator[tuple[Place, str]]:
    return zip(read_prompt(prompt), (text for _, text in paragraphs_of(answer)), strict=False)


def _mixed(described: Sequence[tuple[Place, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"people {seed}")
    alike: dict[frozenset[str], list[tuple[Place, str]]] = {}  # by their attributes
    for place, text in described:
        alike.setdefault(frozenset(place), []).append((place, text))
    for _ in range(count):
        chosen: dict[str, tuple[Place, str]] = {}
        wanted = rng.choice(PLACES)
        while len(chosen) < wanted:
            attributes = frozenset({"name", *draw_attributes(rng)})
            place, text = _varied(*rng.choice(alike.get(attributes, described)), rng)
            fine = _well_put(text) and not is_wrong(place, text)
            if fine and place["name"] not in chosen and split_of(place) == "train":
                chosen[place["name"]] = place, text
        prompt = prompt_text(place for place, _ in chosen.values())
        yield prompt, "\n".join(f"{i}. {text}" for i, (_, text) in enumerate(chosen.values(), 1))


def best_of(prompt: str, answers: Sequence[str]) -> str | None:
    """An answer of right, well put paragraphs, each the first that one of the answers has; None where none has one."""
    chosen = []
    for index, place in enumerate(read_prompt(prompt)):
        told = [paragraphs[index] for paragraphs in map(paragraphs_of, answers) if index < len(paragraphs)]
        right = (text for number, text in told if number == str(index + 1) and not is_wrong(place, text))
        if (text := next(filter(_well_put, right), None)) is None:
            return None
        chosen.append(f"{index + 1}. {text}")
    return "\n".join(chosen)


def _described(row: Mapping[str, str]) -> tuple[Place | None, str]:
    """The attributes and the description of a row; None for two places in one, or for what is no place here."""
    try:
        given = row["mr"] if "mr" in row else row["meaning_representation"]
        text = row["ref"] if "ref" in row else row["human_reference"]
    except KeyError as error:
        raise ValueError(f"the rows lack the column {error}: they hold {', '.join(row)}") from error
    pairs = re.findall(r"([\w ]+)\[([^\]]*)\]", given.replace("], ", "]\n"))
    place = {_COLUMNS.get(column, column): value for column, value in pairs}
    known = set(place) <= {"name", *VALUES} and place.get("name") in NAMES
    fine = known and len(place) == len(pairs) and LEAST <= len(place) - 1 <= MOST
    return (place if fine else None), " ".join(text.split())


def _in_order(place: Place, text: str) -> Place:
    """The place with its attributes in the order in which the text states them."""
    words, wanted = text.split(" "), wanted_values(place)
    stated_by = [stated(" ".join(words[:end])) for end in range(1, len(words) + 1)]

    def first(attribute: str) -> int:
        said = (end for end, found in enumerate(stated_by) if wanted[attribute] in found[attribute])
        return -1 if attribute == "name" else next(said, len(words))

    return {attribute: place[attribute] for attribute in sorted(place, key=first)}


def _well_put(text: str) -> bool:
    """Whether a description is whole sentences, two at most, that begin and end as sentences do."""
    sentences = sentences_of(text)
    whole = all(sentence[0].isupper() and sentence[-1] in ".!" for sentence in sentences)
    return len(sentences) <= 2 and whole and "the the " not in text.lower()


def _varied(place: Place, text: str, rng: random.Random) -> tuple[Place, str]:
    """The same description of another place: where the text spells names and values as they are, others stand there."""
    place = dict(place)
    for attribute, styles in _STYLES.items():
        style = next((style for style in styles if place.get(attribute) in style), None)
        if style is None:
            continue
        before, after = style.index(place[attribute]), rng.randrange(len(style))
        for spellings in _SPELLINGS[attribute]:
            if len(re.findall(rf"\b{re.escape(spellings[before])}\b", text)) == 1:
                text, place[attribute] = _exchanged(text, spellings[before], spellings[after]), style[after]
                break
    for attribute, names in (("name", NAMES), ("near", NEAR)):
        old, new = place.get(attribute), rng.choice(names)
        if old and text.count(old) == 1 and plain(text).count(plain(old).removeprefix("the ")) == 1:
            text, place[attribute] = text.replace(old, new), new
    return place, text


def _exchanged(text: str, old: str, new: str) -> str:
    """The text with one word for another, after the article that it takes."""

    def fitting(match: re.Match[str]) -> str:
        article = match["article"]
        return new if article is None else f"{article[0]}{'n' * (new[0] in 'AEIOUaeiou')} {new}"

    return re.sub(rf"(?P<article>\b[Aa]n? )?\b{re.escape(old)}\b", fitting, text)


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """The rows of a folder's CSV files."""
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as opened:
            yield from csv.DictReader(opened)


if __name__ == "__main__":
    sys.exit(main())
