"""The restaurants task: places given by their attributes, described in people's language.

    prompt   Describe each place in a numbered paragraph of a sentence or two.
             1. The Mill; coffee shop; food: Chinese; price: cheap; rating: 5 out of 5; riverside; near Café Rouge
             2. ...
    answer   1. Near Café Rouge on the riverside is The Mill, a cheap coffee shop with Chinese food. It is rated highly.
             2. ...

A place's attributes are listed in an order in which people might state them. Order and wording within a paragraph are
free. A paragraph is right if it names its place, states every attribute with its value, and states no other value, also
not of an attribute that was not given; to say the same again is no fault, and neither is what is no attribute ("a
lovely view"). `eval.tasks.wordings` reads what a text states.

Attributes and values are those of the E2E NLG data (Novikova, Dusek and Rieser, SIGDIAL 2017; cleaned by Dusek,
Howcroft and Rieser, INLG 2019), of whose texts nothing is kept here. Sets of attributes are drawn by this program, and
belong to a split by their hash. `people` reads the data's texts, to train a target and a draft.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from eval.tasks import wordings
from eval.tasks.wordings import NAMES, NEAR, plain, stated

Place = dict[str, str]  # values by attribute
FILES = __file__, wordings.__file__  # what the task is

VALUES = {
    "type": ("coffee shop", "pub", "restaurant"),
    "food": ("Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"),
    "price": ("cheap", "less than £20", "moderate", "£20-25", "high", "more than £30"),
    "rating": ("low", "1 out of 5", "average", "3 out of 5", "high", "5 out of 5"),
    "area": ("city centre", "riverside"),
    "family": ("yes", "no"),
    "near": tuple(NEAR),
}
SHARES = {"type": 1.0, "food": 0.75, "price": 0.6, "rating": 0.6, "area": 0.75, "family": 0.7, "near": 0.75}
LEAST, MOST = 3, 5  # attributes of a place, beside its name
PLACES = (3, 4, 5)  # in a prompt
# how often an attribute is listed before the type: about as often as people state it there
BEFORE = {"food": 0.35, "price": 0.35, "rating": 0.2, "area": 0.2, "family": 0.4, "near": 0.2}
MOST_BEFORE = 2
LEVELS = {  # values of which one stands for the other in a text
    "price": {"cheap": "low", "less than £20": "low", "moderate": "middle", "£20-25": "middle"}
    | {"high": "high", "more than £30": "high"},
    "rating": {"low": "low", "1 out of 5": "low", "average": "middle", "3 out of 5": "middle"}
    | {"high": "high", "5 out of 5": "high"},
}
SPLITS = {"train": range(80), "calibration": range(80, 90), "test": range(90, 100)}
INSTRUCTION = "Describe each place in a numbered paragraph of a sentence or two."
DROPPED = 0.25  # of the faults that are made leave a sentence out
_WORDS = (  # each stands for what the others do not
    ("cheap", "expensive", "moderately priced"),
    ("low", "average", "high"),
    ("1 out of 5", "3 out of 5", "5 out of 5"),
    ("riverside", "city centre"),
    ("pub", "coffee shop", "restaurant"),
    VALUES["food"],
    ("family-friendly", "not family-friendly"),
    ("family friendly", "not family friendly"),
    ("is not", "is"),
    tuple(NEAR),
    tuple(NAMES),
)
_EXCHANGES = [
    (re.compile(rf"\b{re.escape(word)}\b"), [other for other in words if other != word])
    for words in _WORDS
    for word in words
]
_LABELS = {"food": "food: ", "price": "price: ", "rating": "rating: ", "family": "for families: ", "near": "near "}
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
_PARAGRAPH = re.compile(r"(\d+)\. *(.*)", re.DOTALL)


def draw_prompt(rng: random.Random, split: str) -> str:
    """A prompt of the split: three to five places of different names."""
    names = rng.sample(NAMES, rng.choice(PLACES))
    return prompt_text(_draw_place(rng, split, name) for name in names)


def _draw_place(rng: random.Random, split: str, name: str) -> Place:
    while True:
        values = {attribute: rng.choice(VALUES[attribute]) for attribute in _listed(_draw_attributes(rng), rng)}
        place = {"name": name, **values}
        if split_of(place) == split:
            return place


def _draw_attributes(rng: random.Random) -> list[str]:
    while True:
        chosen = [attribute for attribute, share in SHARES.items() if rng.random() < share]
        if LEAST <= len(chosen) <= MOST:
            return chosen


def _listed(attributes: list[str], rng: random.Random) -> list[str]:
    """The attributes in an order in which a person might state them: "Near the Crown", "a cheap", "pub", the others."""
    rng.shuffle(attributes)
    before = [each for each in attributes if rng.random() < BEFORE.get(each, 0)][:MOST_BEFORE]
    places_first = sorted(before, key=lambda each: each not in ("area", "near"))
    return [*places_first, "type", *(each for each in attributes if each not in (*before, "type"))]


def split_of(place: Mapping[str, str]) -> str:
    """The split that a set of attributes belongs to, in whatever order they stand."""
    text = "; ".join(f"{attribute}={value}" for attribute, value in sorted(place.items()))
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
    return next(split for split, numbers in SPLITS.items() if number in numbers)


def prompt_text(places: Iterable[Mapping[str, str]]) -> str:
    """The prompt that asks for these places."""
    lines = [f"{number}. {_line(place)}" for number, place in enumerate(places, 1)]
    return "\n".join([INSTRUCTION, *lines])


def _line(place: Mapping[str, str]) -> str:
    attributes = [f"{_LABELS.get(each, '')}{value}" for each, value in place.items() if each != "name"]
    return "; ".join([place["name"], *attributes])


def read_prompt(prompt: str) -> list[Place]:
    """The places that a prompt lists."""
    return [_read_line(line.partition(". ")[2]) for line in prompt.splitlines()[1:]]


def _read_line(line: str) -> Place:
    name, *parts = line.split("; ")
    place = {"name": name}
    for part in parts:
        label = next((attribute for attribute, label in _LABELS.items() if part.startswith(label)), None)
        value = part.removeprefix(_LABELS[label]) if label else part
        place[label or next(each for each in ("type", "area") if value in VALUES[each])] = value
    return place


def check(prompt: str, answer: str) -> bool:
    """Whether a finished answer describes every place rightly, each in its paragraph."""
    places, paragraphs = read_prompt(prompt), _paragraphs(answer)
    if [number for number, _ in paragraphs] != [str(i + 1) for i in range(len(places))]:
        return False
    return not any(
        _false(place, text) or _missing(place, text) for place, (_, text) in zip(places, paragraphs, strict=True)
    )


def first_wrong(prompt: str, answer: str) -> int | None:
    """Index of the first wrong sentence of an answer or a prefix of one, None where all are right so far.

    A sentence is wrong that states what is not so; so is the last one of a paragraph that left something out, once a
    line break has ended it.
    """
    places, count = read_prompt(prompt), 0
    paragraphs = _paragraphs(answer)
    for index, (number, text) in enumerate(paragraphs):
        sentences = _sentences(text)
        if index >= len(places) or number != str(index + 1):
            return count
        for end in range(1, len(sentences) + 1):
            if _false(places[index], " ".join(sentences[:end])):
                return count + end - 1
        count += len(sentences)
        ended = index + 1 < len(paragraphs) or answer.endswith("\n")
        if ended and _missing(places[index], text):
            return max(count - 1, 0)
    return None


def corrupted(prompt: str, answer: str, rng: random.Random) -> str | None:
    """A right answer with one value exchanged for another, or one sentence left out; None where nothing can be.

    Faults that are hard to see: all else of the answer stays as it was written.
    """
    edits = [(match.span(), others) for pattern, others in _EXCHANGES for match in pattern.finditer(answer)]
    rng.shuffle(edits)
    wrong: Iterator[str] = (f"{answer[:start]}{rng.choice(others)}{answer[stop:]}" for (start, stop), others in edits)
    lines = answer.split("\n")
    double = [i for i, line in enumerate(lines) if len(_sentences(line.partition(". ")[2])) == 2]
    if double and rng.random() < DROPPED:
        index = rng.choice(double)
        number, _, text = lines[index].partition(". ")
        lines[index] = f"{number}. {rng.choice(_sentences(text))}"
        wrong = itertools.chain(["\n".join(lines)], wrong)
    return next((text for text in wrong if not check(prompt, text)), None)


def _paragraphs(answer: str) -> list[tuple[str, str]]:
    """Number and text of each line that is not empty; the number is empty where there is none."""
    lines = [line for line in answer.split("\n") if line.strip()]
    matches = [(_PARAGRAPH.fullmatch(line.strip()), line) for line in lines]
    return [(match[1], match[2]) if match else ("", line) for match, line in matches]


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def _wanted(place: Mapping[str, str]) -> dict[str, str]:
    return {attribute: LEVELS.get(attribute, {}).get(value, value) for attribute, value in place.items()}


def _false(place: Mapping[str, str], text: str) -> bool:
    """Whether a text states a value that the place does not have."""
    wanted = _wanted(place)
    return any(found - {wanted.get(attribute), "any"} for attribute, found in stated(text).items())


def _missing(place: Mapping[str, str], text: str) -> bool:
    """Whether a text leaves out an attribute of the place."""
    found = stated(text)
    if "any" in found["type"] and place.get("type") == "restaurant":
        found["type"] = {"restaurant"}
    return any(value not in found[attribute] for attribute, value in _wanted(place).items())


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
        if place and _well_put(text) and not _wrong(place, text)
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
        (place, text) for prompt, answer in rows for place, text in _told(prompt, answer) if not _wrong(place, text)
    ]
    if not told:
        raise ValueError("none of the rows holds a paragraph that is right: are they prompts and answers of this task?")
    return _mixed(told, count, seed)


def _told(prompt: str, answer: str) -> Iterator[tuple[Place, str]]:
    return zip(read_prompt(prompt), (text for _, text in _paragraphs(answer)), strict=False)


def _mixed(described: Sequence[tuple[Place, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(f"people {seed}")
    alike: dict[frozenset[str], list[tuple[Place, str]]] = {}  # by their attributes
    for place, text in described:
        alike.setdefault(frozenset(place), []).append((place, text))
    for _ in range(count):
        chosen: dict[str, tuple[Place, str]] = {}
        wanted = rng.choice(PLACES)
        while len(chosen) < wanted:
            attributes = frozenset({"name", *_draw_attributes(rng)})
            place, text = _varied(*rng.choice(alike.get(attributes, described)), rng)
            fine = _well_put(text) and not _wrong(place, text)
            if fine and place["name"] not in chosen and split_of(place) == "train":
                chosen[place["name"]] = place, text
        prompt = prompt_text(place for place, _ in chosen.values())
        yield prompt, "\n".join(f"{i}. {text}" for i, (_, text) in enumerate(chosen.values(), 1))


def best_of(prompt: str, answers: Sequence[str]) -> str | None:
    """An answer of right, well put paragraphs, each the first that one of the answers has; None where none has one."""
    chosen = []
    for index, place in enumerate(read_prompt(prompt)):
        told = [paragraphs[index] for paragraphs in map(_paragraphs, answers) if index < len(paragraphs)]
        right = (text for number, text in told if number == str(index + 1) and not _wrong(place, text))
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
    words, wanted = text.split(" "), _wanted(place)
    stated_by = [stated(" ".join(words[:end])) for end in range(1, len(words) + 1)]

    def first(attribute: str) -> int:
        said = (end for end, found in enumerate(stated_by) if wanted[attribute] in found[attribute])
        return -1 if attribute == "name" else next(said, len(words))

    return {attribute: place[attribute] for attribute in sorted(place, key=first)}


def _well_put(text: str) -> bool:
    """Whether a description is whole sentences, two at most, that begin and end as sentences do."""
    sentences = _sentences(text)
    whole = all(sentence[0].isupper() and sentence[-1] in ".!" for sentence in sentences)
    return len(sentences) <= 2 and whole and "the the " not in text.lower()


def _wrong(place: Place, text: str) -> bool:
    return _false(place, text) or _missing(place, text)


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
