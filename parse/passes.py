"""Forward passes: one model over many texts, each at its own length, plain or packed.

Whoever writes or verifies a text yields a `Pass` and is sent its `Output`. So every answer reads like the
algorithm, and `drive_together` can run whatever passes the answers of a batch ask for at the same moment as one.
Shape letters: B texts, T tokens of the widest pass, P keys of the longest text, K cuts, N draft, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from parse.cache import PrefixCache
from parse.layout import Layout, pack, visible
from parse.models import SLIDING, attention_types

T = TypeVar("T")
Steps = Generator["Pass | None", Any, T]  # yields passes and is sent their outputs; None: the answer has grown


@dataclass(frozen=True)
class Pass:
    """One text's part in a forward pass: tokens to read behind those that its row of the cache holds."""

    reader: Reader
    row: int
    ids: Sequence[int]  # the T tokens; where there is a layout, its own
    layout: Layout | None = None  # a packed verification pass; None reads the tokens as they follow
    keep: Sequence[int] | None = None  # indices of the tokens whose logits are needed; None: the last one
    with_states: bool = False

    @property
    def kept(self) -> Sequence[int]:
        """The indices of the tokens whose logits are needed."""
        return self.keep if self.keep is not None else [len(self.ids) - 1]


@dataclass(frozen=True)
class Output:
    """What a pass gives one text."""

    logits: Tensor  # [len(keep), V]
    states: tuple[Tensor, ...]  # [T, D] behind 0, 1, ... layers where asked for, else none


@dataclass
class Reader:
    """A model and the texts that it reads at the same time, each in a row of one cache."""

    model: PreTrainedModel
    eos_ids: frozenset[int] = frozenset()
    rows: int = 1
    cache: PrefixCache = field(init=False)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = PrefixCache(self.rows)
        self._free = list(reversed(range(self.rows)))

    def open(self) -> int:
        """A row for a new text."""
        row = self._free.pop()
        self.cache.truncate(0, row)
        return row

    def close(self, row: int) -> None:
        """Give the row of a finished text back."""
        self._free.append(row)

    @torch.inference_mode()
    def forward(self, passes: Sequence[Pass]) -> list[Output]:
        """Run passes as few forward passes, each of like widths; the order is kept."""
        if len(passes) == 1:
            return self._alone(passes[0])
        outputs: dict[int, Output] = {}
        for group in _of_like_width(passes):
            run = self._alone(passes[group[0]]) if len(group) == 1 else self._batch([passes[i] for i in group])
            outputs.update(zip(group, run, strict=True))
        return [outputs[i] for i in range(len(passes))]

    def _alone(self, one: Pass) -> list[Output]:
        """One text: no padding, and no mask where a plain causal pass needs none."""
        device, start, layout = self.model.device, self.cache.lengths[one.row], one.layout
        positions = torch.arange(start, start + len(one.ids)) if layout is None else layout.position_ids  # [T]
        mask = None if layout is None else self._masks(layout.mask)
        keep = 1 if one.keep is None else torch.tensor(list(one.keep), device=device)
        output = self._run(
            torch.tensor([list(one.ids)]), positions[None], mask, [one.row], [len(one.ids)], keep, one.with_states
        )
        assert output.logits is not None
        return [Output(output.logits[0], tuple(state[0] for state in output.hidden_states or ()))]

    def _batch(self, passes: Sequence[Pass]) -> list[Output]:
        """Several texts, right-padded to the widest pass; a padding token sees only itself."""
        widths = [len(one.ids) for one in passes]
        width = max(widths)
        past = torch.tensor([self.cache.lengths[one.row] for one in passes])  # [B]
        ids = torch.tensor([[*one.ids, *[0] * (width - len(one.ids))] for one in passes])  # [B, T]
        positions = past[:, None] + torch.arange(width)  # [B, T]
        limit, own = positions + 1, positions.clone()  # [B, T] each
        for b, (one, used) in enumerate(zip(passes, widths, strict=True)):
            if one.layout is not None:
                positions[b, :used] = one.layout.position_ids
                limit[b, :used], own[b, :used] = one.layout.limit, one.layout.own
            limit[b, used:], positions[b, used:] = 0, 0
        masks = self._masks(lambda window: visible(past, limit, own, positions, window))
        kept = sorted({index for one in passes for index in one.kept})
        keep = 1 if kept == [width - 1] else torch.tensor(kept, device=self.model.device)
        output = self._run(
            ids, positions, masks, [one.row for one in passes], widths, keep, any(one.with_states for one in passes)
        )
        assert output.logits is not None  # [B, len(kept), V]
        place = {index: i for i, index in enumerate(kept)}
        return [
            Output(
                output.logits[b, [place[index] for index in one.kept]],
                tuple(state[b, : widths[b]] for state in output.hidden_states or ()) if one.with_states else (),
            )
            for b, one in enumerate(passes)
        ]

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor] | None,
        rows: list[int],
        widths: list[int],
        keep: int | Tensor,
        with_states: bool,
    ) -> CausalLMOutputWithPast:
        """The model over ids and positions [B, T]; afterwards each row of the cache is longer by its width."""
        device = self.model.device
        with self.cache.reading(rows, widths):
            return self.model(  # type: ignore[no-any-return]
                input_ids=ids.to(device),
                position_ids=positions.to(device),
                attention_mask=masks,
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=with_states,
                logits_to_keep=keep,
            )

    def _masks(self, mask_within: Any) -> Tensor | dict[str, Tensor]:
        """The mask as the model takes it, [B, 1, T, P]: one for each kind of its layers.

        Boolean; where the model's attention is its own ("eager"), added to the scores: 0 or the lowest number.

        Args:
            mask_within: gives the mask [B, T, P] or [T, P] for a sliding window in tokens, or None.
        """
        model, made = self.model, {}
        for kind in attention_types(model.config):
            mask = mask_within(model.config.sliding_window if kind == SLIDING else None)
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None]  # [B, 1, T, P]
            mask = mask.to(model.device)
            if model.config._attn_implementation == "eager":
                lowest = torch.finfo(model.dtype).min
                mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
            made[kind] = mask
        return made if len(made) > 1 else made.popitem()[1]


