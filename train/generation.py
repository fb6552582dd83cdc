"""Greedy answers to many prompts at once, for making data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.decode import Written
from parse.models import eos_ids
from train.run import progress_bar


def write_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    what: str,
) -> list[Written]:
    """Answer every prompt, in batches of like length; the order is kept.

    Args:
        prompts: token ids, one list a prompt.
        what: the name on the progress bar.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    written: dict[int, Written] = {}
    with progress_bar(what, total=len(prompts)) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            written.update(zip(chosen, _write_batch(model, tokenizer, batch, max_new_tokens), strict=True))
            bar.update(len(chosen))
    return [written[i] for i in range(len(prompts))]


@torch.inference_mode()
def _write_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[Written]:
    """`transformers` generate over a left-padded batch of B prompts."""
    ends = eos_ids(model, tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    length = max(len(ids) for ids in prompts)
    rows = [[pad] * (length - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(rows, device=model.device),  # [B, L]
        attention_mask=torch.tensor(masks, device=model.device),  # [B, L]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    answers = []
    for row in output[:, length:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(Written(row[:stop], ended=stop is not None))
    return answers
