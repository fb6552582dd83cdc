"""Labels: whether a prefix of a draft is valid, that is whether the target, going on from it, ends up right.

What is right the task's checker says; where a task has none, the target itself, comparing the outcome with its own
answer (`eval.judges`). Which prefixes are asked is `bisect`, for the first invalid one (validity is lost once and
hardly ever regained), or `all`. The target continues from any prefix of a draft in one context: what two prefixes share
is read once.

Where a task's program can say which sentence is the first wrong one, `checker` takes its word for the prefixes. The
target only continues from the last valid prefix of a wrong draft: that is its repair, and shows whether anything would
be lost by accepting what is wrong. How often the two disagree is measured. And bisection starts where the program says:
nothing after a wrong sentence can end up right, so most often a single way on, from in front of it, tells all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eval.generation import write_on
from eval.judges import TEMPERATURE, Judge
from eval.tasks.task import FirstWrong, Prompt
from parse import Engine
from parse.model import ModelSequence
from parse.sampling import Sampling, Written
from parse.scheduler import Steps
from parse.text import text_of

Asked = dict[tuple[int, ...], tuple[bool, Written]]  # of prefixes of answers to one prompt: valid? and the way on


@dataclass(frozen=True)
class Drafted:
    """A draft that goes on from a valid prefix of an answer."""

    prompt: Prompt
    prefix: list[int]  # tokens of the answer in front of the draft
    written: Written
    ends: list[int]  # K prefix ends
    right: bool | None  # whether it finishes the answer rightly; None where it does not finish it


@dataclass(frozen=True)
class Labels:
    """What is known of one draft."""

    valid: list[bool]  # K
    target_right: bool  # whether the target, going on from where the draft began or a valid prefix of it, is right
    continuation_ids: list[int]  # the target's, after the last valid prefix before the first invalid one
    continuation_ended: bool


@dataclass
class Labeller:
    """Labels prefixes of drafts with one target."""

    engine: Engine
    judge: Judge
    limit: int  # tokens of an answer
    first_wrong: FirstWrong | None = None  # where the task's program knows it, and drafts are cut after sentences
    samples: int = 1  # of the way on from a prefix, of which the most decide; one is greedy
    seed: int = 0
    stops: tuple[str, ...] = ()  # strings that end an answer
    asked: int = 0  # prefixes so far

    async def finish(
        self, target: ModelSequence, prompt: Prompt, start: list[int], sample: int | None = None
    ) -> tuple[bool, Written]:
        """Let the target finish the answer that starts so, and judge the outcome.

        Args:
            target: its sequence that begins with the prompt.
            start: tokens of the answer.
            sample: the number of a sampled way on; None for the greedy one.
        """
        choose = Sampling()
        if sample is not None:
            choose = Sampling(TEMPERATURE, seed=(self.seed * 997 + len(start)) * 997 + sample)
        tokenizer, room = self.engine.tokenizer, max(self.limit - len(start), 1)
        written = await write_on(target, tokenizer, start, room, choose, self.stops)
        answer = text_of([*start, *written.ids], tokenizer)
        right = written.ended and (await self.judge.is_right(prompt, answer))
        return right, written

    async def ask(self, target: ModelSequence, prompt: Prompt, start: list[int]) -> tuple[bool, Written]:
        """Whether a prefix is valid, and one way on from it that shows it."""
        self.asked += 1
        if self.samples == 1:
            return await self.finish(target, prompt, start)
        ways = []
        for sample in range(self.samples):
            ways.append(await self.finish(target, prompt, start, sample))
        valid = 2 * sum(right for right, _ in ways) > len(ways)
        return valid, next(way for right, way in ways if right == valid)

    def by_program(self, draft: Drafted) -> list[bool]:
        """The labels of a draft's K prefixes, in which nothing wrong is said; the last one must be right as a whole."""
        labels = list[bool]()
        for end in draft.ends:
            text = text_of([*draft.prefix, *draft.written.ids[:end]], self.engine.tokenizer)
            fine = self.first_wrong is None or self.first_wrong(draft.prompt, text) is None
            labels.append(fine and all(labels))
        if draft.right is not None:
            labels[-1] = draft.right and all(labels)
        return labels

    async def label_by_checker(self, target: ModelSequence, draft: Drafted, repair: bool) -> Labels:
        """Label a draft's K prefixes by the task's program.

        Args:
            target: its sequence that begins with the prompt.
            repair: let the target continue from the last valid prefix, which tells whether it is right from there.
        """
        labels = self.by_program(draft)
        if all(labels) or not repair:
            return Labels(labels, True, [], False)
        kept = [0, *draft.ends][labels.index(False)]
        right, written = await self.finish(target, draft.prompt, [*draft.prefix, *draft.written.ids[:kept]])
        return Labels(labels, right, written.ids, written.ended)

    async def label(self, target: ModelSequence, draft: Drafted, every: bool, asked: Asked) -> Labels:
        """Label a draft's K prefixes by the target's ways on.

        Args:
            target: its sequence that begins with the prompt.
            every: ask about every prefix. Else all are valid where the draft is right, and where it is wrong the first
                invalid one is found by bisection.
            asked: what is known of prefixes of answers to this prompt, and is not asked again; more is added.
        """
        k, ways = len(draft.ends), dict[int, Written]()
        valid = dict[int, bool]()

        async def ask(cut: int) -> bool:
            start = [*draft.prefix, *draft.written.ids[: draft.ends[cut - 1] if cut else 0]]
            if tuple(start) not in asked:
                asked[tuple(start)] = await self.ask(target, draft.prompt, start)
            valid[cut], ways[cut] = asked[tuple(start)]
            return valid[cut]

        if draft.right is None:
            await ask(k)
        else:
            valid[k] = draft.right
        if every:
            for cut in range(k - 1, 0, -1):  # the longest first: shorter ones are in the cache
                await ask(cut)
        elif valid[k]:
            valid = dict.fromkeys(range(1, k + 1), True)
        if all(valid.values()):
            return Labels([True] * k, True, [], False)
        if not every:
            first = [*self.by_program(draft), False].index(False) + 1  # the first that may be invalid
            first = min(first, k)
            if not (first > 1 and self.first_wrong and (await ask(first - 1))):
                first = await bisect(first, ask)
            valid = {cut: cut < first for cut in range(1, k + 1)}
        labels = [valid[cut] for cut in range(1, k + 1)]
        kept = labels.index(False)
        alone = kept > 0 or (await ask(0))
        return Labels(labels, alone, ways[kept].ids, ways[kept].ended)


async def bisect(k: int, ask: Callable[[int], Steps[bool]]) -> int:
    """The first invalid prefix, 1 to k, where prefix 0 is valid or nothing can be told, and prefix k is not."""
    low, high = 0, k
    while high - low > 1:
        middle = (low + high) // 2
        if await ask(middle):
            low = middle
        else:
            high = middle
    return high
