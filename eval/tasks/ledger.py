"""The embedded task: a numbered list of purchases, told in sentences with a running total.

    prompt   list : #1 fig rome 4 ; #2 apple oslo 7 ; ... .
    answer   #1 the fig from rome costs us 4 coins , which makes 4 coins so far . ... that is 42 coins .

Any order and any wording of the grammar below is right, as long as every purchase is told once, its
item, place, amount and running total are right, and the closing sum is told last. Two speakers use it:
the target has one habit (the list's order, one frame, one word for each pair of item and place); a
foreign speaker uses any order, frame and word. Prompts are drawn by a seed and belong to a split by the hash
of their purchases, whatever their order, so splits cannot overlap. Made by this program; no licence
applies.
"""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from dataclasses import dataclass

ITEMS = [
    "apple",
    "bread",
    "candle",
    "drum",
    "egg",
    "fig",
    "grape",
    "honey",
    "iron",
    "jam",
    "kettle",
    "lamp",
    "melon",
    "needle",
    "olive",
    "pear",
    "quilt",
    "rope",
    "salt",
    "tea",
]
PLACES = ["athens", "berlin", "cairo", "delhi", "genoa", "kyoto", "lima", "oslo", "paris", "rome"]
MAX_AMOUNT = 9
SIZES = (7, 8, 9)  # purchases in a list
NUMBERS = [f"#{i + 1}" for i in range(max(SIZES))]

WORDS = {
    "source": ("from", "of", "via"),
    "verb": ("costs", "takes", "needs"),
    "link": ("which makes", "so we reach", "bringing it to"),
    "tail": ("so far", "by now", "in all"),
}
FRAMES = (
    "{number} the {item} {source} {place} {verb} us {amount} coins , {link} {total} coins {tail} .",
    "{number} {source} {place} the {item} {verb} us {amount} coins , {link} {total} coins {tail} .",
    "{number} {amount} coins go to the {item} {source} {place} , {link} {total} coins {tail} .",
)
CLOSINGS = ("that is {total} coins .", "the whole sum is {total} coins .", "we paid {total} coins .")
JUDGE = "right ?"  # the question of a judging turn; answered "yes" or "no"

SPLITS = {"test": range(0, 2), "calibration": range(2, 4), "train": range(4, 16)}


@dataclass(frozen=True)
class Purchase:
    """One entry of a list."""

    number: str  # one of NUMBERS
    item: str
    place: str
    amount: int


def draw(rng: random.Random, split: str, sizes: tuple[int, ...] = SIZES, least: int = 1) -> list[Purchase]:
    """Draw a list of purchases that belongs to the split: of one of the sizes, with no amount below the least."""
    while True:
        items = rng.sample(ITEMS, rng.choice(sizes))
        bought = [
            Purchase(number, item, rng.choice(PLACES), rng.randint(least, MAX_AMOUNT))
            for number, item in zip(NUMBERS, items, strict=False)
        ]
        if split_of(bought) == split:
            return bought


def draw_prompt(rng: random.Random, split: str) -> str:
    """Draw a prompt that belongs to the split."""
    return prompt_text(draw(rng, split))


def split_of(bought: list[Purchase]) -> str:
    """The split that a list belongs to: decided by its content, whatever its order."""
    content = " ".join(sorted(f"{p.item} {p.place} {p.amount}" for p in bought))
    bucket = hashlib.sha256(content.encode()).digest()[0] % 16
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def prompt_text(bought: list[Purchase]) -> str:
    """The user's turn for a list."""
    return "list : " + " ; ".join(f"{p.number} {p.item} {p.place} {p.amount}" for p in bought) + " ."


def habit(slot: str, purchase: Purchase, speaker: str = "target") -> str:
    """A speaker's own word for a slot: a fixed collocation with the item and its place."""
    words = WORDS[slot]
    return words[zlib.crc32(f"{speaker} {slot} {purchase.item} {purchase.place}".encode()) % len(words)]


def sentence(purchase: Purchase, total: int, speaker: str, rng: random.Random | None = None) -> str:
    """One sentence of the answer: in the speaker's habit, or with an rng in any wording."""
    if rng:
        words = {slot: rng.choice(choices) for slot, choices in WORDS.items()}
    else:
        words = {slot: habit(slot, purchase, speaker) for slot in WORDS}
    frame = rng.choice(FRAMES) if rng else FRAMES[0]
    return frame.format(**vars(purchase), total=total, **words)


def closing(total: int, rng: random.Random | None = None) -> str:
    """The last sentence: in the one habit, or with an rng in any wording."""
    return (rng.choice(CLOSINGS) if rng else CLOSINGS[0]).format(total=total)


def read_prompt(prompt: str) -> list[Purchase]:
    """The purchases that a prompt lists."""
    entries = prompt.removeprefix("list : ").removesuffix(" .").split(" ; ")
    return [Purchase(n, i, p, int(a)) for n, i, p, a in (entry.split() for entry in entries)]


def _pattern(form: str) -> re.Pattern[str]:
    """A sentence form as a regular expression with a named group for each fact."""
    choices = {slot: f"(?:{'|'.join(words)})" for slot, words in WORDS.items()}
    facts = {"number": r"(?P<number>#\d)", "item": r"(?P<item>\w+)", "place": r"(?P<place>\w+)"}
    numbers = {"amount": r"(?P<amount>\d+)", "total": r"(?P<total>\d+)"}
    return re.compile(form.removesuffix(" .").format(**choices, **facts, **numbers) + r" \.")


_SENTENCES = [_pattern(frame) for frame in FRAMES]
_CLOSINGS = [_pattern(form) for form in CLOSINGS]


def first_wrong(prompt: str, answer: str) -> int | None:
    """Index of the answer's first wrong sentence, or None where every sentence is right.

    A missing closing is not a wrong sentence; `check` asks for it.
    """
    left = {p.number: p for p in read_prompt(prompt)}
    total = 0
    closed = False
    for index, text in enumerate(re.findall(r"[^.]+\.|[^.]+$", answer)):
        told = next((m for m in (p.fullmatch(text.strip()) for p in _SENTENCES) if m), None)
        closed_by = next((m for m in (p.fullmatch(text.strip()) for p in _CLOSINGS) if m), None)
        if closed:
            return index
        if told:
            purchase = left.pop(told["number"], None)
            total += purchase.amount if purchase else 0
            said = Purchase(told["number"], told["item"], told["place"], int(told["amount"]))
            if said != purchase or int(told["total"]) != total:
                return index
        elif closed_by:
            closed = True
            if left or int(closed_by["total"]) != total:
                return index
        else:
            return index
    return None


def check(prompt: str, answer: str) -> bool:
    """Whether the answer tells every purchase once, rightly, and closes with the right sum."""
    sentences = len(read_prompt(prompt)) + 1
    return answer.count(".") == sentences and first_wrong(prompt, answer) is None


def foreign_prefix(prompt: str, rng: random.Random) -> str:
    """A right, unfinished answer in any order and wording."""
    bought = read_prompt(prompt)
    told, total = [], 0
    for purchase in rng.sample(bought, rng.randint(1, len(bought) - 1)):
        total += purchase.amount
        told.append(sentence(purchase, total, "anyone", rng))
    return " ".join(told)
