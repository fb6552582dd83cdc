"""Token loops: one model reading and writing one text, greedy or sampled, over its own cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from parse.local.runner import Pass, Reader, Stop
from parse.sampling import GREEDY, Sampling, Written
from parse.scheduler import run

SHORT = 512  # tokens: a longer text is not read along by a packed pass, see `Context.awaiting`


class Context:
    """A text that a model reads: its tokens, its row of the reader's cache, and the logits of what follows.

    Its last tokens may wait: they are read in the pass that reads more, or when the logits behind them are needed.
    What reads or writes is written as steps, see `parse.local.runner`; `read` and `write` run them alone.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self.row = reader, reader.open()
        self.ids: list[int] = []
        self.waiting: list[int] = []  # the last tokens of `ids`, where they are not read yet
        self.next_logits: Tensor | None = None  # [V]; None where the next token's logits are not known
        self.layers: tuple[int, ...] = ()  # whose states are kept for whoever reads them, see `states`
        self.states: Tensor | None = None  # [n, D * layers]: of the first n tokens, where they were read with states

    @property
    def device(self) -> torch.device:
        """Where the model's states are."""
        return self.reader.model.device

    def close(self) -> None:
        """Make room for another text."""
        self.reader.close(self.row)

    async def reading(self, ids: Sequence[int], more: int = 0, stop: Stop | None = None) -> Sequence[int]:
        """Append tokens to the text in one causal pass, and the greedy ones that follow, as `Pass` allows.

        Returns:
            those that followed.
        """
        read = [*self.waiting, *ids]
        with_states = bool(self.layers) and not more and len(read) > 1
        output = await Pass(self.reader, self.row, read, with_states=with_states, more=more, stop=stop)
        self.has_read([*ids, *output.written])
        if with_states and len(self.ids) - len(read) == self.known:
            self.remember(output.states, len(read))
        self.next_logits = output.logits[-1]
        return output.written

    async def awaiting(self, ids: Sequence[int]) -> None:
        """Append tokens that the next pass, a packed one, reads as well; more than `SHORT` in a pass of their own.

        A pass less, and a packed pass over many tokens would need a mask over all of them.
        """
        if len(self.waiting) + len(ids) > SHORT:
            await self.reading(ids)
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

    async def set_prefix(
        self, ids: Sequence[int], boundary_logits: Mapping[int, Tensor] | None = None, defer: bool = False
    ) -> None:
        """Make the text `ids`: keep what is cached of it, drop the rest, and read what is new.

        Args:
            boundary_logits: the logits [V] that are known, by the length of the text behind which they are.
            defer: let the next pass read what is new, see `awaiting`.
        """
        common = 0
        for mine, theirs in zip(self.ids, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        if common < len(self.ids):
            self.rollback(common, (boundary_logits or {}).get(common))
        if common == len(ids) and self.next_logits is None and not self.waiting:
            common -= 1  # the logits behind it are gone: its last token is read again
            self.rollback(common)
        if common < len(ids):
            await (self.awaiting if defer else self.reading)(ids[common:])

    async def writing(
        self,
        limit: int,
        sample: Sampling = GREEDY,
        stop: Stop | None = None,
        on_token: Callable[[list[int]], None] | None = None,
    ) -> Written:
        """Write on, up to `limit` tokens, to the end of sequence, or to where `stop` says so; the last one waits.

        Args:
            on_token: is given all that is written so far, whenever it has grown.
        """
        written: list[int] = []
        before: list[int] = []  # those of `written` that are read or wait
        behind = stop and (lambda more: stop([*before, *more]))
        while len(written) < limit:
            if sample.greedy and self.waiting:
                before = list(written)
                written += await self.reading([], limit - len(written) - 1, behind)
            token = sample(await self.knowing())
            if token in self.reader.eos_ids:
                return Written(written, ended=True)
            written.append(token)
            self.append(token)
            if on_token:
                on_token(written)
            if stop and stop(written):
                break
        return Written(written, ended=False)

    async def knowing(self) -> Tensor:
        """The logits [V] of the next token; what waits is read."""
        if self.next_logits is None:
            if not self.waiting:
                raise RuntimeError("the logits behind this text are not known: read or roll back with them")
            await self.reading([])
        assert self.next_logits is not None
        return self.next_logits

    def read(self, ids: Sequence[int]) -> None:
        """`reading`, alone."""
        run(self.reading(ids))

    def write(self, limit: int, sample: Sampling = GREEDY, stop: Stop | None = None) -> Written:
        """`writing`, alone."""
        return run(self.writing(limit, sample, stop))
