"""The seam between rounds and machines: what a round knows of a model, wherever that runs.

A round names neither caches nor passes nor HTTP. It opens a sequence on a model, and lets it decode and verify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from parse.sampling import Sampling, Written
from parse.verifiers import Evidence, Labels, Needs

Stop = Callable[[list[int]], bool]  # the tokens written so far -> whether to stop after the last
OnToken = Callable[[list[int]], None]  # is given the tokens written so far, whenever there are more


class Model(Protocol):
    """A language model that reads and writes token ids."""

    @property
    def tokenizer(self) -> Any:
        """Of `transformers`' kind."""
        ...

    @property
    def name(self) -> str:
        """Its folder, hub id or address."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt, answer and verdict suffix; None where no limit is known."""
        ...

    @property
    def verdict_tokens(self) -> int:
        """Tokens of its context that a verdict takes beside its suffix."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many tokens it has an embedding for."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """What `ModelSequence.verify` can give, of `parse.verifiers.PROVIDED`."""
        ...

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            ValueError: naming one of them.
        """
        ...

    def warm_up(self, at_once: int = 1) -> None:
        """Do what makes later requests faster, for as many of them at once."""
        ...

    async def label_score(self, ids: Sequence[int], labels: Labels) -> float:
        """P(yes) / (P(yes) + P(no)) of the token after a text."""
        ...

    def open(self, prompt_ids: Sequence[int], layers: tuple[int, ...] = ()) -> ModelSequence:
        """A sequence that begins with a prompt.

        Args:
            layers: keep these hidden states of all that is read, for a verifier that needs them.
        """
        ...


class ModelSequence(Protocol):
    """A prompt and an answer in the making. `ids` are always the tokens of the answer so far, after the prompt."""

    async def prefill(self) -> None:
        """Read the prompt now, rather than with what follows it."""
        ...

    async def decode(
        self,
        ids: Sequence[int],
        limit: int,
        sampling: Sampling,
        stop: Stop | None = None,
        on_token: OnToken | None = None,
        proposer: Proposer | None = None,
    ) -> Written:
        """What the model writes after the prompt and `ids`: up to `limit` tokens, to an end token, or until `stop`.

        Args:
            proposer: a draft that proposes tokens, of which those are kept that the model chooses itself.
        """
        ...

    async def verify(self, ids: Sequence[int], draft: Written, ends: Sequence[int], needs: Needs) -> Evidence:
        """What the model tells, in one pass, about K prefixes `draft.ids[:end]` that follow the prompt and `ids`."""
        ...

    def close(self) -> None:
        """Give back what the sequence holds."""
        ...


@dataclass(frozen=True)
class Proposer:
    """A draft that proposes some tokens at a time."""

    sequence: ModelSequence
    count: int  # of its tokens at a time
    to_draft: Callable[[Sequence[int]], list[int]]  # the answer's tokens -> the same in the draft's
    to_target: Callable[[Sequence[int]], list[int]] | None = None  # and back; None: both have the same tokens
    on_pass: Callable[[int, int], None] = lambda proposed, accepted: None  # is told of each pass over proposals
