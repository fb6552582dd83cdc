"""What the embedded pair of models is taught: examples of the `ledger` task, made by its program.

The target tells the rest of a list in its one habit behind whatever prefix it is given, and judges
prefixes when asked. The draft tells lists in a manner of its own. Only `train.pretrain` uses this.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.tasks import ledger
from eval.tasks.ledger import Purchase

IGNORE = -100  # a label without loss
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = 8  # verdicts a lesson
IN_ORDER = 0.3  # of the foreign prefixes
LEAST = {"target": (1, 1, 1, 4, 6), "draft": (1,)}  # amount in a list; high sums would be rare among the target's
FACTS = {*ledger.ITEMS, *ledger.PLACES, *map(str, range(100))}


@dataclass
class Lesson:
    """One conversation in tokens: what is learnt in it, and where the target is asked for a verdict."""

    ids: list[int]
    labels: list[int]  # the token itself where it is learnt, else IGNORE
    asked: dict[int, bool] = field(default_factory=dict)  # prefix end, from the conversation's start -> is it right
    facts: set[int] = field(default_factory=set)  # the ends behind a fact

    @property
    def noticed(self) -> list[tuple[int, bool]]:
        """The asked ends behind facts, up to the first wrong one: those behind it may be right in themselves."""
        facts = [(end, right) for end, right in self.asked.items() if end in self.facts]
        right = [verdict for _, verdict in facts]
        return facts[: right.index(False) + 1] if False in right else facts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The task's word-level tokenizer, with a chat template and the question of a judging turn."""
    texts = [*ledger.FRAMES, *ledger.CLOSINGS, *(w for words in ledger.WORDS.values() for w in words)]
    words = {w for text in texts for w in text.split() if "{" not in w}
    words |= {*FACTS, *["list", ":", ";", ".", ",", "yes", "no"], *ledger.JUDGE.split()}
    ordered = sorted(words, key=lambda w: (not w.isdigit(), int(w) if w.isdigit() else 0, w))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *ordered])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        verdict_question=ledger.JUDGE,
    )


