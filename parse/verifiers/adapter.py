"""A trained verifier with a suffix: a LoRA that acts on the suffix tokens alone, and a head on the last of them."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from parse.prompts import turn_after_answer
from parse.text import encode_text
from parse.verifiers.base import Calibration, Evidence, Needs
from parse.verifiers.heads import HazardHead, segment_evidence, survival


@dataclass
class Adapter:
    """A short suffix after every prefix, a LoRA that acts on the suffixes alone, and a head on the last token of each.

    What the target has read keeps its states (but for rounding in a pass of few tokens): it goes on from the accepted
    prefix as if nobody had asked.
    """

    adapted: PeftModel
    head: HazardHead
    suffix_ids: list[int]
    threshold: float = 0.5
    kind: str = "adapter"
    calibration: Calibration | None = None

    @property
    def needs(self) -> Needs:
        """The states after a suffix under the LoRA, and the free evidence."""
        return Needs(token_logprobs=True, suffix_ids=tuple(self.suffix_ids), adapter=self.adapted)

    def hazards(self, evidence: Evidence) -> Tensor:
        """The hazard of each segment: float32 [K]."""
        assert evidence.suffix_states is not None
        return cast(Tensor, self.head(evidence.suffix_states, segment_evidence(evidence)))

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        return survival(self.hazards(evidence))


def adapt(target: PreTrainedModel, suffix_ids: list[int], rank: int, layers: int | None) -> PeftModel:
    """The target under an untrained activated LoRA (PEFT's aLoRA) on its linear modules; the target stays as it is.

    Args:
        suffix_ids: the tokens on which it acts.
        layers: how many of the last layers to adapt; None for all.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_linears(target, layers),
        alora_invocation_tokens=suffix_ids,
    )
    return cast(PeftModel, get_peft_model(sharing(target), config))


def _linears(model: PreTrainedModel, layers: int | None) -> list[str]:
    """Names of the linear modules within the last so many layers; of a mixture of experts those of attention alone.

    PEFT has no aLoRA for experts, and takes the names of the dense layers beside them for theirs. What unpacks latent
    keys (MLA) reads the whole text at every pass, and so is left alone too.
    """
    first = 0 if layers is None else model.config.num_hidden_layers - layers
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    names = [name for name in names if not name.endswith("kv_b_proj")]
    if any("expert" in name for name, _ in model.named_modules()):
        names = [name for name in names if "attn" in name or "attention" in name]
    numbers = {name: re.search(r"\.(\d+)\.", name) for name in names}
    return [name for name, number in numbers.items() if number and int(number[1]) >= first]


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model's modules over the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def suffix_of(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """The adapter's suffix: the first tokens of the turn that follows an answer in the chat template.

    Without a template, the end-of-sequence token again and again.

    Raises:
        ValueError: where there is neither.
    """
    if tokenizer.chat_template:
        return encode_text(turn_after_answer("?", tokenizer), tokenizer)[:length]
    end = cast(Any, tokenizer).eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has neither a chat template nor an end-of-sequence token, of "
            "which the adapter's suffix is made: set its eos_token, or use another kind of verifier"
        )
    return [int(end)] * length
