"""Forward passes: one model over many texts, each at its own length, plain or packed.

Whoever writes or verifies a text awaits a `Pass`, which gives its `Output`; see `parse.scheduler`.
Shape letters: B texts, T tokens of the widest pass, P keys of the longest text, K cuts, N draft, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parse.layout import Layout, integers, pack, row_numbers, stack
from parse.local.cache import PrefixCache
from parse.local.compiled import WIDE, Compiled, Read, masks
from parse.local.graphs import attending, attention_kernels
from parse.local.linear import few_rows, install
from parse.local.loading import FLEX, context_length
from parse.local.locks import lock_of
from parse.model import Stop

FLEX_BLOCK = 128  # queries and keys in a block of FlexAttention's masks


@dataclass(frozen=True)
class Pass:
    """One text's part in a forward pass: tokens to read after those that its row of the cache holds."""

    runner: ModelRunner
    row: int
    ids: Sequence[int]  # the T tokens; where there is a layout, its own
    layout: Layout | None = None  # a packed verification pass; None reads the tokens as they follow
    keep: Sequence[int] | None = None  # increasing indices of tokens whose logits are needed; None: the last one
    with_states: bool = False
    adapted: PeftModel | None = None  # the runner's model under a LoRA that acts on the layout's suffixes alone
    more: int = 0  # if nobody else waits, the most likely tokens may be written after: so many at most,
    stop: Stop | None = None  # none that ends the text, and none after which this, given all of them, stops

    def __await__(self) -> Generator[Pass, Output, Output]:
        self.runner.check_length(self)  # here, where it fails its own request alone
        return (yield self)

    @property
    def kept(self) -> Sequence[int]:
        """The indices of the tokens whose logits are needed."""
        return self.keep if self.keep is not None else [len(self.ids) - 1]


@dataclass(frozen=True)
class Output:
    """What a pass gives one text."""

    logits: Tensor  # [len(keep), V]; after what was written, [1, V]
    states: tuple[Tensor, ...]  # [T, D] after 0, 1, ... layers where asked for, else none
    written: Sequence[int] = ()  # more tokens, written and read