def _of_like_width(passes: Sequence[Pass]) -> list[list[int]]:
    """Indices of the passes in groups, each at least half as wide as the widest of its group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(passes)), key=lambda i: -len(passes[i].ids)):
        if not groups or 2 * len(passes[i].ids) < len(passes[groups[-1][0]].ids):
            groups.append([])
        groups[-1].append(i)
    return groups


def drive(steps: Steps[T]) -> T:
    """Run one text's steps to their end, each pass by itself."""
    growth = growing(steps)
    while True:
        try:
            next(growth)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]


def growing(steps: Steps[T]) -> Generator[None, None, T]:
    """Run one text's steps, each pass by itself, and yield whenever the answer has grown."""
    output = None
    while True:
        try:
            wanted = steps.send(output)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]
        if wanted is None:
            output = None
            yield
        else:
            output = wanted.reader.forward([wanted])[0]


def drive_together(waiting: Iterable[Steps[T]], at_once: int) -> Iterator[tuple[int, T]]:
    """Run the steps of many texts, so many at once: all passes that are wanted at a moment run together.

    A finished one leaves at once, and the next one takes its place.

    Args:
        waiting: the texts' steps, drawn as there is room for them.

    Yields:
        index and result of each text, as they finish.
    """
    source = enumerate(waiting)
    wanted: dict[int, tuple[Steps[T], Pass]] = {}  # what each running text waits for
    while True:
        while len(wanted) < at_once and (entry := next(source, None)) is not None:
            index, steps = entry
            finished = _advance(steps, None)
            if isinstance(finished, Pass):
                wanted[index] = (steps, finished)
            else:
                yield index, finished[0]
        if not wanted:
            return
        for reader in {id(one.reader): one.reader for _, one in wanted.values()}.values():
            asking = [i for i, (_, one) in wanted.items() if one.reader is reader]
            outputs = reader.forward([wanted[i][1] for i in asking])
            for index, output in zip(asking, outputs, strict=True):
                steps, _ = wanted[index]
                finished = _advance(steps, output)
                if isinstance(finished, Pass):
                    wanted[index] = (steps, finished)
                else:
                    del wanted[index]
                    yield index, finished[0]


def _advance(steps: Steps[T], output: Output | None) -> Pass | tuple[T]:
    """Go on to the next pass; at the end, the result as a tuple of one."""
    try:
        while (wanted := steps.send(output)) is None:
            output = None
        return wanted
    except StopIteration as finished:
        return (finished.value,)


def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError unless a small packed pass gives what separate passes give: for architectures nobody tried."""
    ids = [token % model.config.vocab_size for token in range(7, 207, 10)]
    prompt, draft, suffix, ends = ids[:6], ids[6:16], ids[16:], (3, 7, 10)
    reader = Reader(model)
    reader.forward([Pass(reader, 0, prompt)])
    layout = pack(draft, ends, suffix, past=len(prompt))
    packed = reader.forward([Pass(reader, 0, layout.ids, layout, layout.last_suffix.tolist())])[0].logits  # [K, V]
    rows = [[*prompt, *draft[:end], *suffix] for end in ends]
    with torch.inference_mode():
        alone = [
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1] for row in rows
        ]
    gap = (packed.float().softmax(-1) - torch.stack(alone).float().softmax(-1)).abs().max().item()
    if not gap <= (1e-3 if model.dtype == torch.float32 else 0.1):  # not a number is wrong too
        raise ValueError(
            f"{model.config.name_or_path or model.config.model_type} ({model.config.model_type}) does not heed the "
            f"packed pass's mask or positions: its probabilities are off by {gap:.2g}; use a causal attention model "
            "such as Llama, Qwen, Mistral or GPT-2"
        )
