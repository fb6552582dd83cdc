"""A model of `transformers` on this machine, as rounds know it; see `parse.model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parse.layout import integers, pack
from parse.local.compiled import Compiled
from parse.local.evidence import token_divergence, token_evidence
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.local.speculation import Crossing, speculate
from parse.model import OnToken, Proposer, Stop
from parse.sampling import GREEDY, Sampling, Written
from parse.verifiers import PROVIDED, Evidence, Labels, Needs, label_scores

ROOM = 512  # tokens that a warm-up's buffers hold: more than its passes read, as is most often so


class LocalModel:
    """A model, its tokenizer, and the sequences that it reads at the same time."""

    provides: frozenset[str] = PROVIDED - {"rises"}
    verdict_tokens = 0

    def __init__(self, runner: ModelRunner, tokenizer: Any = None) -> None:
        self.runner, self.tokenizer = runner, tokenizer

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        eos_ids: frozenset[int] = frozenset(),
        compile: bool = False,
        width: int | None = None,
    ) -> LocalModel:
        """A loaded model.

        Args:
            compile: allow `warm_up` to compile forward passes, where that pays.
            width: only the first so many logits are kept: not those of tokens that another model lacks.
        """
        compiled = Compiled(model, width=width) if compile else None
        return cls(ModelRunner(model, eos_ids, compiled, width), tokenizer)

    @property
    def name(self) -> str:
        """Its folder or hub id."""
        return str(self.runner.model.config.name_or_path)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.runner.eos_ids

    @property
    def vocabulary(self) -> int:
        """How many tokens it has an embedding for."""
        return self.runner.vocabulary

    @property
    def context_length(self) -> int | None:
        """The tokens of the longest sequence; None where no limit is known."""
        return self.runner.longest

    @property
    def device(self) -> torch.device:
        """Where its first weights lie."""
        return self.runner.model.device

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for: its tokenizer was given more, and the model was not."""
        if not 0 <= min(ids, default=0) <= max(ids, default=0) < self.vocabulary:
            raise ValueError(
                f"a prompt holds the token {max(ids)}, and {self.name} has "
                f"{self.vocabulary}: its tokenizer has tokens that the model was not given (resize_token_embeddings), "
                "or belongs to another model"
            )

    def open(self, prompt_ids: Sequence[int], layers: tuple[int, ...] = ()) -> LocalSequence:
        """A sequence that begins with a prompt; see `parse.model.Model`."""
        return LocalSequence(self, prompt_ids, layers)

    def with_own_cache(self, compiled: bool = True) -> LocalModel:
        """The same model over a cache of its own, which is given back with it."""
        mine = self.runner
        return type(self)(
            ModelRunner(mine.model, mine.eos_ids, mine.compiled if compiled else None, mine.width), self.tokenizer
        )

    @torch.inference_mode()  # as all passes are: what is made in another mode is another kind of tensor
    def warm_up(self, at_once: int = 1) -> None:
        """Compile the passes of as many sequences at once, where that pays, by running some over a few tokens.

        Of one sequence in a cache for one; and where there may be several, of any of them in a cache for more: one, the
        first or another, and two, with the first or without it.
        """
        compiled = self.runner.compiled
        if compiled is None or not any(compiled.pays.values()):
            return
        ids = [token % self.vocabulary for token in range(3, 11)]
        runner, rows = self.with_own_cache().runner, list[int]()

        def read(group: Sequence[int]) -> None:
            for width in (len(ids), 1, 1):
                runner.forward([Pass(runner, row, ids[:width]) for row in group])

        with compiled.warming():
            rows.append(runner.open())
            runner.forward([Pass(runner, rows[0], ids)])  # tells what a layer keeps
            runner.cache.buffers(tokens=ROOM)
            read(rows)
            if at_once > 1:
                rows += [runner.open(), runner.open()]
                for group in (rows[:1], rows[:2], rows[1:2], rows[1:]):
                    read(group)

    async def label_score(self, ids: Sequence[int], labels: Labels) -> float:
        """P(yes) / (P(yes) + P(no)) of the token after a text."""
        return float(label_scores((await self.logits(ids))[-1], labels))

    async def logits(self, ids: Sequence[int], first: int = -1) -> Tensor:
        """The logits after each token of a text from index `first` on, [len(ids) - first, V]."""
        text = CachedSequence(self.runner)
        try:
            return (await Pass(self.runner, text.row, ids, keep=range(first % len(ids), len(ids)))).logits
        finally:
            text.close()


