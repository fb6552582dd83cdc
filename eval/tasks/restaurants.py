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
belong to a split by their hash. `train.people` reads the data's texts, to train a target and a draft.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping

from eval.tasks import wordings
from eval.tasks.wordings import NAMES, NEAR, stated

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
_PARAGRAPH = re.compile(r"(\d+)\. *(.*)", re.DOTALL)


def draw_prompt(rng: random.Random, split: str) -> str:
    """A prompt of the split: three to five places of different names."""
    names = rng.sample(NAMES, rng.choice(PLACES))
    return prompt_text(_draw_place(rng, split, name) for name in names)


def _draw_place(rng: random.Random, split: str, name: str) -> Place:
    while True:
        values = {attribute: rng.choice(VALUES[attribute]) for attribute in _listed(draw_attributes(rng), rng)}
        place = {"name": name, **values}
        if split_of(place) == split:
            return place


def draw_attributes(rng: random.Random) -> list[str]:
    """The attributes of a place."""
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
    places, paragraphs = read_prompt(prompt), paragraphs_of(answer)
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
    paragraphs = paragraphs_of(answer)
    for index, (number, text) in enumerate(paragraphs):
        sentences = sentences_of(text)
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
    double = [i for i, line in enumerate(lines) if len(sentences_of(line.partition(". ")[2])) == 2]
    if double and rng.random() < DROPPED:
        index = rng.choice(double)
        number, _, text = lines[index].partition(". ")
        lines[index] = f"{number}. {rng.choice(sentences_of(text))}"
        wrong = itertools.chain(["\n".join(lines)], wrong)
    return next((text for text in wrong if not check(prompt, text)), None)


def paragraphs_of(answer: str) -> list[tuple[str, str]]:
    """Number and text of each line that is not empty; the number is empty where there is none."""
    lines = [line for line in answer.split("\n") if line.strip()]
    matches = [(_PARAGRAPH.fullmatch(line.strip()), line) for line in lines]
    return [(match[1], match[2]) if match else ("", line) for match, line in matches]


def sentences_of(text: str) -> list[str]:
    """The sentences of a paragraph."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def wanted_values(place: Mapping[str, str]) -> dict[str, str]:
    """What a text has to state of a place: levels for prices and ratings, other values as they are."""
    return {attribute: LEVELS.get(attribute, {}).get(value, value) for attribute, value in place.items()}


def _false(place: Mapping[str, str], text: str) -> bool:
    """Whether a text states a value that the place does not have."""
    wanted = wanted_values(place)
    return any(found - {wanted.get(attribute), "any"} for attribute, found in stated(text).items())


def _missing(place: Mapping[str, str], text: str) -> bool:
    """Whether a text leaves out an attribute of the place."""
    found = stated(text)
    if "any" in found["type"] and place.get("type") == "restaurant":
        found["type"] = {"restaurant"}
    return any(value not in found[attribute] for attribute, value in wanted_values(place).items())


def is_wrong(place: Mapping[str, str], text: str) -> bool:
    """Whether a paragraph states what is not so, or leaves an attribute of its place out."""
    return _false(place, text) or _missing(place, text)
