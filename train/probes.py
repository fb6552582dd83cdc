"""Probes: which layers they read, how they are trained, and whether more labelled prompts would make them better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate.utils import gather_object

from eval.verifier_metrics import Example
from parse.verifiers.heads import TOKEN_EVIDENCE, AttentiveHead, HazardHead
from recipes.verifier_schema import ProbeSection
from train.verifier_training import Fitted, Log, ProbeModule, fit

CURVE = (0.25, 0.5)  # of the prompts to learn from, on which it is measured whether more of them would help


@dataclass(frozen=True)
class ProbeData:
    """What a probe learns from: this process's share of the drafts, with the states of some layers."""

    train_set: Sequence[Example]
    held_out: Sequence[Example]
    layers: tuple[int, ...]
    section: ProbeSection
    max_accuracy_loss: float

    def fit(self, title: str = "probe", log: Log = lambda _: None) -> Fitted[ProbeModule]:
        """Fit a head to the states of the draft's own tokens, and of what stands before it where it has attention.

        Args:
            title: the name on the progress bar.
            log: takes the figures of every epoch.
        """
        states = self.train_set[0].evidence.states if self.train_set else None
        width = len(self.layers) if states is None else states.shape[-1]
        section = self.section

        def make() -> ProbeModule:
            sizes = width, TOKEN_EVIDENCE, section.hidden, section.dropout, len(self.layers)
            return ProbeModule(AttentiveHead(*sizes, section.blocks) if section.blocks else HazardHead(*sizes))

        return fit(make, self.train_set, self.held_out, section, self.max_accuracy_loss, "probe", log, title)

    def of_layer(self, layer: int) -> ProbeData:
        """The same with the states of one of the layers alone."""
        return self.of_layers((layer,))

    def of_layers(self, layers: tuple[int, ...]) -> ProbeData:
        """The same with the states of some of the layers alone."""

        def some(examples: Sequence[Example]) -> list[Example]:
            return [replace(one, evidence=one.evidence.of_layers(layers)) for one in examples]

        return replace(self, train_set=some(self.train_set), held_out=some(self.held_out), layers=layers)


def choose_layers(data: ProbeData, log: Log = lambda _: None) -> tuple[ProbeData, Fitted[ProbeModule]]:
    """The probe of all layers or of one alone that is nearest to the held-out labels, and what it reads.

    Each is trained to its end: a layer alone learns faster at first than several together, which end up better.
    """
    among = [data, *(data.of_layer(layer) for layer in data.layers if len(data.layers) > 1)]
    fits = [one.fit(f"probe of layers {', '.join(map(str, one.layers))}", log) for one in among]
    losses = [fitted.least_loss for fitted in fits]
    best = losses.index(min(losses))
    return among[best], fits[best]


def learning_curve(data: ProbeData, whole: Fitted[ProbeModule]) -> list[dict[str, float]]:
    """What probes may accept of the held-out drafts that learn from a part of the prompts, and from all of them."""
    numbers = sorted({one.draft.number for one in data.train_set})
    counts = [int(share * len(numbers)) for share in CURVE]
    results = []
    for share, count in zip(CURVE, counts, strict=True):
        if min(gather_object([count])) > 0:
            kept = set(numbers[:count])
            part = [one for one in data.train_set if one.draft.number in kept]
            results.append((count, replace(data, train_set=part).fit(f"probe, {share:.0%} of the prompts")))
    return [
        {"prompts": sum(gather_object([count])), "acceptable": fitted.acceptable, "loss": fitted.loss}
        for count, fitted in [*results, (len(numbers), whole)]
    ]
