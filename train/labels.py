"""Labels: whether a prefix of a draft is valid, that is whether the target, going on from it, ends up right.

What is right the task's checker says; where a task has none, the target itself, comparing the outcome with its own
answer (`Agreement`). Which prefixes are asked is `bisect`, for the first invalid one (validity is lost once and
hardly ever regained), or `all`. The target goes on from any prefix of a draft in one context: what two prefixes share
is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from eval.tasks import Task
from parse import Engine
from parse.decode import Context, Sampling, Written
from parse.models import encode_text, render, text_of
from parse.passes import Steps
from parse.verifiers import Prompt
from train.generation import going_on

TEMPERATURE = 0.7  # at which the target is sampled, where more than its greedy way on is asked for
QUESTION = (
    "Question:\n{prompt}\n\nFirst answer:\n{reference}\n\nSecond answer:\n{answer}\n\n"
    "Do the two answers say the same? Reply with one word, yes or no."
)


class Judge(Protocol):
    """Says whether a finished answer is right."""

    def judging(self, prompt: str, answer: str) -> Steps[bool]:
        """Whether the answer is right."""
        ...


@dataclass
class Checked:
    """The task's own checker."""

    task: Task

    def judging(self, prompt: str, answer: str) -> Steps[bool]:
        """Whether the task calls the answer right."""
        return self.task.check(prompt, answer)
        yield


@dataclass
class Agreement:
    """The target compares an answer with the one that it gives by itself, in words, as a user would ask it to.

    Its errors are the labels' noise: `controls` measures them on pairs of which the truth is known.
    """

    engine: Engine
    limit: int  # tokens of an answer
    question: str = QUESTION
    threshold: float = 0.5  # of P(yes); set by `controls`
    references: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._verdict = Prompt.of(self.engine.tokenizer)

    def judging(self, prompt: str, answer: str) -> Steps[bool]:
        """Whether the target calls the answer the same as its own."""
        if prompt not in self.references:
            own = yield from going_on(self.engine.readers["target"], self.engine.encode(prompt), self.limit)
            self.references[prompt] = text_of(own.ids, self.engine.tokenizer)
        reference = self.references[prompt]
        if reference.split() == answer.split():
            return True
        return (yield from self.comparing(prompt, reference, answer)) >= self.threshold

    def comparing(self, prompt: str, reference: str, answer: str) -> Steps[float]:
        """P(yes) against P(no) to the question whether two answers say the same, the mean over both orders."""
        total, tokenizer = 0.0, self.engine.tokenizer
        for first, second in ((reference, answer), (answer, reference)):
            content = self.question.format(prompt=prompt, reference=first, answer=second)
            ids = encode_text(render([{"role": "user", "content": content}], tokenizer), tokenizer)
            context = Context(self.engine.readers["target"])
            try:
                yield from context.reading(ids)
                logits = (yield from context.knowing()).float()  # [V]
            finally:
                context.close()
            total += self._verdict.weigh(logits).item()
        return total / 2


def controls(
    agreement: Agreement, prompts: Sequence[str], run: Callable[[Sequence[Steps[float]]], list[float]]
) -> dict[str, float]:
    """Set the agreement's threshold on one half of some control pairs and measure its errors on the other.

    Pairs that say the same are two samples of the target's answers to a prompt, those that do not are its answers to
    different prompts.

    Args:
        prompts: eight or more.
        run: runs many steps at once; their results in order.

    Returns:
        `same_called_different` and `different_called_same`, the error rates, and the `threshold`.
    """

    def pair(first: int, second: int, seed: int) -> Steps[float]:
        texts = []
        for prompt, sample in ((prompts[first], Sampling()), (prompts[second], Sampling(TEMPERATURE, seed=seed))):
            written = yield from going_on(
                agreement.engine.readers["target"], agreement.engine.encode(prompt), agreement.limit, sample
            )
            texts.append(text_of(written.ids, agreement.engine.tokenizer))
        if texts[0].split() == texts[1].split():
            return 1.0
        return (yield from agreement.comparing(prompts[first], *texts))

    n = len(prompts)
    same = run([pair(i, i, i) for i in range(n)])
    other = run([pair(i, (i + 1) % n, i) for i in range(n)])

    def errors(threshold: float, some: slice) -> tuple[float, float]:
        missed, confused = same[some], other[some]
        return (
            sum(score < threshold for score in missed) / len(missed),
            sum(score >= threshold for score in confused) / len(confused),
        )

    half = slice(0, n, 2)
    agreement.threshold = min(sorted({*same[half], *other[half]}), key=lambda t: sum(errors(t, half)))
    missed, confused = errors(agreement.threshold, slice(1, n, 2))
    return {
        "same_called_different": missed,
        "different_called_same": confused,
        "threshold": agreement.threshold,
    }


