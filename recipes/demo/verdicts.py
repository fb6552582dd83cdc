"""The target learns to judge: its upper layers, on lower ones that know what comes next and stay as they are.

Whether a written word is right is a comparison with the word that was expected in its place. A small model is very
slow to find that by itself, so each step is taught to one layer alone, and then all of them together:

    expects    layer `exit`        at every word, bring along what the exit expected there, beside what is written
    compares   layer `exit` + 1    compare it with the word that is written: is this fact right?
    judges     all that follow     where a judging turn asks, collect what was noticed; and go on telling

Every judging turn of a lesson is a suffix copy of the packed layout, so one forward pass learns the answer and
every verdict. Shape letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.tasks import ledger
from parse.layout import Layout, pack, stack_layouts, visible
from parse.verifiers import PromptVerifier
from recipes.demo.corpus import IGNORE, Lesson, LessonBook, Phase
from recipes.demo.timed import train_for
from recipes.schema import Pretrain

JUDGE = (Phase(0.1, (3, 4, 5), "judge"), Phase(1.00, ledger.SIZES, "judge"))
TELL = (Phase(1.00, ledger.SIZES, "tell"),)
SHARES = {"expects": 0.25, "compares": 0.15, "judges": 0.6}  # of the minutes
VERDICT_WEIGHT = 0.7  # of the verdicts' loss beside the answer's
WRONG_WEIGHT = 2.0  # of a wrong prefix's verdict, which is rarer than a right one's
WRONG_FACT_WEIGHT = 5.0  # the same for facts, of which few are wrong
OTHER_WORD_WEIGHT = 0.2  # of words that are no facts, and so never wrong
SCRAMBLED = 0.3  # of the facts in lessons on what was expected
SHARPNESS = 1.5  # of the logits that tell words apart in a state


def check(name: str, section: Pretrain, vocabulary: int) -> None:
    """Raise ValueError for a section that asks for judging and leaves no room for it."""
    if not section.judge_minutes:
        return
    layers = section.architecture.get("num_hidden_layers", 0)
    if section.exit_layer is None:
        raise ValueError(
            f"pretrain.{name}.judge_minutes: {section.judge_minutes} is for the layers above exit_layer, which is "
            f"not given; give it, or leave judge_minutes out"
        )
    if section.exit_layer > layers - 3:
        raise ValueError(
            f"pretrain.{name}.exit_layer: {section.exit_layer} needs three layers above it to judge, and the "
            f"architecture has num_hidden_layers: {layers}; use 1 to {layers - 3} or leave judge_minutes out"
        )
    units = section.architecture.get("intermediate_size", 0)
    if units < vocabulary:
        raise ValueError(
            f"pretrain.{name}: judging compares word by word, and intermediate_size: {units} is below the "
            f"{vocabulary} words of the vocabulary; raise it or leave judge_minutes out"
        )


@dataclass
class Packed:
    """A batch of lessons in one packed pass: one row per lesson, its judging turns after it."""

    lessons: list[Lesson]
    layouts: list[Layout]
    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, T] float, added to the scores
    labels: Tensor  # [B, T], IGNORE where nothing is learnt

    @classmethod
    def of(cls, lessons: list[Lesson], suffix_ids: Sequence[int] = ()) -> Packed:
        """Pack lessons, with a judging turn at each asked end where a suffix is given."""
        layouts = [pack(lesson.ids, list(lesson.asked) if suffix_ids else [], suffix_ids) for lesson in lessons]
        ids, positions, limit, block_start, key_index = stack_layouts(layouts)  # [B, T] each
        mask = visible(limit, block_start, key_index, positions, keys=ids.shape[1])[:, None]  # [B, 1, T, T]
        labels = torch.full_like(ids, IGNORE)
        for row, lesson in zip(labels, lessons, strict=True):
            row[: len(lesson.labels)] = torch.tensor(lesson.labels)
        return cls(lessons, layouts, ids, positions, torch.zeros(mask.shape).masked_fill(~mask, -1e9), labels)


def read(model: PreTrainedModel, batch: Packed, depth: int | None = None) -> list[Tensor]:
    """The states [B, T, D] after 0, 1, ... `depth` layers of a Llama; all layers by default."""
    inner: Any = model.model
    with torch.autocast("cpu", torch.bfloat16):
        states = [inner.embed_tokens(batch.ids)]
        rotary = inner.rotary_emb(states[0], batch.positions)
        for layer in inner.layers[:depth]:
            states.append(
                layer(
                    states[-1],
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    position_embeddings=rotary,
                )
            )
    return states


def next_words(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits [B, T, V] of the next token, read from the states [B, T, D] of any layer."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.lm_head(model.model.norm(states)).float()  # type: ignore[no-any-return]


def telling_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] with the next labels [B, T]; zero where nothing is learnt."""
    targets = labels[:, 1:].flatten()  # [B * (T - 1)]
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def verdict_loss(logits: Tensor, batch: Packed, judge: PromptVerifier) -> Tensor:
    """Mean cross-entropy of yes and no after every judging turn, read from logits [B, T, V]."""
    right = [verdict for lesson in batch.lessons for verdict in lesson.asked.values()]
    if not right:
        return torch.zeros(())
    last = [row[layout.last_suffix] for row, layout in zip(logits, batch.layouts, strict=True)]  # [asked, V] each
    weights = torch.ones(logits.shape[-1])
    weights[judge.no_ids] = WRONG_WEIGHT
    answers = torch.where(torch.tensor(right), judge.yes_ids[0], judge.no_ids[0])  # [all asked]
    return nn.functional.cross_entropy(torch.cat(last), answers, weight=weights)


