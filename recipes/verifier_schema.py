"""The section `verifier` of a recipe: which kind judges, how each learns, and what may be lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from recipes.fields import Count, Layers, Rate
from recipes.strict import Range


@dataclass(frozen=True)
class Fit:
    """How a trained verifier learns."""

    epochs: Count  # at most
    learning_rate: Rate
    batch_size: Count = 16  # drafts, over all processes
    error_weight: Annotated[float, Range(0.001, 1000)] = 1.0  # of a draft's first invalid cut beside its valid ones
    weight_decay: Annotated[float, Range(0, 100)] = 0.05
    patience: Count = 6  # epochs without a better verdict on held-out prompts, after which the rest is left out


@dataclass(frozen=True)
class HeadFit(Fit):
    """How a head with hidden units learns."""

    hidden: Annotated[int, Range(1, 10**5)] = 128  # units of the head
    dropout: Annotated[float, Range(0, 0.99)] = 0.0


@dataclass(frozen=True)
class ProbeSection(HeadFit):
    """The head on the target's states at the draft's own tokens."""

    epochs: Count = 40
    learning_rate: Rate = 2e-3
    dropout: Annotated[float, Range(0, 0.99)] = 0.1
    layers: Literal["auto"] | list[Annotated[int, Range(-(10**4), 10**4)]] = "auto"  # see `hidden_states`; "auto" are
    # four, spread over the depth, and of these all or the one that is better on held-out prompts
    blocks: Annotated[int, Range(0, 32)] = 2  # of attention over the states of prompt and draft, before the head


@dataclass(frozen=True)
class AdapterSection(HeadFit):
    """The activated LoRA on short suffixes, and its head."""

    epochs: Count = 6
    learning_rate: Rate = 1e-3
    suffix: Annotated[int, Range(1, 1000)] = 2  # tokens
    rank: Annotated[int, Range(1, 10**5)] = 16
    layers: Layers | None = None  # how many of the last ones are adapted; None for all


@dataclass(frozen=True)
class FoldedSection(HeadFit):
    """The probe that a server can give: rows of the LM head, and a small head over their rises."""

    epochs: Count = 100
    learning_rate: Rate = 3e-3
    weight_decay: Annotated[float, Range(0, 100)] = 0.01
    patience: Count = 15
    hidden: Annotated[int, Range(1, 10**5)] = 32
    dropout: Annotated[float, Range(0, 0.99)] = 0.1
    rows: Annotated[int, Range(1, 18)] = 16  # of the LM head; a server tells the likeliest 20 tokens
    tries: Count = 3  # of which the best on held-out prompts is kept


@dataclass(frozen=True)
class VerifierSection:
    """The verifier and its threshold."""

    kind: Literal["best", "probe", "folded", "adapter", "prompt", "likelihood"] = (
        "best"  # of all kinds, on held-out prompts
    )
    max_accuracy_loss: Annotated[float, Range(1e-6, 0.999)] = 0.01  # 0.01 is one point of accuracy
    probe: ProbeSection = field(default_factory=ProbeSection)
    folded: FoldedSection = field(default_factory=FoldedSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
