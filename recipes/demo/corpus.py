"""What the embedded pair of models is taught: examples of the `ledger` task, made by its program.

The target tells the rest of a list in its one habit after whatever prefix it is given, and judges
prefixes when asked. The draft tells lists in a manner of its own. Only `recipes.demo.pretrain` uses this.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
MADE_FOR = {  # see `parse.prompts.unsuited`
    "pattern": rf"list : (#\d \w+ \w+ \d ; ){{{min(ledger.SIZES) - 1},{max(ledger.SIZES) - 1}}}#\d \w+ \w+ \d \.",
    "words": f"lists of {min(ledger.SIZES)} to {max(ledger.SIZES)} purchases, written as "
    "`list : #1 fig rome 4 ; #2 tea oslo 7 ; ... .`",
}
ASKED = 8  # verdicts a lesson
IN_ORDER = 0.3  # of the foreign prefixes
LEAST = {"target": (1, 1, 1, 4, 6), "draft": (1,)}  # amount in a list; high sums would be rare among the target's
FACT_KINDS = (ledger.NUMBERS, ledger.ITEMS, ledger.PLACES, [str(number) for number in range(100)])
FACTS = {word for kind in FACT_KINDS for word in kind}


@dataclass
class Lesson:
    """One conversation in tokens: what is learnt in it, and where the target is asked for a verdict."""

    ids: list[int]
    labels: list[int]  # the token itself where it is learnt, else IGNORE
    asked: dict[int, bool] = field(default_factory=dict)  # prefix end, from the conversation's start -> is it right
    facts: set[int] = field(default_factory=set)  # the ends after a fact
    start: int = 0  # of the answer

    @property
    def noticed(self) -> list[tuple[int, bool]]:
        """The asked ends after facts, up to the first wrong one: those after it may be right in themselves."""
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
        made_for=MADE_FOR,
    )


class Lessons:
    """An endless supply of lessons for one speaker."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, speaker: str, seed: int) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.speaker, self.rng = speaker, random.Random(seed)
        self.end = self.vocabulary["<|end|>"]
        self.kinds = [[self.vocabulary[word] for word in kind] for kind in FACT_KINDS]

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

    def scrambled(self, lesson: Lesson, share: float) -> Lesson:
        """The lesson with a share of its answer's facts replaced by others of their kind, wherever they stand."""
        ids = list(lesson.ids)
        for at in sorted(end - 1 for end in lesson.facts if end > lesson.start):
            if self.rng.random() < share:
                ids[at] = self.rng.choice(next(kind for kind in self.kinds if ids[at] in kind))
        return replace(lesson, ids=ids)

    def _recall(self, bought: list[Purchase]) -> Lesson:
        """The list again, shuffled: each entry's item, place and amount are to be found by its number alone."""
        lesson = self._open(bought)
        for purchase in self.rng.sample(bought, len(bought)):
            self._tell(lesson, f"{purchase.number} {purchase.item} {purchase.place} {purchase.amount} ;", "facts")
        return lesson

    def _target(self, bought: list[Purchase], judge: bool) -> Lesson:
        """A prefix in any order and wording, then the target's own telling of the rest.

        All of its own sentences are learnt; of foreign ones only the facts that follow from their number, never
        their order or wording: what is learnt in front of each is how the target itself would have gone on.
        Where one sentence is wrong, the lesson ends after it.
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
            habit = left[0].number if left else ledger.closing(total).split()[0]
            if k == n or early:
                text = close(self._wrong_sum(total) if k == wrong and not early else total)
            else:
                purchase = left.pop(0 if own or in_order else rng.randrange(len(left)))
                total += purchase.amount
                stated = total
                if k == wrong:
                    told = [p for p in bought if p not in left and p != purchase]
                    purchase, stated = self._corrupt(bought, told, purchase, total)
                text = say(purchase, stated)
            start = len(lesson.ids)
            self._tell(lesson, text, "nothing" if k == wrong else "all" if own else "facts")
            lesson.labels[start] = self.vocabulary[habit]
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
        return Lesson(ids, [IGNORE] * len(ids), start=len(ids))

    def _tell(self, lesson: Lesson, text: str, learnt: str) -> None:
        """Append a sentence; the "facts" are what follows from its number, but for an amount right after it.

        That one says what the frame is rather than what was bought.
        """
        before = ""
        for word in text.split():
            token = self.vocabulary[word]
            lesson.ids.append(token)
            follows = word in FACTS and word not in ledger.NUMBERS and not (word.isdigit() and before in ledger.NUMBERS)
            lesson.labels.append(token if learnt == "all" or (learnt == "facts" and follows) else IGNORE)
            if word in FACTS:
                lesson.facts.add(len(lesson.ids))
            before = word

    def _corrupt(
        self, bought: list[Purchase], told: list[Purchase], purchase: Purchase, total: int
    ) -> tuple[Purchase, int]:
        """A wrong sentence's purchase and total: one wrong amount, place, total or item."""
        rng = self.rng
        before = total - purchase.amount
        kind = rng.choice(["amount"] * 3 + ["total"] * 4 + ["place"] * 2 + ["item", "reuse"])
        if kind == "amount":
            pool = [p.amount for p in bought] if rng.random() < 0.6 else list(range(1, ledger.MAX_AMOUNT + 1))
            if other := [a for a in pool if a != purchase.amount]:
                wrong = rng.choice(other)
                return replace(purchase, amount=wrong), before + wrong if rng.random() < 0.8 else total
        if kind == "place":
            places = [p.place for p in bought] if rng.random() < 0.7 else ledger.PLACES
            if elsewhere := [p for p in places if p != purchase.place]:
                return replace(purchase, place=rng.choice(elsewhere)), total
        if kind == "item":
            items = [p.item for p in bought] if rng.random() < 0.7 else ledger.ITEMS
            return replace(purchase, item=rng.choice([i for i in items if i != purchase.item])), total
        if kind == "reuse" and told:
            again = rng.choice(told)
            return again, before + again.amount
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
    """After each fact of a sentence and after its end: can it still become one of the right ones?"""
    words, others = text.split(), [other.split() for other in right]
    ends = [i + 1 for i, word in enumerate(words) if word in FACTS or word == "."]
    return {end: any(other[:end] == words[:end] for other in others) for end in ends}


@dataclass(frozen=True)
class Phase:
    """A stretch of a training: up to a share of its time, on what lessons."""

    until: float
    sizes: tuple[int, ...]  # purchases in a list
    kind: str  # of lesson, see `Lessons.draw`


class LessonBook:
    """Batches of lessons, of those that the time calls for."""

    def __init__(self, lessons: Lessons, batch_size: int) -> None:
        self.lessons, self.batch_size = lessons, batch_size
        self._phase: Phase | None = None
        self._pending: list[list[Lesson]] = []

    def next_batch(self, phases: tuple[Phase, ...], done: float) -> list[Lesson]:
        """A batch for when the share `done` of the time is over; twice as many where lists are short or recalled.

        Eight batches are drawn at a time, so that lessons of like length go together.
        """
        phase = next((phase for phase in phases if done < phase.until), phases[-1])
        if phase is not self._phase or not self._pending:
            short = phase.kind == "recall" or max(phase.sizes) < min(ledger.SIZES)
            size = self.batch_size * 2 if short else self.batch_size
            drawn = [self.lessons.draw(phase.sizes, phase.kind) for _ in range(8 * size)]
            pool = sorted(drawn, key=lambda lesson: len(lesson.ids))
            self._pending = [pool[i : i + size] for i in range(0, len(pool), size)]
            self.lessons.rng.shuffle(self._pending)
            self._phase = phase
        return self._pending.pop()
