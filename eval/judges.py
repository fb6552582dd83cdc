"""Whether a finished answer is right: by the task's checker, or by a comparison with the target's own answer.

Who compares is the target itself, or another model on a server.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from eval.generation import write_after
from eval.tasks import Task
from eval.tasks.rows import key_of
from eval.tasks.task import Prompt
from parse import Engine
from parse.prompts import encode_prompt, final_answer, no_thinking, opens_thinking, split_beginning
from parse.sampling import Sampling
from parse.scheduler import Call, Steps
from parse.text import before_stop, encode_text, text_of
from parse.verifiers import PromptVerifier
from recipes.schema import Recipe, RecipeError

if TYPE_CHECKING:
    from eval.server import Client

TEMPERATURE = 0.7  # at which the target is sampled, where more than its greedy way on is asked for
QUESTION = (
    "Question:\n{prompt}\n\nFirst answer:\n{reference}\n\nSecond answer:\n{answer}\n\n"
    "Do the two answers say the same? Reply with one word, yes or no."
)


class Judge(Protocol):
    """Says whether a finished answer is right."""

    async def is_right(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer is right."""
        ...


@dataclass
class Checked:
    """The task's own checker. What a model thought before its answer does not count."""

    task: Task
    opened: bool = False  # whether the chat template begins the thinking, see `parse.prompts.opens_thinking`

    async def is_right(self, prompt: Prompt, answer: str) -> bool:
        """Whether the task calls the answer right; what follows a stop string is none of it."""
        return self.task.check(prompt, before_stop(final_answer(answer, self.opened, prompt), self.task.stop))

    def first_wrong(self, prompt: Prompt, answer: str) -> int | None:
        """Index of the first wrong sentence of an answer or a prefix of one, of a task that knows it."""
        assert self.task.first_wrong is not None
        return self.task.first_wrong(prompt, final_answer(answer, self.opened, prompt))

    def corrupted(self, prompt: Prompt, answer: str, rng: random.Random) -> str | None:
        """A right answer with a fault, after the same thinking; None where the task makes none, or it is no fault."""
        final = final_answer(answer, self.opened, prompt)
        wrong = self.task.corrupted(prompt, final, rng) if self.task.corrupted else None
        if not wrong or self.task.check(prompt, wrong):
            return None
        return answer.removesuffix(final) + wrong


class Asked(Protocol):
    """Who is asked for yes or no."""

    async def probability_yes(self, question: str) -> float:
        """P(yes) against P(no)."""
        ...


class AskedTarget:
    """The engine's target, without thinking."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._verdict = engine, PromptVerifier.of(engine.tokenizer)
        self._without_thinking = encode_text(no_thinking(engine.tokenizer), engine.tokenizer)

    async def probability_yes(self, question: str) -> float:
        """P(yes) against P(no)."""
        ids = [*encode_prompt(question, self.engine.tokenizer), *self._without_thinking]
        return await self.engine.models["target"].label_score(ids, self._verdict.labels)


class AskedServer:
    """A model on a server, as many questions at a time as the recipe allows."""

    def __init__(self, client: Client) -> None:
        self._client, self._threads = client, ThreadPoolExecutor(client.server.concurrency)

    async def probability_yes(self, question: str) -> float:
        """P(yes) against P(no)."""
        return float(await Call(self._threads.submit(self._client.probability_yes, question)))


def asked_by(recipe: Recipe, engine: Engine) -> Asked:
    """Who compares answers in this recipe."""
    server = recipe.rollouts.judge
    if server is None:
        return AskedTarget(engine)
    from eval.server import Client  # whose library only they need that ask a server

    return AskedServer(Client(server, server.model or recipe.target, limit=1, key="rollouts.judge"))


@dataclass
class Agreement:
    """Somebody compares an answer with the one that the target gives by itself, in words, as a user would ask them to.

    Its errors are the labels' noise: `controls` measures them on pairs of which the truth is known.
    """

    engine: Engine
    limit: int  # tokens of an answer
    asked: Asked
    threshold: float = 0.5  # of P(yes); set by `controls`
    references: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._opened = opens_thinking(self.engine.tokenizer)

    async def is_right(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer is called the same as the target's; what comes before it as thinking does not count."""
        if key_of(prompt) not in self.references:
            own = await write_after(self.engine.models["target"], self.engine.encode(prompt), self.limit)
            self.references[key_of(prompt)] = text_of(own.ids, self.engine.tokenizer)
        reference, answer = (self.final(prompt, text) for text in (self.references[key_of(prompt)], answer))
        if not answer.strip() and not split_beginning(prompt)[1]:
            return False
        if reference.split() == answer.split():
            return True
        return (await self.probability_same(prompt, reference, answer)) >= self.threshold

    def final(self, prompt: Prompt, text: str) -> str:
        """What of an answer comes after its thinking."""
        return final_answer(text, self._opened, prompt)

    async def probability_same(self, prompt: Prompt, reference: str, answer: str) -> float:
        """P(yes) against P(no) to the question whether two answers say the same, the mean over both orders."""
        orders = ((reference, answer), (answer, reference))
        return sum([await self.asked.probability_yes(question_of(prompt, *order)) for order in orders]) / 2


def controls(
    agreement: Agreement, prompts: Sequence[Prompt], run: Callable[[Sequence[Steps[float]]], list[float]]
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

    async def pair(first: int, second: int, seed: int) -> float:
        texts = []
        for prompt, sample in ((prompts[first], Sampling()), (prompts[second], Sampling(TEMPERATURE, seed=seed))):
            written = await write_after(
                agreement.engine.models["target"], agreement.engine.encode(prompt), agreement.limit, sample
            )
            texts.append(agreement.final(prompt, text_of(written.ids, agreement.engine.tokenizer)))
        if texts[0].split() == texts[1].split():
            return 1.0
        return await agreement.probability_same(prompts[first], *texts)

    n = len(prompts)
    same = run([pair(i, i, i) for i in range(n)])
    other = run([pair(i, (i + 1) % n, i) for i in range(n)])

    def errors(threshold: float, some: slice) -> tuple[float, float]:
        missed, confused = same[some], other[some]
        return (
            sum(score < threshold for score in missed) / max(len(missed), 1),
            sum(score >= threshold for score in confused) / max(len(confused), 1),
        )

    half = slice(0, n, 2)
    agreement.threshold = min(sorted({*same[half], *other[half]}), key=lambda t: sum(errors(t, half)))
    missed, confused = errors(agreement.threshold, slice(1, n, 2))
    return {
        "same_called_different": missed,
        "different_called_same": confused,
        "threshold": agreement.threshold,
    }


def question_of(prompt: Prompt, reference: str = "", answer: str = "") -> str:
    """What the target is asked about two answers to a prompt: of a conversation, every turn.

    Answers that the prompt begins are shown with their beginning.
    """
    asked, beginning = split_beginning(prompt)
    words = "\n\n".join(turn["content"] for turn in asked)
    return QUESTION.format(prompt=words, reference=beginning + reference, answer=beginning + answer)


def labeller_of(recipe: Recipe, task: Task) -> str:
    """ "task" or "agreement": the recipe's choice, or what the task offers.

    Raises:
        RecipeError: where rows are to be checked and have no references.
    """
    if recipe.rollouts.labeller == "task" and not task.checks:
        raise RecipeError(
            f"rollouts.labeller is 'task', and the rows of {recipe.task} have no `reference` to check answers against: "
            "give them one, or set rollouts.labeller=agreement (answers are compared with the target's own)"
        )
    if recipe.rollouts.labeller == "auto":
        return "task" if task.checks else "agreement"
    return recipe.rollouts.labeller
