"""Lossless token-level speculation: the draft proposes tokens, and the target keeps those that it would choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from parse.local.runner import Pass
from parse.local.sequence import CachedSequence
from parse.model import Stop
from parse.sampling import GREEDY, Sampling, Written


@dataclass(frozen=True)
class Crossing:
    """How a draft with other tokens than the target's reads along: as text."""

    to_draft: Callable[[list[int]], list[int]]  # all that the target has read -> the same in the draft's tokens
    to_target: Callable[[Sequence[int]], list[int]]  # tokens that the draft adds -> the same in the target's tokens


async def speculate(
    target: CachedSequence,
    draft: CachedSequence,
    limit: int,
    sample: Sampling,
    lookahead: int,
    stop: Stop | None = None,
    on_token: Callable[[list[int]], None] | None = None,
    crossing: Crossing | None = None,
    on_pass: Callable[[int, int], None] = lambda proposed, accepted: None,
) -> Written:
    """`CachedSequence.decode` of the target, the draft proposing `lookahead` of its tokens at a time: fewer passes.

    Each pass of the target reads the last token that it chose and the proposals after it:

        read      token   p_1   p_2     p_3
        chosen    p_1     p_2   other   -       kept while the choice is what was proposed; `other` is read next

    Greedy choices are those of the target alone. Sampled ones are distributed as by the target alone where both have
    the same tokens, see `Sampling.settle`; where text crosses between them, they are the very ones that the target
    alone draws, and a proposal is kept where it is what was drawn (as in Timor et al., arXiv 2502.05202).

    Args:
        crossing: for a draft with other tokens.
        on_pass: is told after each pass over proposals how many tokens they were, and how many of them are accepted.
    """
    written: list[int] = []
    # the draft's ends may be among the proposals
    ends = frozenset() if crossing or sample.ignore_eos else draft.runner.eos_ids
    token = sample(await target.next_logits())
    while not sample.ends(token, target.runner.eos_ids):
        written.append(token)
        if on_token:
            on_token(written)
        if len(written) >= limit or (stop and stop(written)):
            target.append(token)
            return Written(written, ended=False)
        start = len(target.ids) + 1  # after the token
        room = limit - len(written)
        proposed, proposers = await _proposing(draft, [*target.ids, token], min(lookahead, room), sample, crossing)
        proposed, proposers = proposed[:room], proposers[:room]
        read = [token, *(t for t in proposed if t not in ends)]  # the draft's end may only be the last
        logits = (await Pass(target.runner, target.row, read, keep=range(len(read)))).logits  # [1 + read, V]
        target.has_read(read)
        kept = 0
        for proposal, proposer in zip(proposed, proposers, strict=True):
            token = sample(logits[kept]) if proposer is None else sample.settle(proposal, proposer, logits[kept])
            if token != proposal or sample.ends(token, target.runner.eos_ids) or kept + 1 == len(read):
                break  # the last: an end for the draft alone, not read yet
            kept += 1
            written.append(token)
            if on_token:
                on_token(written)
            if len(written) >= limit or (stop and stop(written)):
                target.rollback(start + kept, logits[kept])
                on_pass(kept, kept)  # what comes after the end of the text is not compared
                return Written(written, ended=False)
        else:
            token = sample(logits[kept])
        agreed_end = kept < len(proposed) and token == proposed[kept] and sample.ends(token, target.runner.eos_ids)
        if proposed:
            on_pass(len(proposed) - agreed_end, kept)  # an end is no token of the text
        target.rollback(start + kept, logits[kept])
    return Written(written, ended=True)


async def _proposing(
    draft: CachedSequence, text: list[int], count: int, sample: Sampling, crossing: Crossing | None
) -> tuple[list[int], Sequence[Tensor | None]]:
    """What the draft adds to a text of the target's tokens, in those, and the logits [V] that each was drawn from.

    Without the same tokens there are none of these, and the draft proposes what is likeliest. Nothing is proposed where
    the draft's context ends.
    """
    read = crossing.to_draft(text) if crossing else [each for each in text if each < draft.runner.vocabulary]
    if draft.runner.longest is not None and len(read) + count > draft.runner.longest:
        return [], []
    await draft.set_prefix(read)
    if crossing:
        proposed = crossing.to_target((await draft.decode(count, GREEDY)).ids)
        return proposed, [None] * len(proposed)
    tokens: list[int] = []
    proposers: list[Tensor] = []
    while len(tokens) < count:
        logits = await draft.next_logits()
        token = sample(logits)
        tokens.append(token)
        proposers.append(logits)
        if sample.ends(token, draft.runner.eos_ids):
            break
        draft.append(token)
    return tokens, proposers
