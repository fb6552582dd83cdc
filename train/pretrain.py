"""Make the embedded pair of models from nothing; only `recipes/embedded_models.yaml` asks for it.

First a model learns to tell: the target recalls shuffled lists before it tells any, short lists come
before the task's own lengths. Then, on layers that know what comes next and are left as they are, the
target's upper layers learn to judge. Every judging turn of a lesson is a suffix copy of the packed
layout, so one forward pass learns the answer and every verdict.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from eval.tasks import ledger
from parse.layout import pack, stack
from parse.verifiers import Prompt
from train.lessons import IGNORE, Lesson, Lessons, batches, make_tokenizer
from train.recipe import Pretrain, Recipe
from train.run import Run, progress_bar


@dataclass(frozen=True)
class Phase:
    """A stretch of the training: up to a fraction of its minutes, on what lessons."""

    until: float
    sizes: tuple[int, ...]  # purchases in a list
    kind: str  # of lesson, see `Lessons.draw`


TELL = {
    "target": (
        Phase(0.03, (2, 3), "recall"),
        Phase(0.05, (3, 4, 5), "recall"),
        Phase(0.09, ledger.SIZES, "recall"),
        Phase(0.12, (3, 4, 5), "tell"),
        Phase(0.24, (5, 6, 7, 8, 9), "tell"),
        Phase(1.00, ledger.SIZES, "tell"),
    ),
    "draft": (
        Phase(0.06, (2, 3, 4), "tell"),
        Phase(0.15, (4, 5, 6), "tell"),
        Phase(1.00, ledger.SIZES, "tell"),
    ),
}
JUDGE = (Phase(0.15, (3, 4, 5), "judge"), Phase(1.00, ledger.SIZES, "judge"))
JUDGE_WEIGHT = 0.7  # of the verdicts' loss beside the answer's
WRONG_WEIGHT = 2.0  # wrong prefixes are rarer than right ones


def run(recipe: Recipe, run: Run) -> None:
    """Write each model of the recipe's `pretrain` section to its `output` folder, in bfloat16."""
    for name, section in recipe.pretrain.items():
        _check(name, section)
    for name, section in recipe.pretrain.items():
        model = _train(name, section, recipe.seed)
        folder = Path(section.output)
        scratch = folder.with_name(f".{folder.name}.part")
        model.to(torch.bfloat16).save_pretrained(scratch)
        make_tokenizer().save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)


def _check(name: str, section: Pretrain) -> None:
    """Raise ValueError for an exit layer that leaves no room above it, or judging without an exit layer."""
    layers = section.architecture.get("num_hidden_layers", 0)
    if section.exit_layer is not None and not 0 < section.exit_layer <= layers - 2:
        raise ValueError(
            f"pretrain.{name}.exit_layer: {section.exit_layer} needs two layers above it, and the architecture "
            f"has num_hidden_layers: {layers}; use 1 to {layers - 2} or leave it out"
        )
    if section.judge_minutes and section.exit_layer is None:
        raise ValueError(
            f"pretrain.{name}.judge_minutes: {section.judge_minutes} is for the layers above exit_layer, which is "
            f"not given; give it, or leave judge_minutes out"
        )


