"""Lossless token-level speculation: the draft proposes tokens, and the target keeps those that it would choose."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from parse.local.runner import Pass
from parse.local.sequence import CachedSequence
from parse.model import Stop
from parse.sampling import Sampling, Written


async def speculate(
    target: CachedSequence,
    draft: CachedSequence,
    limit: int,
    sample: Sampling,
    lookahead: int,
    stop: Stop | None = None,
    on_token: Callable[[list[int]], None] | None = None,
) -> Written:
    """`CachedSequence.decode` of the target, the draft proposing `lookahead` tokens at a time: fewer passes.


    Each pass of the target reads the last token that it chose and the proposals after it:

        read      token   p_1   p_2     p_3
        chosen    p_1     p_2   other   -       kept while the choice is what was proposed; `other` is read next

    Draft and target share their vocabulary. Greedy choices are those of the target alone; sampled ones are
    distributed as by the target alone, see `Sampling.settle`.
    """
    written: list[int] = []
    token = sample(await target.next_logits())
    while token not in target.runner.eos_ids:
        written.append(token)
        if on_token:
            on_token(written)
        if len(written) >= limit or (stop and stop(written)):
            target.append(token)
            return Written(written, ended=False)
        start = len(target.ids) + 1  # after the token
        await draft.set_prefix([each for each in (*target.ids, token) if each < draft.runner.vocabulary])
        proposed, proposers = await _proposing(draft, min(lookahead, limit - len(written)), sample)
        read = [token, *(t for t in proposed if t not in draft.runner.eos_ids)]  # the draft's end may only be the last
        logits = (await Pass(target.runner, target.row, read, keep=range(len(read)))).logits  # [1 + read, V]
        target.has_read(read)
        kept = 0
        for proposal, proposer in zip(proposed, proposers, strict=True):
            token = sample.settle(proposal, proposer, logits[kept])
            if token != proposal or token in target.runner.eos_ids or kept + 1 == len(read):
                break  # the last: an end for the draft alone, not read yet
            kept += 1
            written.append(token)
            if on_token:
                on_token(written)
            if len(written) >= limit or (stop and stop(written)):
                target.rollback(start + kept, logits[kept])
                return Written(written, ended=False)
        else:
            token = sample(logits[kept])
        target.rollback(start + kept, logits[kept])
    return Written(written, ended=True)


async def _proposing(draft: CachedSequence, count: int, sample: Sampling) -> tuple[list[int], list[Tensor]]:
    """Up to so many tokens from the draft, or to its end of sequence, and the logits [V] that each was drawn from."""
    tokens: list[int] = []
    proposers: list[Tensor] = []
    while len(tokens) < count:
        logits = await draft.next_logits()
        token = sample(logits)
        tokens.append(token)
        proposers.append(logits)
        if token in draft.runner.eos_ids:
            break
        draft.append(token)
    return tokens, proposers