@dataclass
class ModelRunner:
    """A model and the texts that it reads at the same time, each in a row of one cache; for any number of threads."""

    model: PreTrainedModel
    eos_ids: frozenset[int] = frozenset()
    compiled: Compiled | None = None
    width: int | None = None  # how many logits are kept: not those of tokens that another model lacks
    cache: PrefixCache = field(init=False)
    longest: int | None = field(init=False)  # tokens of a text, see `context_length`
    vocabulary: int = field(init=False)  # tokens that it has an embedding for
    _device: torch.device = field(init=False)
    _free: list[int] = field(init=False)  # a heap: low rows are taken first
    _lock: Any = field(init=False)

    def __post_init__(self) -> None:
        self.cache, self._device = PrefixCache(), self.model.device  # the model's own property is slow
        self.longest, self.vocabulary = context_length(self.model.config), embeddings(self.model)
        if self.model.config._attn_implementation == FLEX:
            self.cache.window.multiple = FLEX_BLOCK
        self._free = [0]
        install(self.model)
        self._lock = lock_of(self.model)

    def open(self) -> int:
        """A row for a new text."""
        with self._lock:
            row = heappop(self._free) if self._free else self.cache.add_row()
            self.cache.wipe(row)
            return row

    def close(self, row: int) -> None:
        """Give the row of a finished text back."""
        with self._lock:
            self.cache.truncate(0, row)
            heappush(self._free, row)

    @torch.inference_mode()
    def forward(self, passes: Sequence[Pass], alone: Callable[[], bool] | None = None) -> list[Output]:
        """Run passes as few forward passes, each of like widths; the order is kept.

        Args:
            alone: whether nobody else waits, so that they may write more; asked again before each token.

        Raises:
            ValueError: for a text that is longer than the model's context.
        """
        for one in passes:
            self.check_length(one)
        by_index: dict[int, Output] = {}
        with self._lock, attention_kernels(self._device):
            for group in _of_like_width(passes):
                by_index.update(zip(group, self._together([passes[i] for i in group]), strict=True))
            outputs = [by_index[i] for i in range(len(passes))]
            return self._write_on(passes, outputs, alone) if alone and all(one.more for one in passes) else outputs

    def check_length(self, one: Pass) -> None:
        """Refuse what is wrong without a word, or out of range, with positions that the model does not have."""
        past, layout = self.cache.lengths[one.row], one.layout
        length = past + (len(one.ids) if layout is None else layout.draft_length + layout.suffix_length)
        if self.longest is not None and length > self.longest:
            raise ValueError(f"a text of {length} tokens, and the model's context holds {self.longest}: shorten it")

    def _write_on(self, passes: Sequence[Pass], outputs: Sequence[Output], alone: Callable[[], bool]) -> list[Output]:
        """Write on in all texts, to where the first of them stops: steps without a detour through whoever asked."""
        rows, written = [one.row for one in passes], [list[int]() for _ in passes]
        limit = min(one.more for one in passes)
        if self.longest is not None:
            limit = min(limit, self.longest - max(self.cache.lengths[row] for row in rows))
        stops = [(i, one.stop) for i, one in enumerate(passes) if one.stop]

        def take(tokens: Sequence[int]) -> bool:
            """Take a token for each text, unless one of them must not be read. Called for every step: be quick."""
            if len(written[0]) >= limit or not alone() or not self.eos_ids.isdisjoint(tokens):
                return False
            if stops and any(stop([*written[i], tokens[i]]) for i, stop in stops):
                return False
            for own, token in zip(written, tokens, strict=False):  # as many: a check takes time
                own.append(token)
            return True

        logits = [output.logits for output in outputs]  # [1, V] each
        while take(tokens := [int(own.argmax()) for own in logits]):
            steps = [Pass(self, row, [token]) for row, token in zip(rows, tokens, strict=True)]
            slots, read = self._run(steps, rows, 1, [0], False)
            self.cache.extend(rows, [1] * len(rows))
            if self.compiled and read.following is not None:
                before = len(written[0])
                read = self.compiled.follow(read.following, rows, self.cache, take) or read
                self.cache.extend(rows, [len(written[0]) - before] * len(rows))
            logits = [read.logits[slot] for slot in slots]
        return [Output(last, (), own) for last, own in zip(logits, written, strict=True)]

    def _together(self, passes: Sequence[Pass]) -> list[Output]:
        """One forward pass over several texts."""
        rows, widths = [one.row for one in passes], [len(one.ids) for one in passes]
        kept = passes[0].kept if len(passes) == 1 else sorted({index for one in passes for index in one.kept})
        with_states = any(one.with_states for one in passes)
        slots, (logits, states, _) = self._run(passes, rows, max(widths), kept, with_states)
        self.cache.extend(rows, widths)
        place = {index: i for i, index in enumerate(kept)}
        outputs = []
        for one, slot, width in zip(passes, slots, widths, strict=True):
            wanted = one.kept  # all that is there: a view, else a copy
            own = logits[slot] if len(wanted) == len(kept) else logits[slot, [place[index] for index in wanted]]
            outputs.append(Output(own, tuple(state[slot, :width] for state in states) if one.with_states else ()))
        return outputs

    def _run(
        self, passes: Sequence[Pass], rows: list[int], width: int, kept: Sequence[int], with_states: bool
    ) -> tuple[Sequence[int], Read]:
        """The model's output, compiled where that pays, and where in it each text stands."""
        adapted = any(one.adapted for one in passes)
        if self.compiled is None or adapted or not self.cache.layers:  # the first pass tells what a layer keeps
            return range(len(rows)), self._eager(passes, rows, width, kept, with_states)
        longest = max(self.cache.lengths) + width
        shape = self.compiled.shape(max(rows) + 1, width, longest)
        if shape:
            wide = shape == WIDE
            numbers = self._numbers(passes, rows, width) if wide else self._step_numbers(passes, texts=shape[0])
            places = rows if wide else None
            output = self.compiled(shape, numbers, places, longest, self.cache, kept, with_states)
            if output is not None:
                return range(len(rows)) if wide else rows, output
        return range(len(rows)), self._eager(passes, rows, width, kept, with_states)

    def _eager(
        self, passes: Sequence[Pass], rows: list[int], width: int, kept: Sequence[int], with_states: bool
    ) -> Read:
        """The texts that take part, as wide as the widest; no mask where plain causal attention needs none."""
        device, starts = self._device, [self.cache.lengths[row] for row in rows]
        block, padded = self.cache.window.multiple, width
        if block > 1 and width > 1:
            padded = -(-width // block) * block  # few shapes, whole blocks
        ids, positions, *rest = self._numbers(passes, rows, padded).to(device)  # [B, T] each
        keys = -(-(max(starts) + padded) // block) * block
        plain = len(passes) == 1 and (passes[0].layout is None or passes[0].layout.is_causal) and block == 1
        last = len(kept) == 1 and kept[0] == padded - 1
        model: Any = self.model
        options: dict[str, Any] = {}
        if adapted := next((one.adapted for one in passes if one.adapted), None):
            # the tokens at the end of each row on which the LoRA acts: the suffixes, and what is padding after them
            model, options = adapted, {"alora_offsets": [padded - _suffixes_start(one) for one in passes]}
        # FlexAttention is for wide passes: a step takes dense masks, as recorded ones do
        attention = attending(self.model) if width == 1 and block > 1 else nullcontext()
        with self.cache.reading(rows), few_rows(), attention:
            output = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=None if plain else masks(self.model, *rest, positions, keys=keys),
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=with_states,
                logits_to_keep=1 if last else integers(kept).to(device),
                **options,
            )
        return Read(output.logits[..., : self.width], output.hidden_states or ())

    def _numbers(self, passes: Sequence[Pass], rows: list[int], width: int) -> Tensor:
        """The numbers of the texts that take part: int64 [5, B, T], see `parse.local.compiled.forward`."""
        lengths = self.cache.lengths
        texts = zip(passes, rows, strict=True)
        return stack([row_numbers(one.ids, one.layout, lengths[row], width) for one, row in texts])

    def _step_numbers(self, passes: Sequence[Pass], texts: int) -> Tensor:
        """The same for a decoding step of the first so many texts, [5, texts, 1].

        An idle text reads padding, after its end, where its own next pass writes over it.
        """
        starts = [*self.cache.lengths[:texts], *[0] * (texts - len(self.cache.lengths))]
        ids, positions, limit = [0] * texts, [0] * texts, [0] * texts
        for one in passes:
            (ids[one.row],), positions[one.row], limit[one.row] = one.ids, starts[one.row], starts[one.row] + 1
        return integers([*ids, *positions, *limit, *starts, *starts]).view(5, texts, 1)


def _suffixes_start(one: Pass) -> int:
    """The index in the pass of the first suffix token."""
    return one.layout.draft_length if one.adapted and one.layout else len(one.ids)


def _of_like_width(passes: Sequence[Pass]) -> list[list[int]]:
    """Indices of the passes in groups, each at least half as wide as the widest of its group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(passes)), key=lambda i: -len(passes[i].ids)):
        if not groups or 2 * len(passes[i].ids) < len(passes[groups[-1][0]].ids):
            groups.append([])
        groups[-1].append(i)
    return groups


def embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model can read."""
    return int(cast(Any, model.get_input_embeddings()).weight.shape[0])


def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError unless a small packed pass gives what separate passes give: for architectures nobody tried."""
    ids = [token % model.config.vocab_size for token in range(7, 207, 10)]
    prompt, draft, suffix, ends = ids[:6], ids[6:16], ids[16:], (3, 7, 10)
    runner = ModelRunner(model)
    runner.forward([Pass(runner, 0, prompt)])
    layout = pack(draft, ends, suffix, past=len(prompt))
    packed = runner.forward([Pass(runner, 0, layout.ids, layout, layout.last_suffix)])[0].logits  # [K, V]
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
