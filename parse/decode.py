"""Token loops: one model reading and writing one text, greedy or sampled, over its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parse.passes import Pass, Reader, Steps, Stop, drive

GREEDY_BELOW = 1e-5  # temperatures: logits divided by less are beyond any number
SHORT = 512  # tokens: a longer text is not read along by a packed pass, see `Context.awaiting`


@dataclass(frozen=True)
class Written:
    """Tokens that a model wrote, without the end-of-sequence token."""

    ids: list[int]
    ended: bool  # whether the end-of-sequence token came next


class Sampling:
    """Chooses tokens from logits [V]: greedy at temperature 0, else from the softmax of logits / temperature."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> None:
        """Set up.

        Args:
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: then keep the most likely ones that reach this share of the probability; 1 keeps all.
            seed: the same seed draws the same tokens, on every device; None draws others each time.
        """
        self.greedy = temperature < GREEDY_BELOW
        self._warpers = LogitsProcessorList([] if self.greedy else [TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self._warpers.append(TopKLogitsWarper(int(top_k)))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(int(seed))

    @property
    def state(self) -> Tensor:
        """Which draws come next; may be set back, to draw them again."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def __call__(self, logits: Tensor) -> int:
        """A token."""
        return int(logits.argmax()) if self.greedy else self._draw(self._probabilities(logits))

    def settle(self, token: int, proposer: Tensor, logits: Tensor) -> int:
        """The token to write where another model proposed one: that one, or another; distributed as by `logits` alone.

        Speculative sampling (Leviathan et al., arXiv 2211.17192): the proposal is kept with the probability
        min(1, p / q), and else replaced by a draw from what of p exceeds q.

        Args:
            token: drawn from `proposer` by this sampler.
            proposer, logits: [V] each; where models pad their vocabulary to other sizes, the proposer's has its own.
        """
        if self.greedy:
            return self(logits)
        ours, theirs = self._probabilities(logits), self._probabilities(proposer)  # [V] each
        theirs = pad(theirs, (0, len(ours) - len(theirs)))  # [V]; cut, where it is longer
        if torch.rand((), generator=self._generator) * theirs[token] < ours[token]:
            return token
        return self._draw((ours - theirs).clamp(min=0))

    def _probabilities(self, logits: Tensor) -> Tensor:
        no_text = cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long))  # these warpers read none
        warped = self._warpers(no_text, cast(torch.FloatTensor, logits.float().cpu()[None]))  # [1, V]
        return warped.softmax(-1)[0]

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))


GREEDY = Sampling()


class Context:
    """A text that a model reads: its tokens, its row of the reader's cache, and the logits of what follows.

    Its last tokens may wait: they are read in the pass that reads more, or when the logits behind them are needed.
    What reads or writes is written as steps, see `parse.passes`; `read` and `write` run them alone.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self.row = reader, reader.open()
        self.ids: list[int] = []
        self.waiting: list[int] = []  # the last tokens of `ids`, where they are not read yet
        self.next_logits: Tensor | None = None  # [V]; None where the next token's logits are not known
        self.layers: tuple[int, ...] = ()  # whose states are kept for whoever reads them, see `states`
        self.states: Tensor | None = None  # [n, D * layers]: of the first n tokens, where they were read with states

    def close(self) -> None:
        """Make room for another text."""
        self.reader.close(self.row)

    def reading(self, ids: Sequence[int], more: int = 0, stop: Stop | None = None) -> Steps[Sequence[int]]:
        """Append tokens to the text in one causal pass, and the greedy ones that follow, as `Pass` allows.

        Returns:
            those that followed.
        """
        read = [*self.waiting, *ids]
        with_states = bool(self.layers) and not more and len(read) > 1
        output = yield Pass(self.reader, self.row, read, with_states=with_states, more=more, stop=stop)
        self.has_read([*ids, *output.written])
        if with_states and len(self.ids) - len(read) == self.known:
            self.remember(output.states, len(read))
        self.next_logits = output.logits[-1]
        return output.written  # type: ignore[no-any-return]

    def awaiting(self, ids: Sequence[int]) -> Steps[None]:
        """Append tokens that the next pass, a packed one, reads as well; more than `SHORT` in a pass of their own.

        A pass less, and a packed pass over many tokens would need a mask over all of them.
        """
        if len(self.waiting) + len(ids) > SHORT:
            yield from self.reading(ids)
        else:
            self.ids.extend(ids)
            self.waiting.extend(ids)
            self.next_logits = None

    def has_read(self, ids: Sequence[int]) -> None:
        """A pass has read the waiting tokens and these."""
        self.ids.extend(ids)
        self.waiting = []

    @property
    def known(self) -> int:
        """How many of the first tokens have their states kept."""
        return 0 if self.states is None else len(self.states)

    def remember(self, states: Sequence[Tensor], count: int) -> None:
        """Keep the states of the next tokens behind those that are known: the first so many of a pass."""
        read = torch.cat([states[layer][:count] for layer in self.layers], dim=-1)  # [count, D * layers]
        self.states = read if self.states is None else torch.cat([self.states, read])

    def read_again_from_known(self) -> None:
        """Let all tokens whose states are not kept wait, to be read once more: a repair's, which was read in steps."""
        if self.known < len(self.ids) - len(self.waiting):
            self.reader.cache.truncate(self.known, self.row)
            self.waiting = self.ids[self.known :]
            self.next_logits = None

    def append(self, token: int) -> None:
        """Add a token to the text, to be read later."""
        self.ids.append(token)
        self.waiting.append(token)
        self.next_logits = None

    def rollback(self, length: int, next_logits: Tensor | None = None) -> None:
        """Keep the first `length` tokens; `next_logits` [V] are those behind them, where known."""
        if length < len(self.ids) or next_logits is not None:
            self.next_logits = next_logits
        cached = len(self.ids) - len(self.waiting)
        self.waiting = self.ids[cached:length]
        self.reader.cache.truncate(min(length, cached), self.row)
        del self.ids[length:]
        if self.states is not None:
            self.states = self.states[:length]

    def becoming(self, ids: Sequence[int]) -> Steps[None]:
        """Make the text `ids`: keep the prefix that is cached already, drop the rest, read what is new."""
        common = 0
        for mine, theirs in zip(self.ids, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        if common == len(ids) == len(self.ids) and self.next_logits is not None:
            return
        common = min(common, len(ids) - 1)  # the last token is read again where its logits are gone
        self.rollback(common)
        yield from self.reading(ids[common:])

    def writing(
        self, limit: int, sample: Sampling = GREEDY, stop: Stop | None = None, written: list[int] | None = None
    ) -> Steps[Written]:
        """Write on, up to `limit` tokens, to the end of sequence, or to where `stop` says so; the last one waits.

        Args:
            written: a list to write into; then the steps say whenever it has grown.
        """
        seen, written = written is not None, [] if written is None else written
        before: list[int] = []  # those of `written` that are read or wait
        behind = stop and (lambda more: stop([*before, *more]))
        while len(written) < limit:
            if sample.greedy and self.waiting:
                before = list(written)
                written += yield from self.reading([], limit - len(written) - 1, behind)
            token = sample((yield from self.knowing()))
            if token in self.reader.eos_ids:
                return Written(written, ended=True)
            written.append(token)
            self.append(token)
            if seen:
                yield None
            if stop and stop(written):
                break
        return Written(written, ended=False)

    def continuing(
        self, ids: Sequence[int], limit: int, sample: Sampling = GREEDY, stop: Stop | None = None
    ) -> Steps[Written]:
        """Write on behind these tokens, see `becoming` and `writing`, as far as the model's context reaches."""
        longest = self.reader.longest
        room = limit if longest is None else min(limit, longest - len(ids))
        if room < 1:
            return Written([], ended=False)
        yield from self.becoming(ids)
        return (yield from self.writing(room, sample, stop))

    def knowing(self) -> Steps[Tensor]:
        """The logits [V] of the next token; what waits is read."""
        if self.next_logits is None:
            if not self.waiting:
                raise RuntimeError("the logits behind this text are not known: read or roll back with them")
            yield from self.reading([])
        assert self.next_logits is not None
        return self.next_logits

    def read(self, ids: Sequence[int]) -> None:
        """`reading`, alone."""
        drive(self.reading(ids))

    def write(self, limit: int, sample: Sampling = GREEDY, stop: Stop | None = None) -> Written:
        """`writing`, alone."""
        return drive(self.writing(limit, sample, stop))


def speculating(
    target: Context,
    draft: Context,
    limit: int,
    sample: Sampling,
    lookahead: int,
    stop: Stop | None = None,
    written: list[int] | None = None,
) -> Steps[Written]:
    """`Context.writing` of the target, the draft proposing `lookahead` tokens at a time: the same words, fewer passes.

    Each pass of the target reads the last token that it chose and the proposals behind it:

        read      token   p_1   p_2     p_3
        chosen    p_1     p_2   other   -       kept while the choice is what was proposed; `other` is read next

    Draft and target share their vocabulary. Greedy choices are those of the target alone; sampled ones are
    distributed as by the target alone, see `Sampling.settle`.
    """
    seen, written = written is not None, [] if written is None else written
    token = sample((yield from target.knowing()))
    while token not in target.reader.eos_ids:
        written.append(token)
        if seen:
            yield None
        if len(written) >= limit or (stop and stop(written)):
            target.append(token)
            return Written(written, ended=False)
        start = len(target.ids) + 1  # behind the token
        yield from draft.becoming(draft.reader.readable([*target.ids, token]))
        proposed, proposers = yield from _proposing(draft, min(lookahead, limit - len(written)), sample)
        read = [token, *(t for t in proposed if t not in draft.reader.eos_ids)]  # the draft's end may only be the last
        logits = (yield Pass(target.reader, target.row, read, keep=range(len(read)))).logits  # [1 + read, V]
        target.has_read(read)
        kept = 0
        for proposal, proposer in zip(proposed, proposers, strict=True):
            token = sample.settle(proposal, proposer, logits[kept])
            if token != proposal or token in target.reader.eos_ids or kept + 1 == len(read):
                break  # the last: an end for the draft alone, not read yet
            kept += 1
            written.append(token)
            if seen:
                yield None
            if len(written) >= limit or (stop and stop(written)):
                target.rollback(start + kept, logits[kept])
                return Written(written, ended=False)
        else:
            token = sample(logits[kept])
        target.rollback(start + kept, logits[kept])
    return Written(written, ended=True)


def _proposing(draft: Context, count: int, sample: Sampling) -> Steps[tuple[list[int], list[Tensor]]]:
    """Up to so many tokens from the draft, or to its end of sequence, and the logits [V] that each was drawn from."""
    tokens: list[int] = []
    proposers: list[Tensor] = []
    while len(tokens) < count:
        logits = yield from draft.knowing()
        token = sample(logits)
        tokens.append(token)
        proposers.append(logits)
        if token in draft.reader.eos_ids:
            break
        draft.append(token)
    return tokens, proposers
