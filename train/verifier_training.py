"""Fitting what gives hazards: a probe's head, or an adapter's head and LoRA, on labelled drafts.

The loss is the likelihood of where each draft first goes wrong. After every epoch the verdicts on held-out prompts
decide whether these weights are the best so far, by what counts in the end: how much may be accepted at the promised
accuracy. Training stops after some epochs without a gain. Under DDP and FSDP2 each process learns from its own share of
the drafts, in equally many steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, get_cosine_schedule_with_warmup

from eval.verifier_metrics import Example, Scored, measure, valid_cuts
from parse.layout import pack, row_numbers, stack
from parse.local.compiled import masks
from parse.verifiers.folded import rise_inputs
from parse.verifiers.heads import (
    AttentiveHead,
    HazardHead,
    RiseHead,
    segment_evidence,
    survival,
    text_inputs,
    token_inputs,
)
from recipes.progress import progress_bar
from recipes.verifier_schema import Fit
from train.calibration import empirical

T = TypeVar("T")
Log = Callable[[dict[str, float]], None]
WARM_UP = 0.1  # of the steps
LIKE_LENGTH = 8  # tokens
START, LEAK = 0.3, 0.05  # of a folded probe's rows: how far apart they begin, and what is learnt where none rises
MAY_RISE, TOO_HIGH = 30.0, 0.01  # how far a row may rise before it costs, and what the square of more costs
FITTED, RIDGE = 20_000, 1e-3  # tokens by which its rows begin; of their products' mean, added to the diagonal


class ProbeModule(nn.Module):
    """What a probe trains: the head, on states and evidence that were gathered before."""

    def __init__(self, head: HazardHead | AttentiveHead) -> None:
        super().__init__()
        self.head = head

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """The segment of each of the batch's M tokens, int64 [M], and the head's inputs."""
        segments = _segments(examples)
        if isinstance(self.head, AttentiveHead):
            return segments, *text_inputs([one.evidence for one in examples])
        states, evidence = zip(*(token_inputs(one.evidence) for one in examples), strict=True)
        return segments, torch.cat(states), torch.cat(evidence)

    def forward(self, segments: Tensor, *inputs: Tensor) -> Tensor:
        """The hazard of each of the batch's segments: [sum K]."""
        hazards = self.head(*inputs)  # [M]
        return _summed(hazards, segments)