class LocalSequence:
    """A prompt and an answer in the making, in a row of the model's cache; see `parse.model.ModelSequence`.

    What was read stays in the cache for as long as the next call's tokens begin with it: an accepted prefix is not read
    again, and the logits after each cut of a verified draft are kept, so that none of its tokens are.
    """

    def __init__(self, model: LocalModel, prompt_ids: Sequence[int], layers: tuple[int, ...] = ()) -> None:
        self.model, self.prompt_ids = model, list(prompt_ids)
        self.text = CachedSequence(model.runner)
        self.text.layers = layers
        self._boundary_logits: dict[int, Tensor] = {}  # [V] each, by the length of the text that they are after

    async def prefill(self) -> None:
        """Read the prompt now."""
        await self.text.set_prefix(self.prompt_ids)

    async def decode(
        self,
        ids: Sequence[int],
        limit: int,
        sampling: Sampling = GREEDY,
        stop: Stop | None = None,
        on_token: OnToken | None = None,
        proposer: Proposer | None = None,
    ) -> Written:
        """What the model writes after the prompt and `ids`, as far as its context reaches."""
        prefix, longest = [*self.prompt_ids, *ids], self.model.context_length
        room = limit if longest is None else min(limit, longest - len(prefix))
        if room < 1:
            return Written([], ended=False)
        await self.text.set_prefix(prefix, self._boundary_logits)
        self._boundary_logits = {}
        if proposer is None:
            return await self.text.decode(room, sampling, stop, on_token)
        draft = cast(LocalSequence, proposer.sequence)
        crossing = None
        if proposer.to_target:
            own = lambda ids: [*draft.prompt_ids, *proposer.to_draft(ids[len(self.prompt_ids) :])]
            crossing = Crossing(own, proposer.to_target)
        return await speculate(
            self.text, draft.text, room, sampling, proposer.count, stop, on_token, crossing, proposer.on_pass
        )

    async def verify(self, ids: Sequence[int], draft: Written, ends: Sequence[int], needs: Needs) -> Evidence:
        """The packed pass over a draft; see `packed_evidence`."""
        await self.text.set_prefix([*self.prompt_ids, *ids], self._boundary_logits, defer=True)
        start = len(self.text.ids)
        evidence, after = await packed_evidence(self.text, draft, ends, needs)
        self._boundary_logits = {start + end: logits for end, logits in zip((0, *ends), after, strict=True)}
        return evidence

    def close(self) -> None:
        """Make room for another sequence."""
        self.text.close()


async def packed_evidence(
    text: CachedSequence, draft: Written, ends: Sequence[int], needs: Needs
) -> tuple[Evidence, Tensor]:
    """The packed pass: read a draft of N tokens after a text, and collect what is needed to judge K prefixes.

    What of the text was not read yet goes first in the pass. Afterwards the cache holds the text and the whole draft;
    the suffixes are dropped.

    Returns:
        the evidence for a verifier, and the logits after the text and after each end, [K + 1, V].
    """
    if needs.context_states:
        text.layers = needs.layers
        text.read_again_from_known()
    first, device = text.deferred, text.device
    w, n = len(first), len(draft.ids)
    before = text.last_logits
    assert before is not None or first, "the logits after this text are neither known nor about to be"
    lead = int(w > 0)  # the logits after what waited are those before the draft
    layout = pack([*first, *draft.ids], [w + end for end in ends], needs.suffix_ids, len(text.ids) - w)
    whole, adapted = needs.token_logprobs or needs.draft_logits is not None, needs.adapter is not None
    read = range(w - lead, w + n) if whole else sorted({*range(w - lead, w), w + n - 1, *(w + e - 1 for e in ends)})
    keep = [*read] if adapted else [*read, *layout.last_suffix]
    with_states = bool(needs.layers) or adapted
    output = await Pass(text.runner, text.row, layout.ids, layout, keep, with_states, needs.adapter)
    if before is None:
        before = output.logits[0]  # [V]
    drafted, suffix_logits = output.logits[lead : len(read)], output.logits[len(read) :]  # [N or K, V], [K, V]
    places = [read.index(w + end - 1) - lead for end in [*ends, n]]
    after = torch.cat([before[None], drafted[places]])  # [K + 2, V]: after the text, each end, the draft
    length, context_states = len(text.ids), None
    if needs.context_states:
        text.remember(output.states, w + n)
        assert text.states is not None
        context_states = text.states[:length]  # [C, D * layers]
    text.has_read([*draft.ids, *layout.ids[w + n :]])
    text.rollback(length + n, after[-1])
    end_ids = sorted(text.runner.eos_ids) if draft.ended else []
    log_prob = entropy = margin = top = torch.empty(0, device=device)
    if whole:
        log_prob, entropy, margin = token_evidence(before, drafted, integers(draft.ids).to(device), end_ids)
        top = drafted.amax(-1).float()  # [N]
    divergence = None
    if needs.draft_logits is not None:
        compared = torch.cat([before[None], drafted])[: len(log_prob)]  # [M, V]
        divergence = token_divergence(compared, needs.draft_logits, sorted(text.runner.eos_ids | needs.draft_end_ids))
    states = [output.states[layer][w : w + n] for layer in needs.layers]  # [N, D] each
    judged = suffix_logits if needs.suffix_ids else after[1:-1]  # [K, V]
    scores = label_scores(judged, needs.labels) if needs.labels else None  # [K]
    evidence = Evidence(
        ends,
        log_prob,
        entropy,
        margin,
        states=torch.cat(states, dim=-1) if states else None,  # [N, D * layers]
        label_scores=scores,
        top=top,
        suffix_states=output.states[-1][layout.last_suffix] if adapted else None,  # [K, D]
        divergence=divergence,
        context_states=context_states,
        layers=needs.layers,
    )
    return evidence, after[:-1]