def _train(name: str, section: Pretrain, seed: int) -> PreTrainedModel:
    """A model that tells, and in `judge_minutes` learns to judge."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**section.architecture, vocab_size=len(tokenizer), **ends)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if not config.tie_word_embeddings:  # far apart from the start: what is looked up by its word is found sooner
        nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    plain = copy.deepcopy(model)  # what is returned, without compiled layers
    for layer in model.base_model.layers if hasattr(model.base_model, "layers") else []:
        layer.compile(dynamic=True)  # a third of the time of a plain step on a CPU
    lessons = Lessons(tokenizer, section.speaker, seed)
    _learn(f"{name} tells", model, lessons, section, TELL[section.speaker], section.minutes)
    if section.judge_minutes:
        model.get_input_embeddings().requires_grad_(False)
        model.base_model.layers[: section.exit_layer].requires_grad_(False)
        _learn(f"{name} judges", model, lessons, section, JUDGE, section.judge_minutes, Prompt.of(tokenizer))
    plain.load_state_dict({key.replace("_orig_mod.", ""): v for key, v in model.state_dict().items()})
    return plain


def _learn(
    title: str,
    model: PreTrainedModel,
    lessons: Lessons,
    section: Pretrain,
    phases: tuple[Phase, ...],
    minutes: float,
    judge: Prompt | None = None,
) -> None:
    """Train for `minutes`; the learning rate warms up, stays, and falls over the last 40%."""
    optimizers = _optimizers(model, section.learning_rate)
    started, step, pending = time.time(), 0, iter(())
    with progress_bar(title, total=round(minutes * 60)) as bar:
        while (done := (time.time() - started) / (minutes * 60)) < 1:
            batch = next(pending, None)
            if batch is None:
                phase = next(phase for phase in phases if done < phase.until)
                pending = batches(lessons, section.batch_size, phase.sizes, phase.kind)
                continue
            rate = min(1, (step + 1) / 300) * (1 if done < 0.6 else max(0.02, (1 - done) / 0.4))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = section.learning_rate * rate
            telling, judging = _losses(model, batch, judge, section.exit_layer)
            (telling + JUDGE_WEIGHT * judging).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            bar.update(int(time.time() - started) - bar.n)
            bar.set_postfix(step=step, telling=f"{telling.item():.3f}", judging=f"{judging.item():.3f}", refresh=False)


def _optimizers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases.

    GPT-2's layers keep matrices transposed in a class of their own; Muon does not mind.
    """
    inner = [
        p for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n and "wte" not in n and "wpe" not in n
    ]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _losses(
    model: PreTrainedModel, batch: list[Lesson], judge: Prompt | None, exit_layer: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the learnt tokens, and of the verdicts (zero without judging turns).

    With an exit layer the tokens are learnt there too, so that the layers above find the expected token
    ready to compare with the written one; two layers above it each fact is judged where it stands, so
    that a judging turn only has to collect what has been noticed.
    """
    suffix = judge.suffix_ids if judge else []
    layouts = [pack(lesson.ids, list(lesson.asked), suffix) for lesson in batch]
    ids, positions, mask = stack(layouts, pad_id=0)  # [B, T], [B, T], [B, 1, T, T]
    labels = torch.full_like(ids, IGNORE)  # [B, T]
    for row, lesson in zip(labels, batch, strict=True):
        row[: len(lesson.labels)] = torch.tensor(lesson.labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9),
            use_cache=False,
            output_hidden_states=exit_layer is not None,
        )
        states = output.hidden_states  # [B, T, D] each
        exits = [exit_layer, exit_layer + 2] if exit_layer else []
        early = [model.lm_head(model.model.norm(states[layer])).float() for layer in exits]  # [B, T, V]
    logits = output.logits.float()  # [B, T, V]
    learnt = [logits, *early[:1]]
    telling = sum(_next_token_loss(each, labels) for each in learnt) / len(learnt)
    if judge is None:
        return telling, torch.zeros(())
    asked = [(row, at) for row, layout in zip(logits, layouts, strict=True) for at in layout.last_suffix]
    judging = _verdict_loss(judge, asked, [verdict for lesson in batch for verdict in lesson.asked.values()])
    if early:
        facts = [
            (row, end - 1, verdict)
            for row, lesson in zip(early[1], batch, strict=True)
            for end, verdict in lesson.noticed
        ]
        judging = judging + _verdict_loss(judge, [(row, at) for row, at, _ in facts], [fact[2] for fact in facts])
    return telling, judging


def _verdict_loss(judge: Prompt, asked: list[tuple[Tensor, int]], right: list[bool]) -> Tensor:
    """Mean cross-entropy of yes and no; each verdict is read from a row of logits [T, V] at a position."""
    if not right:
        return torch.zeros(())
    logits = torch.stack([row[at] for row, at in asked])  # [K, V]
    answer = torch.where(torch.tensor(right), judge.yes_ids[0], judge.no_ids[0])  # [K]
    weights = torch.ones(logits.shape[-1])
    weights[judge.no_ids] = WRONG_WEIGHT
    return nn.functional.cross_entropy(logits, answer, weight=weights)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] with the next labels [B, T]; zero where nothing is learnt."""
    targets = labels[:, 1:].flatten()  # [B * (T - 1)]
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)
