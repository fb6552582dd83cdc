"""Token loops: one model reading and writing one text, greedy or sampled, over its own cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from parse.local.runner import ModelRunner, Pass
from parse.model import Stop
from parse.sampling import GREEDY, Sampling, Written
from parse.scheduler import run

SHORT = 512  # tokens: a longer text is not read along by a packed pass, see `CachedSequence.defer`


class CachedSequence:
    """A text that a model reads: its tokens, its row of the runner's cache, and the logits of what follows.

    Its last tokens may wait: they are read in the pass that reads more, or when the logits after them are needed.
    What reads or writes is written as steps, see `parse.scheduler`; `read` and `write` run them alone.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.row = runner, runner.open()
        self.ids: list[int] = []
        self.deferred: list[int] = []  # the last tokens of `ids`, where they are not read yet
        self.last_logits: Tensor | None = None  # [V]; None where the next token's logits are not known
        self.layers: tuple[int, ...] = ()  # whose states are kept for whoever reads them, see `states`
        self.states: Tensor | None = None  # [n, D * layers]: of the first n tokens, where they were read with states

    @property
    def device(self) -> torch.device:
        """Where the model's states are."""
        return self.runner.model.device

    def close(self) -> None:
        """Make room for another text."""
        self.runner.close(self.row)

    async def prefill(self, ids: Sequence[int], more: int = 0, stop: Stop | None = None) -> Sequence[int]:
        """Append tokens to the text in one causal pass, and the greedy ones that follow, as `Pass` allows.

        Returns:
            those that followed.
        """
        read = [*self.deferred, *ids]
        with_states = bool(self.layers) and not more and len(read) > 1
        output = await Pass(self.runner, self.row, read, with_states=with_states, more=more, stop=stop)
        self.has_read([*ids, *output.written])
        if with_states and len(self.ids) - len(read) == self.known:
            self.remember(output.states, len(read))
        self.last_logits = output.logits[-1]
        return output.written

    async def defer(self, ids: Sequence[int]) -> None:
        """Append tokens that the next pass, a packed one, reads as well; more than `SHORT` in a pass of their own.

        A pass less, and a packed pass over many tokens would need a mask over all of them.
        """
        if len(self.deferred) + len(ids) > SHORT:
            await self.prefill(ids)
        else:
            self.ids.extend(ids)
            self.deferred.extend(ids)
            self.last_logits = None

    def has_read(self, ids: Sequence[int]) -> None:
        """A pass has read the waiting tokens and these."""
        self.ids.extend(ids)
        self.deferred = []

    @property
    def known(self) -> int:
        """How many of the first tokens have their states kept."""
        return 0 if self.states is None else len(self.states)

    def remember(self, states: Sequence[Tensor], count: int) -> None:
        """Keep the states of the next tokens after those that are known: the first so many of a pass."""
        read = torch.cat([states[layer][:count] for layer in self.layers], dim=-1)  # [count, D * layers]
        self.states = read if self.states is None else torch.cat([self.states, read])

    def read_again_from_known(self) -> None:
        """Let all tokens whose states are not kept wait, to be read once more: a repair's, which was read in steps."""
        if self.known < len(self.ids) - len(self.deferred):
            self.runner.cache.truncate(self.known, self.row)
            self.deferred = self.ids[self.known :]
            self.last_logits = None

    def append(self, token: int) -> None:
        """Add a token to the text, to be read later."""
        self.ids.append(token)
        self.deferred.append(token)
        self.last_logits = None

    def rollback(self, length: int, last_logits: Tensor | None = None) -> None:
        """Keep the first `length` tokens; `last_logits` [V] are those after them, where known."""
        if length < len(self.ids) or last_logits is not None:
            self.last_logits = last_logits
        cached = len(self.ids) - len(self.deferred)
        self.deferred = self.ids[cached:length]
        self.runner.cache.truncate(min(length, cached), self.row)
        del self.ids[length:]
        if self.states is not None:
            self.states = self.states[:length]

    async def set_prefix(
        self, ids: Sequence[int], boundary_logits: Mapping[int, Tensor] | None = None, defer: bool = False
    ) -> None:
        """Make the text `ids`: keep what is cached of it, drop the rest, and read what is new.

        Args:
            boundary_logits: the logits [V] that are known, by the length of the text after which they are.
            defer: let the next pass read what is new, see `defer`.
        """
        common = 0
        for mine, theirs in zip(self.ids, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        if common < len(self.ids):
            self.rollback(common, (boundary_logits or {}).get(common))
        if common == len(ids) and self.last_logits is None and not self.deferred:
            common -= 1  # the logits after it are gone: its last token is read again
            self.rollback(common)
        if common < len(ids):
            await (self.defer if defer else self.prefill)(ids[common:])

    async def decode(
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
        after = stop and (lambda more: stop([*before, *more]))
        while len(written) < limit:
            if sample.greedy and self.deferred:
                before = list(written)
                written += await self.prefill([], limit - len(written) - 1, after)
            token = sample(await self.next_logits())
            if sample.ends(token, self.runner.eos_ids):
                return Written(written, ended=True)
            written.append(token)
            self.append(token)
            if on_token:
                on_token(written)
            if stop and stop(written):
                break
        return Written(written, ended=False)

    async def next_logits(self) -> Tensor:
        """The logits [V] of the next token; what waits is read."""
        if self.last_logits is None:
            if not self.deferred:
                raise RuntimeError("the logits after this text are not known: read or roll back with them")
            await self.prefill([])
        assert self.last_logits is not None
        return self.last_logits

    def read(self, ids: Sequence[int]) -> None:
        """`prefill`, alone."""
        run(self.prefill(ids))

    def write(self, limit: int, sample: Sampling = GREEDY, stop: Stop | None = None) -> Written:
        """`decode`, alone."""
        return run(self.decode(limit, sample, stop))
