"""The engine's two models and its verifier, by their names: loaded on this machine, or asked on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.local.loading import load_model, load_tokenizer
from parse.local.model import LocalModel
from parse.local.runner import embeddings
from parse.remote import is_address
from parse.remote.model import RemoteModel
from parse.remote.verdicts import served_verifier
from parse.text import eos_ids, shared_ends
from parse.verifiers import Verifier
from parse.verifiers.saved import load as load_verifier

Loaded = tuple[PreTrainedModel | RemoteModel, PreTrainedTokenizerBase]


def load(
    source: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    attention: str | None = None,
) -> Loaded:
    """A model and its tokenizer; the arguments are those of `Engine.from_pretrained`."""
    if is_address(source):
        served = RemoteModel.connect(str(source), options, tokenizer)
        return served, served.tokenizer
    model = load_model(source, device, dtype, attention, options)
    return model, tokenizer or load_tokenizer(model, options)


def models_of(
    target: PreTrainedModel | RemoteModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedModel | RemoteModel | None,
    draft_tokenizer: PreTrainedTokenizerBase,
    compiled: bool,
) -> dict[str, LocalModel | RemoteModel]:
    """The models as rounds know them, by role."""
    ours: LocalModel | RemoteModel
    if isinstance(target, RemoteModel):
        ours = target
    else:
        ours = LocalModel.of(target, tokenizer, eos_ids(target, cast(Any, tokenizer).eos_token_id), compiled)
    if draft is None:
        return {"target": ours}
    # vocabularies are padded to other sizes: the draft must not say what the target has no embedding for
    same = draft_tokenizer.get_vocab() == tokenizer.get_vocab()
    # a base model that drafts for a chat model names other end tokens, and writes the chat model's too
    shared = shared_ends(ours.eos_ids, tokenizer, draft_tokenizer)
    if isinstance(draft, RemoteModel):
        return {"target": ours, "draft": draft.drafting(shared, ours.vocabulary if same else None)}
    own = eos_ids(draft, cast(Any, draft_tokenizer).eos_token_id) | shared
    width = ours.vocabulary if same and embeddings(draft) > ours.vocabulary else None
    return {"target": ours, "draft": LocalModel.of(draft, draft_tokenizer, own, compiled, width)}


def verifier_of(
    name: str | Path, target: PreTrainedModel | RemoteModel, tokenizer: PreTrainedTokenizerBase
) -> Verifier:
    """A verifier by its name, for a target here or on a server."""
    if isinstance(target, RemoteModel):
        return served_verifier(name, target)
    return load_verifier(name, target, tokenizer)