@dataclass(frozen=True)
class Labels:
    """What is known of one draft."""

    valid: list[bool]  # K
    target_right: bool  # whether the target, going on from where the draft began or a valid prefix of it, is right
    continuation_ids: list[int]  # the target's, behind the last valid prefix before the first invalid one
    continuation_ended: bool


@dataclass
class Labeller:
    """Labels prefixes of drafts with one target."""

    engine: Engine
    judge: Judge
    limit: int  # tokens of an answer
    samples: int = 1  # of the way on from a prefix, of which the most decide; one is greedy
    seed: int = 0
    asked: int = 0  # prefixes so far

    def finishing(
        self, context: Context, prompt: str, start: list[int], sample: int | None = None
    ) -> Steps[tuple[bool, Written]]:
        """Let the target finish the answer that starts so, and judge the outcome.

        Args:
            context: the target's, over the prompt and any other start.
            start: tokens of the answer.
            sample: the number of a sampled way on; None for the greedy one.
        """
        engine = self.engine
        prompt_ids = engine.encode(prompt)
        yield from context.becoming([*prompt_ids, *start])
        choose = Sampling()
        if sample is not None:
            choose = Sampling(TEMPERATURE, seed=(self.seed * 997 + len(start)) * 997 + sample)
        written = yield from context.writing(max(self.limit - len(start), 1), choose)
        answer = text_of([*start, *written.ids], engine.tokenizer)
        right = written.ended and (yield from self.judge.judging(prompt, answer))
        return right, written

    def asking(self, context: Context, prompt: str, start: list[int]) -> Steps[tuple[bool, Written]]:
        """Whether a prefix is valid, and one way on from it that shows it."""
        self.asked += 1
        if self.samples == 1:
            return (yield from self.finishing(context, prompt, start))
        ways = []
        for sample in range(self.samples):
            ways.append((yield from self.finishing(context, prompt, start, sample)))
        valid = 2 * sum(right for right, _ in ways) > len(ways)
        return valid, next(way for right, way in ways if right == valid)

    def labelling(
        self,
        context: Context,
        prompt: str,
        prefix: list[int],
        draft: Written,
        ends: list[int],
        right: bool,
        every: bool,
    ) -> Steps[Labels]:
        """Label the K prefixes of a draft that goes on from a valid prefix of an answer.

        Args:
            context: the target's.
            prefix: tokens of the answer in front of the draft.
            ends: K prefix ends.
            right: whether the draft finishes the answer rightly: so it is for its last prefix.
            every: ask about every prefix. Else all are valid where the draft is right, and where it is wrong the first
                invalid one is found by bisection.
        """
        k, ways = len(ends), dict[int, Written]()
        valid = dict[int, bool]({k: right})

        def ask(cut: int) -> Steps[bool]:
            start = [*prefix, *draft.ids[: ends[cut - 1] if cut else 0]]
            valid[cut], ways[cut] = yield from self.asking(context, prompt, start)
            return valid[cut]

        if every:
            for cut in range(k - 1, 0, -1):  # the longest first: shorter ones are in the cache
                yield from ask(cut)
        elif right:
            valid = dict.fromkeys(range(1, k + 1), True)
        if all(valid.values()):
            return Labels([True] * k, True, [], False)
        if not every:
            first = yield from bisecting(k, ask)
            valid = {cut: cut < first for cut in range(1, k + 1)}
        labels = [valid[cut] for cut in range(1, k + 1)]
        kept = labels.index(False)
        alone = kept > 0 or (yield from ask(0))
        return Labels(labels, alone, ways[kept].ids, ways[kept].ended)


def bisecting(k: int, ask: Callable[[int], Steps[bool]]) -> Steps[int]:
    """The first invalid prefix, 1 to k, where prefix 0 is valid or nothing can be told, and prefix k is not."""
    low, high = 0, k
    while high - low > 1:
        middle = (low + high) // 2
        if (yield from ask(middle)):
            low = middle
        else:
            high = middle
    return high