class FoldedModule(nn.Module):
    """What a folded probe trains: rows of the LM head, and the head over their rises.

    Rows begin where they would rise over about half of the tokens: at what best says the highest real logit, each in a
    direction of its own. States are scaled, so that all of their numbers learn alike; they are not centred, as an LM
    head has no bias for that.
    """

    base: Tensor
    scale: Tensor

    def __init__(self, base: Tensor, scale: Tensor, rows: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.head, self.dropout = RiseHead(len(base), rows, hidden), nn.Dropout(dropout)  # of the states
        self.head.rows.requires_grad_(False)  # they are made of these:
        self.directions = nn.Parameter(torch.randn(rows, len(base)) * START / len(base) ** 0.5)
        self.register_buffer("base", base)  # [D]: base . h is about the highest real logit
        self.register_buffer("scale", scale)  # [D]: of the states' numbers

    @classmethod
    def starts(cls, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """`base` and `scale`, float32 [D] each, by the main process's share of the drafts to learn from."""
        states = torch.cat([cast(Tensor, one.evidence.states) for one in examples])  # [sum N, D]
        top = torch.cat([cast(Tensor, one.evidence.top) for one in examples])  # [sum N]
        chosen = torch.randperm(len(states))[:FITTED]
        known, wanted = states[chosen].float(), top[chosen].float()  # [n, D], [n]
        products = known.T @ known / len(known)  # [D, D]
        ridge = RIDGE * products.diagonal().mean() * torch.eye(len(products))  # [D, D]
        base = torch.linalg.solve(products + ridge, known.T @ wanted / len(known))  # [D]
        found = [(base, products.diagonal().sqrt().clamp(min=1e-6))]
        broadcast_object_list(found)
        return found[0]

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """The segment of each of the batch's M tokens, int64 [M]; their states [M, D], highest logits and evidence."""
        segments = _segments(examples)
        states, evidence = zip(
            *(rise_inputs(cast(Tensor, one.evidence.states), one.evidence) for one in examples), strict=True
        )
        tops = [cast(Tensor, one.evidence.top) for one in examples]  # [N] each
        top = torch.cat(
            [torch.cat([t, t[len(t) - 1 :].expand(len(s) - len(t))]) for t, s in zip(tops, states, strict=True)]
        )
        return segments, torch.cat(states), top, torch.cat(evidence)

    def forward(self, segments: Tensor, states: Tensor, top: Tensor, evidence: Tensor) -> Tensor:
        """The hazard of each of the batch's segments: [sum K]."""
        known = states.float()  # [M, D]
        over = self.dropout(known / self.scale) @ self.directions.T + (known @ self.base - top)[:, None]  # [M, R]
        rises = nn.functional.leaky_relu(over, LEAK) if self.training else over.clamp(min=0)
        hazards = self.head(rises, evidence)  # [M]
        total = _summed(hazards, segments)  # [sum K]
        if self.training:  # a row that rises higher than it may be forbidden would be written
            total = total + TOO_HIGH * (over - MAY_RISE).clamp(min=0).square().mean()
        return total

    @torch.no_grad()
    def folded(self) -> RiseHead:
        """The head with its rows."""
        self.head.rows.copy_(self.base + self.directions / self.scale)
        return self.head


class AdapterModule(nn.Module):
    """What an adapter trains: a LoRA on the suffixes of the packed layout, and the head after each of them.

    Prompts and drafts are read first, without gradients: the LoRA does not act there.
    """

    def __init__(self, adapted: PeftModel, base: PreTrainedModel, head: HazardHead, suffix_ids: list[int]) -> None:
        super().__init__()
        self.adapted, self.head, self.suffix_ids = adapted, head, suffix_ids
        self._masks = lambda *rows, keys: masks(base, *rows, keys=keys)
        self._no_split_modules = base._no_split_modules  # what FSDP keeps whole

    def train(self, mode: bool = True) -> AdapterModule:
        """The base is read as the engine reads it, without dropout."""
        super().train(mode)
        self.adapted.eval()
        return self

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """What `forward` takes: texts, each of what stands before a draft and the draft, and suffixes after its cuts.

        Returns:
            texts int64 [5, B, T] and suffixes int64 [5, B, U], see `parse.layout.row_numbers`; row and index of each
            suffix's last token, int64 [sum K, 2]; evidence float32 [sum K, 13].
        """
        texts = [[*one.draft.context_ids, *one.draft.ids] for one in examples]
        cuts = [[len(one.draft.context_ids) + end for end in one.draft.ends] for one in examples]
        layouts = [pack(text, ends, self.suffix_ids) for text, ends in zip(texts, cuts, strict=True)]
        width = max(map(len, texts))
        turns = [layout.suffixes(after=width) for layout in layouts]
        longest = max(len(turn.ids) for turn in turns)
        read = stack([row_numbers(text, None, 0, width) for text in texts])
        asked = stack([row_numbers(turn.ids, turn, width, longest) for turn in turns])
        places = [(row, index) for row, turn in enumerate(turns) for index in turn.last_suffix]
        evidence = torch.cat([segment_evidence(one.evidence) for one in examples])  # [sum K, 13]
        return read, asked, torch.tensor(places), evidence

    def forward(self, texts: Tensor, suffixes: Tensor, places: Tensor, evidence: Tensor) -> Tensor:
        """The hazard of each of the batch's segments: [sum K]."""
        cache = DynamicCache()
        with torch.no_grad():
            self._read(texts, cache, adapted=0)
        output = self._read(suffixes, cache, adapted=suffixes.shape[-1])
        states = output.hidden_states[-1][places[:, 0], places[:, 1]]  # [sum K, D]
        return self.head(states, evidence)

    def _read(self, numbers: Tensor, cache: DynamicCache, adapted: int) -> Any:
        """A pass over the tokens of [5, B, T] after what the cache holds, the LoRA on the last `adapted` of a row."""
        ids, positions, *rest = numbers  # [B, T] each
        keys = cache.get_seq_length() + ids.shape[1]
        return self.adapted(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(*rest, positions, keys=keys),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=adapted > 0,
            logits_to_keep=1,
            alora_offsets=[adapted] * len(ids),
        )


Module = ProbeModule | FoldedModule | AdapterModule
M = TypeVar("M", ProbeModule, FoldedModule, AdapterModule)


@dataclass(frozen=True)
class Fitted(Generic[M]):
    """What was fitted, and how good it is on held-out prompts."""

    module: M
    acceptable: float  # the share of their drafts' tokens that may be accepted at the promised accuracy
    loss: float  # on their drafts, nats a draft
    least_loss: float  # of all epochs
    epochs: int  # until it had not been better for long


def survival_loss(hazards: Tensor, valid: Sequence[bool], error_weight: float = 1.0) -> Tensor:
    """Negative log-likelihood, in nats, of surviving each valid segment and failing in the first invalid one.

    Args:
        hazards: [K], of the draft's segments.
        error_weight: of the failure's term; errors are rare, and to miss one costs an answer.
    """
    first = valid_cuts(valid)
    survived = hazards[:first].sum()
    if first == len(valid):
        return survived
    failed = -torch.expm1(-hazards[first].clamp(min=1e-6))
    return survived - error_weight * torch.log(failed)


def fit(
    make: Callable[[], M],
    train_set: Sequence[Example],
    held_out: Sequence[Example],
    plan: Fit,
    max_accuracy_loss: float,
    what: str,
    log: Log = lambda _: None,
    title: str = "",
) -> Fitted[M]:
    """Train what `make` makes and return it with its best weights, on every process.

    Args:
        make: gives a module of the same base and shape at every call.
        train_set: this process's share of the drafts to learn from.
        held_out: its share of those that decide which epoch was the best.
        max_accuracy_loss: the accuracy that may be lost.
        what: the recipe's key of the plan, in the section `verifier`.
        log: takes the figures of every epoch.
        title: the name on the progress bar, where it is another.

    Raises:
        ValueError: if there are no drafts for some process.
    """
    training = _Training(make, train_set, held_out, plan, what)
    best, kept, since, epoch = (-1.0, 0.0), dict[str, Tensor](), 0, 0  # acceptable share, minus the loss; held out
    losses = list[float]()  # of each epoch
    with progress_bar(title or what, total=training.steps * plan.epochs) as bar:
        while epoch < plan.epochs and since < plan.patience:
            epoch, since = epoch + 1, since + 1
            training.learn(bar)
            scored, loss = training.test()
            losses.append(loss)
            score = (acceptable(scored, max_accuracy_loss), -loss)
            log({f"{what}/held_out_acceptable": score[0], f"{what}/held_out_loss": loss})
            if score > best:
                best, kept, since = score, training.weights(), 0
            if since == plan.patience:
                bar.total = bar.n  # the rest is left out
            bar.set_postfix_str(f"held out: {score[0]:.1%} acceptable, best {best[0]:.1%}", refresh=False)
    return Fitted(_restored(make(), kept), best[0], -best[1], min(losses), epoch)


class _Training(Generic[M]):
    """A module that learns from this process's share of the drafts."""

    def __init__(
        self, make: Callable[[], M], train_set: Sequence[Example], held_out: Sequence[Example], plan: Fit, what: str
    ) -> None:
        self.train_set, self.held_out, self.plan, self.what = train_set, held_out, plan, what
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        sizes = gather_object([(len(train_set), len(held_out))])
        if min(min(size) for size in sizes) == 0:
            raise ValueError(
                f"the {what} has no labelled drafts to learn from or to be tested on (drafts and held-out drafts of "
                f"each process: {sizes}): raise rollouts.train, or see why no answer of the target is right"
            )
        self.share = -(-plan.batch_size // self.accelerator.num_processes)
        # as many on every process
        self.steps, self.tests = (-(-max(column) // self.share) for column in zip(*sizes, strict=True))
        self.module: M = make()
        trained = _trained(self.module).values()
        optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        total = self.steps * plan.epochs
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, int(WARM_UP * total), total)

    def learn(self, bar: Any) -> None:
        """One epoch."""
        self.model.train()
        for some in _shuffled(_cycled(_by_length(self.train_set), self.share, self.steps)):
            loss = self._loss_of(some, self._hazards(some))
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the {self.what}'s loss is {loss.item()} at step {bar.n + 1} of {bar.total}, on drafts of the "
                    f"prompts {sorted(one.draft.number for one in some)}: lower verifier.{self.what}.learning_rate"
                )
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(_trained(self.model).values(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            bar.update()

    @torch.no_grad()
    def test(self) -> tuple[list[Scored], float]:
        """Verdicts on the held-out drafts of all processes, and the loss on them."""
        self.model.eval()
        batches = _cycled(self.held_out, self.share, self.tests)
        found = [hazards for some in batches for hazards in self._hazards(some)][: len(self.held_out)]
        losses = gather_object([self._loss_of(self.held_out, found).item()])
        scored = [Scored(one.draft, survival(h).tolist()) for one, h in zip(self.held_out, found, strict=True)]
        return gather_object(scored), sum(losses) / len(losses)

    def weights(self) -> dict[str, Tensor]:
        """A copy of what has been learnt so far."""
        module = self.accelerator.unwrap_model(self.model)
        return {name: tensor.detach().clone() for name, tensor in _trained(module).items()}

    def _hazards(self, some: Sequence[Example]) -> list[Tensor]:
        """The hazards [K] of each draft."""
        inputs = [tensor.to(self.accelerator.device) for tensor in self.module.collate(some)]
        return list(self.model(*inputs).split([len(one.draft.ends) for one in some]))

    def _loss_of(self, some: Sequence[Example], found: Sequence[Tensor]) -> Tensor:
        pairs = zip(found, some, strict=True)
        return torch.stack([survival_loss(h, one.draft.valid, self.plan.error_weight) for h, one in pairs]).mean()


def acceptable(scored: Sequence[Scored], max_accuracy_loss: float) -> float:
    """The share of the drafts' tokens that can be accepted at the promised loss, on these very prompts."""
    return measure(scored, empirical(scored, max_accuracy_loss))["accepted_fraction"]


def _segments(examples: Sequence[Example]) -> Tensor:
    """The segment of each of a batch's M tokens, counted through all drafts: int64 [M]."""
    lengths = [stop - start for one in examples for start, stop in one.evidence.bounds]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _summed(hazards: Tensor, segments: Tensor) -> Tensor:
    """The hazards [M] of tokens, summed over each segment: [sum K]."""
    return hazards.new_zeros(int(segments[-1]) + 1).index_add(0, segments, hazards)


def _by_length(examples: Sequence[Example]) -> list[Example]:
    """Drafts in a random order in which neighbours have about the same length, so that batches hold little padding."""
    order = torch.randperm(len(examples)).tolist()
    return [examples[i] for i in sorted(order, key=lambda i: len(examples[i].draft.ids) // LIKE_LENGTH)]


def _shuffled(batches: Iterable[T]) -> list[T]:
    held = list(batches)
    return [held[i] for i in torch.randperm(len(held)).tolist()]


def _cycled(items: Sequence[T], size: int, count: int) -> Iterator[list[T]]:
    """Exactly so many batches, from the start again where the items run out."""
    endless = itertools.cycle(items)
    for index in range(count):
        left = max(len(items) - index * size, 1)
        yield list(itertools.islice(endless, min(size, left)))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _restored(module: M, weights: dict[str, Tensor]) -> M:
    """The module with these weights, whole where they were sharded."""
    with torch.no_grad():
        for name, parameter in _trained(module).items():
            value: Any = weights[name]
            parameter.copy_(value.full_tensor() if hasattr(value, "full_tensor") else value)
    return module.eval()
