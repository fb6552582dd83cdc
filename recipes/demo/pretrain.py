"""Make the embedded pair of models from nothing; only `recipes/embedded_models.yaml` asks for it.

A model first learns to tell: the target recalls shuffled lists before it tells any, and short lists come before
the task's own lengths. Then the target's upper layers learn to judge, see `recipes.demo.verdicts`. What is learnt is
kept in the run folder between the two, so that a killed run continues from there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from eval.tasks import ledger
from parse.verifiers import PromptVerifier
from recipes.demo import verdicts
from recipes.demo.corpus import LessonBook, Lessons, Phase, make_tokenizer
from recipes.demo.timed import train_for
from recipes.demo.verdicts import Packed, next_words, read, telling_loss
from recipes.run import Run
from recipes.schema import Pretrain, Recipe, to_dict

TELL = {
    "target": (
        Phase(0.02, (2, 3), "recall"),
        Phase(0.045, (3, 4, 5), "recall"),
        Phase(0.12, ledger.SIZES, "recall"),
        Phase(0.19, (3, 4, 5), "tell"),
        Phase(0.36, (5, 6, 7, 8, 9), "tell"),
        Phase(1.00, ledger.SIZES, "tell"),
    ),
    "draft": (
        Phase(0.06, (2, 3, 4), "tell"),
        Phase(0.15, (4, 5, 6), "tell"),
        Phase(1.00, ledger.SIZES, "tell"),
    ),
}


def run(recipe: Recipe, run: Run) -> None:
    """Write each model of the recipe's `pretrain` section to its `output` folder, in bfloat16."""
    tokenizer = make_tokenizer()
    for name, section in recipe.pretrain.items():
        verdicts.check(name, section, len(tokenizer))
    for name, section in recipe.pretrain.items():
        model = _train(name, section, recipe.seed, tokenizer, run.folder / "pretrain")
        folder = Path(section.output)
        scratch = folder.with_name(f".{folder.name}.part")
        model.bfloat16().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)


def _train(
    name: str, section: Pretrain, seed: int, tokenizer: PreTrainedTokenizerFast, kept_in: Path
) -> PreTrainedModel:
    """A model that tells, and in `judge_minutes` learns to judge."""
    torch.manual_seed(seed)
    if section.threads:
        torch.set_num_threads(section.threads)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**section.architecture, vocab_size=len(tokenizer), **ends)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if not config.tie_word_embeddings:  # far apart from the start: what is looked up by its word is found sooner
        nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    plain = copy.deepcopy(model)  # what is returned, without compiled layers
    torch._dynamo.config.recompile_limit = 64  # one compilation a part, and for each set of trained layers
    for layer in model.base_model.layers if hasattr(model.base_model, "layers") else []:
        layer.compile(dynamic=True)  # a third of the time of a plain step on a CPU
    told = kept_in / f"{name}-tells-{_identity(section, seed)}.pt"
    if told.is_file():
        print(f"{name} tells: done before, skipped")
        model.load_state_dict(torch.load(told, weights_only=True))
    else:
        book = LessonBook(Lessons(tokenizer, section.speaker, seed), section.batch_size)
        phases = TELL[section.speaker]
        losses = lambda done: {"tells": _telling(model, Packed.of(book.next_batch(phases, done)), section.exit_layer)}
        train_for(f"{name} tells", section.minutes, section.learning_rate, [model], losses)
        kept_in.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), told.with_suffix(".part"))
        told.with_suffix(".part").rename(told)
    if section.judge_minutes:
        book = LessonBook(Lessons(tokenizer, section.speaker, seed + 1), section.batch_size)
        verdicts.Judging(name, model, book, section, PromptVerifier.of(tokenizer)).learn()
    plain.load_state_dict(model.state_dict())
    return plain


def _identity(section: Pretrain, seed: int) -> str:
    """What the telling depends on, as a short hash."""
    content = {**to_dict(section), "seed": seed, "judge_minutes": None, "output": None, "threads": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _telling(model: PreTrainedModel, batch: Packed, exit_layer: int | None) -> Tensor:
    """Mean cross-entropy of the learnt tokens; with an exit layer, half of it is read there.

    So the layers above the exit find the expected word ready to compare with the written one.
    """
    if exit_layer is None:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
            )
        return telling_loss(output.logits.float(), batch.labels)
    states = read(model, batch)
    learnt = [telling_loss(next_words(model, states[at]), batch.labels) for at in (exit_layer, -1)]
    return sum(learnt) / 2  # type: ignore[return-value]