class Judging:
    """The three parts of learning to judge, on one model."""

    def __init__(
        self, name: str, model: PreTrainedModel, book: LessonBook, section: Pretrain, judge: PromptVerifier
    ) -> None:
        assert section.exit_layer is not None
        self.name, self.model, self.book, self.section, self.judge = name, model, book, section, judge
        self.exit, self.layers = section.exit_layer, list(model.model.layers)
        words = nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)  # [V, D]
        turn = torch.linalg.qr(torch.randn(words.shape[1], words.shape[1]))[0]
        self.words = words
        self.expected_words = words @ turn  # [V, D]: away from where the written word stands
        self.noticing = nn.Linear(words.shape[1], 1)  # a fact's logit of being right

    def learn(self) -> None:
        """All three parts, in order."""
        carrier, comparer, rest = self.layers[self.exit], self.layers[self.exit + 1], self.layers[self.exit + 2 :]
        self._part("expects", [carrier], self._expecting)
        self._start_comparing(comparer)
        self._part("compares", [comparer, self.noticing], self._comparing)
        top = [self.model.model.norm, self.model.lm_head]
        self._part("judges", [comparer, self.noticing, *rest, *top], self._judging)

    def _part(self, part: str, trained: list[nn.Module], losses: Any) -> None:
        self.model.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        minutes = SHARES[part] * self.section.judge_minutes
        train_for(f"{self.name} {part}", minutes, self.section.learning_rate, trained, losses)

    def _expecting(self, done: float) -> dict[str, Tensor]:
        """Cross-entropy, at each word of the answer, with the exit's likeliest there and with the word itself."""
        scrambled = self.book.lessons.scrambled  # or else what is written would say what was expected
        batch = Packed.of([scrambled(lesson, SCRAMBLED) for lesson in self.book.next_batch(TELL, done)])
        states = read(self.model, batch, self.exit + 1)
        with torch.no_grad():
            expected = next_words(self.model, states[self.exit])[:, :-1].argmax(-1)  # [B, T - 1]
        written = batch.ids[:, 1:].clone()  # [B, T - 1]
        for row, lesson in enumerate(batch.lessons):
            for words in (expected[row], written[row]):
                words[: lesson.start - 1] = IGNORE
                words[len(lesson.ids) - 1 :] = IGNORE
        told = SHARPNESS * _unit(states[-1])[:, 1:]  # [B, T - 1, D]
        pairs = {"expects": (self.expected_words, expected), "writes": (self.words, written)}
        return {
            name: nn.functional.cross_entropy((told @ rows.T).flatten(0, 1), words.flatten(), ignore_index=IGNORE)
            for name, (rows, words) in pairs.items()
        }

    @torch.no_grad()
    def _start_comparing(self, layer: Any) -> None:
        """Let the layer's gated units silu(gate . x) * (up . x) begin as one test a word: expected, and written?"""
        v, mlp = len(self.words), layer.mlp
        mlp.gate_proj.weight[:v] = SHARPNESS * self.expected_words
        mlp.up_proj.weight[:v] = SHARPNESS * self.words
        right = nn.functional.normalize(torch.randn(self.words.shape[1]), dim=0)  # [D], where the test is written
        mlp.down_proj.weight *= 0.1
        mlp.down_proj.weight[:, :v] = right[:, None]
        layer.self_attn.o_proj.weight *= 0.1
        nn.init.ones_(layer.post_attention_layernorm.weight)
        self.noticing.weight[0] = 0.3 * right

    def _comparing(self, done: float) -> dict[str, Tensor]:
        batch = Packed.of(self.book.next_batch(JUDGE, done))
        return {"notices": self._noticing_loss(read(self.model, batch, self.exit + 2)[-1], batch)}

    def _noticing_loss(self, states: Tensor, batch: Packed) -> Tensor:
        """Cross-entropy of every word's being right, up to the first wrong fact, from states [B, T, D].

        Only facts can be wrong: any wording is right, however little it was expected.
        """
        right = torch.full(batch.ids.shape, float("nan"))  # [B, T], 1 or 0 where it is known
        weight = torch.full(batch.ids.shape, OTHER_WORD_WEIGHT)  # [B, T]
        for b, lesson in enumerate(batch.lessons):
            known = lesson.noticed
            wrong = bool(known) and not known[-1][1]
            right[b, : known[-1][0] if wrong else len(lesson.ids)] = 1
            weight[b, [end - 1 for end in lesson.facts]] = 1
            if wrong:
                right[b, known[-1][0] - 1], weight[b, known[-1][0] - 1] = 0, WRONG_FACT_WEIGHT
        at = ~right.isnan()  # [B, T]
        logits = self.noticing(_unit(states)).squeeze(-1)  # [B, T]
        loss = nn.functional.binary_cross_entropy_with_logits(logits[at], right[at], weight[at], reduction="sum")
        return loss / sum(len(lesson.facts) for lesson in batch.lessons)

    def _judging(self, done: float) -> dict[str, Tensor]:
        batch = Packed.of(self.book.next_batch(JUDGE, done), self.judge.suffix_ids)
        states = read(self.model, batch)
        logits = next_words(self.model, states[-1])
        return {
            "tells": telling_loss(logits, batch.labels),
            "notices": VERDICT_WEIGHT * self._noticing_loss(states[self.exit + 2], batch),
            "judges": VERDICT_WEIGHT * verdict_loss(logits, batch, self.judge),
        }


def _unit(states: Tensor) -> Tensor:
    """States [..., D] at root mean square 1, float32."""
    return nn.functional.rms_norm(states.float(), states.shape[-1:])
