"""Distillation from the target's next-token distributions, kept once and not asked for again.

Kept are the k most likely tokens at every token of an answer: k log-probabilities in float16 and k token ids in int32,
6k bytes a token of the answers. What is not among them counts as one more outcome, so that the loss is a forward
Kullback-Leibler divergence between distributions over k + 1 outcomes.
"""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from eval.generation import Row, batched, finish_all
from parse.local.model import LocalModel

AT_ONCE = 8  # answers read together
BYTES = 6  # of a kept token
BATCH = ("input_ids", "attention_mask", "labels", "likely_ids", "likely_log_probs")


def likely_tokens(folder: Path, target: PreTrainedModel, answers: Dataset, k: int) -> Dataset:
    """The answers' token ids and masks with what the target finds likely at each completion token.

    Returns:
        columns input_ids, completion_mask, and `likely`: the bytes of ids int32 [C, k], then log_probs float16 [C, k],
        for the C tokens of the completion, in base64.
    """
    model = LocalModel.of(target)

    async def find_likely(row: dict[str, Any]) -> Row:
        ids, start = row["input_ids"], row["completion_mask"].index(1)
        logits = await model.logits(ids[:-1], first=start - 1)  # [C, V]
        log_probs, tokens = logits.float().log_softmax(-1).topk(k)  # [C, k] each
        return {"likely": packed(tokens, log_probs)}

    rows = [answers[i] for i in range(len(answers))]
    found = finish_all(folder, rows, batched(find_likely, AT_ONCE), "target's logits", lambda row: row["input_ids"])
    kept = answers.select_columns(["input_ids", "completion_mask"])
    return kept.add_column("likely", [row["likely"] for row in found])


def packed(tokens: Tensor, log_probs: Tensor) -> str:
    """Token ids int64 and log-probabilities [C, k] as they are kept."""
    content = tokens.int().cpu().numpy().tobytes() + log_probs.half().cpu().numpy().tobytes()
    return base64.b64encode(content).decode()


def unpack(likely: str, count: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [C, k] and log-probabilities float32 [C, k] of what `likely_tokens` has kept for C tokens."""
    data = base64.b64decode(likely)
    k = len(data) // (BYTES * count)
    ids = np.frombuffer(data, np.int32, count * k).reshape(count, k)
    log_probs = np.frombuffer(data, np.float16, count * k, offset=4 * count * k).reshape(count, k)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(log_probs.astype(np.float32))


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(target || draft) over the kept tokens and the rest as one, one value per token.

    Args:
        logits: the draft's, [..., V].
        ids, log_probs: the target's most likely tokens, int64 and float [..., k].

    Returns:
        float32 [...], in nats.
    """
    own = logits.float().log_softmax(-1).gather(-1, ids)  # [..., k]
    outcomes = []
    for kept in (log_probs, own):
        rest = torch.log((1 - kept.exp().sum(-1, keepdim=True)).clamp_min(1e-6))
        outcomes.append(torch.cat([kept, rest], -1))  # [..., k + 1]
    target, draft = outcomes
    return (target.exp() * (target - draft)).sum(-1)


class LogitsTrainer(Trainer):
    """Training on the divergence from the kept distributions, the mean over the completions' tokens."""

    def __init__(
        self, *, model: Any, train_dataset: Dataset, processing_class: Any, peft_config: Any = None, **options: Any
    ) -> None:
        tokenizer = processing_class
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        options["args"].remove_unused_columns = False
        super().__init__(
            model=model if peft_config is None else get_peft_model(model, peft_config),
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=partial(collate, pad=pad),
            **options,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; `num_items_in_batch` counts the learnt tokens of all batches of a step, on all processes."""
        ids, log_probs, labels = (inputs[name] for name in ("likely_ids", "likely_log_probs", "labels"))
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        learnt = labels[:, 1:] != -100  # [B, T - 1]
        losses = divergence(outputs.logits[:, :-1][learnt], ids[:, :-1][learnt], log_probs[:, :-1][learnt])
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # gradients are averaged over processes
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def collate(examples: list[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch of B texts of at most T tokens; of what is likely, position t holds what follows token t.

    Returns:
        input_ids, attention_mask, labels int64 [B, T]; likely_ids int64 and likely_log_probs float32 [B, T, k].
    """
    width = max(len(example["input_ids"]) for example in examples)
    rows: dict[str, list[Tensor]] = {name: [] for name in BATCH}
    for example in examples:
        ids, mask = torch.tensor(example["input_ids"]), torch.tensor(example["completion_mask"])
        first, count = int(mask.argmax()) - 1, int(mask.sum())
        tokens, log_probs = unpack(example["likely"], count)
        after = width - len(ids)
        around = (0, 0, first, width - first - count)  # zeros before and after, along T
        rows["input_ids"].append(nn.functional.pad(ids, (0, after), value=pad))
        rows["attention_mask"].append(nn.functional.pad(torch.ones_like(ids), (0, after)))
        rows["labels"].append(nn.functional.pad(ids.masked_fill(mask == 0, -100), (0, after), value=-100))
        rows["likely_ids"].append(nn.functional.pad(tokens, around))
        rows["likely_log_probs"].append(nn.functional.pad(log_probs, around))
    return {name: torch.stack(row) for name, row in rows.items()}