class Lessons:
    """An endless supply of lessons for one speaker."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, speaker: str, seed: int) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.speaker, self.rng = speaker, random.Random(seed)
        self.end = self.vocabulary["<|end|>"]

    def draw(self, sizes: tuple[int, ...], kind: str = "tell") -> Lesson:
        """One lesson on a list of one of the sizes.

        Args:
            kind: "recall" repeats the list in another order, "tell" tells it, and "judge" tells it too, but half
                of the target's lessons go wrong in one place.
        """
        least = self.rng.choice(LEAST[self.speaker])
        bought = ledger.draw(self.rng, "train", sizes, least)
        if kind == "recall":
            return self._recall(bought)
        return self._target(bought, kind == "judge") if self.speaker == "target" else self._draft(bought)

    def _recall(self, bought: list[Purchase]) -> Lesson:
        """The list again, shuffled: each item's place and amount are to be found by the item alone."""
        lesson = self._open(bought)
        for purchase in self.rng.sample(bought, len(bought)):
            self._tell(lesson, f"{purchase.item} {purchase.place} {purchase.amount} ;", "facts", after=purchase.item)
        return lesson

    def _target(self, bought: list[Purchase], judge: bool) -> Lesson:
        """A prefix in any order and wording, then the target's own telling of the rest.

        All of its own sentences are learnt; of foreign ones only the facts that follow from the list,
        never their order or wording. Where one sentence is wrong, the lesson ends behind it.
        """
        rng, n = self.rng, len(bought)
        foreign = rng.randint(1, n + 1) if rng.random() < 0.9 else 0  # sentences of the foreign prefix
        by_turns = rng.random() < 0.5  # own sentences in between, inside the foreign prefix
        in_order = rng.random() < IN_ORDER  # foreign in wording only
        wrong = rng.randint(0, n) if judge and rng.random() < 0.5 else None
        lesson, total, left = self._open(bought), 0, list(bought)
        for k in range(n + 1):
            own = k >= foreign or (by_turns and rng.random() < 0.5)
            say, close = _wordings(None if own else rng.random())
            right = [say(p, total + p.amount) for p in left] or [close(total)]
            early = k == wrong and k < n and rng.random() < 0.08  # closes before all is told
            if k == n or early:
                text, item = close(self._wrong_sum(total) if k == wrong and not early else total), None
            else:
                purchase = left.pop(0 if own or in_order else rng.randrange(len(left)))
                total += purchase.amount
                stated = total
                if k == wrong:
                    told = [p for p in bought if p not in left and p != purchase]
                    purchase, stated = self._corrupt(bought, told, purchase, total)
                text, item = say(purchase, stated), purchase.item
            start = len(lesson.ids)
            self._tell(lesson, text, "nothing" if k == wrong else "all" if own else "facts", after=item)
            asked = {start + end: verdict for end, verdict in _verdicts(text, right).items()}
            lesson.asked.update(asked)
            if k == wrong:
                break
        else:
            lesson.ids.append(self.end)
            lesson.labels.append(self.end)
        others = [end for end in lesson.asked if end not in asked]
        kept = {*asked, *rng.sample(others, min(len(others), ASKED - len(asked)))}
        lesson.asked = {end: verdict for end, verdict in lesson.asked.items() if end in kept}
        return lesson

    def _draft(self, bought: list[Purchase]) -> Lesson:
        """The draft's own manner: the list told in its own collocations."""
        lesson, total = self._open(bought), 0
        for purchase in bought:
            total += purchase.amount
            self._tell(lesson, ledger.sentence(purchase, total, "draft"), "all")
        self._tell(lesson, ledger.closing(total), "all")
        lesson.ids.append(self.end)
        lesson.labels.append(self.end)
        return lesson

    def _open(self, bought: list[Purchase]) -> Lesson:
        text = f"<|user|> {ledger.prompt_text(bought)} <|end|> <|assistant|>"
        ids = [self.vocabulary[word] for word in text.split()]
        return Lesson(ids, [IGNORE] * len(ids))

    def _tell(self, lesson: Lesson, text: str, learnt: str, after: str | None = None) -> None:
        """Append a sentence; of its facts only those behind the item `after` follow from the list."""
        known = after is None
        for word in text.split():
            token = self.vocabulary[word]
            lesson.ids.append(token)
            kept = learnt == "all" or (learnt == "facts" and known and word in FACTS)
            lesson.labels.append(token if kept else IGNORE)
            if word in FACTS:
                lesson.facts.add(len(lesson.ids))
            known = known or word == after

    def _corrupt(
        self, bought: list[Purchase], told: list[Purchase], purchase: Purchase, total: int
    ) -> tuple[Purchase, int]:
        """A wrong sentence's purchase and total: one wrong amount, place, total or item."""
        rng = self.rng
        item, place, amount = purchase.item, purchase.place, purchase.amount
        before = total - amount
        kind = rng.choice(["amount"] * 3 + ["total"] * 4 + ["place", "place", "reuse", "unknown"])
        if kind == "amount":
            pool = [p.amount for p in bought] if rng.random() < 0.6 else list(range(1, ledger.MAX_AMOUNT + 1))
            other = [a for a in pool if a != amount]
            if other:
                wrong = rng.choice(other)
                return Purchase(item, place, wrong), before + wrong if rng.random() < 0.8 else total
        if kind == "place":
            pool_of_places = [p.place for p in bought] if rng.random() < 0.7 else ledger.PLACES
            elsewhere = [p for p in pool_of_places if p != place]
            if elsewhere:
                return Purchase(item, rng.choice(elsewhere), amount), total
        if kind == "reuse" and told:
            again = rng.choice(told)
            return again, before + again.amount
        if kind in ("reuse", "unknown"):
            listed = {p.item for p in bought}
            return Purchase(rng.choice([i for i in ledger.ITEMS if i not in listed]), place, amount), total
        return purchase, self._wrong_sum(total, before + rng.choice(bought).amount)

    def _wrong_sum(self, total: int, tempting: int | None = None) -> int:
        """A number near the total, or a tempting one, that is not the total."""
        rng = self.rng
        while True:
            near = total + rng.choice([-1, 1, -1, 1, -2, 2, -3, 3, -10, 10])
            wrong = rng.choice([near, near, near, tempting or near, rng.randint(1, 81)])
            if wrong != total and 0 < wrong < 100:
                return wrong


def _wordings(seed: float | None) -> tuple[Callable[[Purchase, int], str], Callable[[int], str]]:
    """How a sentence and a closing are worded: in the target's habit, or as the seed says."""

    def rng() -> random.Random | None:
        return None if seed is None else random.Random(seed)

    return lambda purchase, total: ledger.sentence(purchase, total, "target", rng()), lambda t: ledger.closing(t, rng())


def _verdicts(text: str, right: list[str]) -> dict[int, bool]:
    """Behind each fact of a sentence and behind its end: can it still become one of the right ones?"""
    words, others = text.split(), [other.split() for other in right]
    ends = [i + 1 for i, word in enumerate(words) if word in FACTS or word == "."]
    return {end: any(other[:end] == words[:end] for other in others) for end in ends}


def batches(lessons: Lessons, size: int, sizes: tuple[int, ...], kind: str) -> Iterator[list[Lesson]]:
    """Eight batches of lessons of like length, in random order."""
    pool = sorted((lessons.draw(sizes, kind) for _ in range(8 * size)), key=lambda one: len(one.ids))
    groups = [pool[i : i + size] for i in range(0, len(pool), size)]
    lessons.rng.shuffle(groups)
    yield from groups
