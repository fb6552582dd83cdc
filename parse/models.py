"""Models and their prompts: loading them, and refusing in time what the engine cannot run.

The packed pass needs a causal language model whose cache can be rolled back by tokens and that takes
positions. What cannot (recurrent state, encoder-decoder, ALiBi, no cache at all) is refused from its
configuration, before any weight is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from parse.cache import PrefixCache
from parse.layout import Layout, pack

Messages = list[dict[str, str]]


def load_model(
    source: str | Path | PreTrainedModel,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model ready for inference: from a path, a hub id, or as given.

    Args:
        device: default: the GPU where there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: if the engine cannot run its architecture.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(source, PreTrainedModel):
        check_architecture(source.config)
        source.eval()  # type: ignore[no-untyped-call]
        return source
    check_architecture(AutoConfig.from_pretrained(source))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)  # its own best attention
    return cast(PreTrainedModel, model.to(device).eval())  # type: ignore[arg-type]


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the reason, for a model that the engine cannot run."""
    name, kind = config.name_or_path or config.model_type, config.model_type
    advice = "use a causal attention model such as Llama, Qwen, Mistral or GPT-2"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} ({kind}) is an encoder-decoder: the engine needs a decoder; {advice}")
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"{name} ({kind}) is not a causal language model; {advice}")
    model_class: Any = mapping[type(config)]
    if getattr(model_class, "_is_stateful", False):
        raise ValueError(
            f"{name} ({kind}) keeps a recurrent state instead of a key-value cache, which cannot be "
            f"rolled back to an accepted prefix; {advice}"
        )
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise ValueError(f"{name} ({kind}) has no key-value cache; {advice}")
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise ValueError(
            f"{name} ({kind}) takes no positions (ALiBi or its like counts tokens by itself), and the packed pass "
            f"must say where each suffix copy stands; {advice}"
        )
    if unknown := sorted(attention_types(config) - {FULL, SLIDING}):
        raise ValueError(
            f"{name} ({kind}) has layers of type {', '.join(unknown)}, which the packed pass cannot mask; {advice}"
        )


FULL, SLIDING = "full_attention", "sliding_attention"


def attention_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of attention among a model's layers, in `transformers`' words."""
    named = getattr(config, "layer_types", None)
    return set(named or [SLIDING if getattr(config, "sliding_window", None) else FULL])


def attention_masks(model: PreTrainedModel, layout: Layout) -> Tensor | dict[str, Tensor]:
    """The packed pass's mask as the model takes it: [1, 1, T, L + T], one for each kind of its layers.

    Boolean; where the model's attention is its own ("eager"), added to the scores: 0 or the lowest number.
    """
    made = {}
    for kind in attention_types(model.config):
        window = model.config.sliding_window if kind == SLIDING else None
        mask = layout.mask(window)[None, None].to(model.device)  # [1, 1, T, L + T]
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
        made[kind] = mask
    return made if len(made) > 1 else made.popitem()[1]


def packed_pass(
    model: PreTrainedModel, layout: Layout, cache: PrefixCache, *, keep: Tensor, with_states: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward pass over a layout, behind the `layout.past` tokens that the cache holds.

    Args:
        keep: indices in the pass of the tokens whose logits are needed, int64.

    Returns:
        logits [len(keep), V], and the states of each layer [1, T, D] where asked for, else none.
    """
    device = model.device
    output: CausalLMOutputWithPast = model(
        input_ids=layout.input_ids[None].to(device),  # [1, T]
        position_ids=layout.position_ids[None].to(device),  # [1, T]
        attention_mask=attention_masks(model, layout),  # [1, 1, T, L + T]
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=with_states,
        logits_to_keep=keep.to(device),
    )
    assert output.logits is not None  # [1, len(keep), V]
    return output.logits[0], output.hidden_states or ()


@torch.inference_mode()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError unless a small packed pass gives what separate passes give: for architectures nobody tried."""
    ids = [token % model.config.vocab_size for token in range(7, 207, 10)]
    prompt, draft, suffix, ends = ids[:6], ids[6:16], ids[16:], (3, 7, 10)
    cache = PrefixCache()
    model(input_ids=torch.tensor([prompt], device=model.device), past_key_values=cache, use_cache=True)
    layout = pack(draft, ends, suffix, past=len(prompt))
    packed, _ = packed_pass(model, layout, cache, keep=layout.last_suffix)  # [K, V]
    rows = [[*prompt, *draft[:end], *suffix] for end in ends]
    alone = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1] for row in rows]
    gap = (packed.float().softmax(-1) - torch.stack(alone).float().softmax(-1)).abs().max().item()
    if not gap <= (1e-3 if model.dtype == torch.float32 else 0.1):  # not a number is wrong too
        raise ValueError(
            f"{model.config.name_or_path or model.config.model_type} ({model.config.model_type}) does not heed the "
            f"packed pass's mask or positions: its probabilities are off by {gap:.2g}; use a causal attention model "
            "such as Llama, Qwen, Mistral or GPT-2"
        )


def encode_prompt(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a prompt up to where the answer begins; text is a user's turn of the chat template."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return encode_text(render(messages, tokenizer), tokenizer)


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text for messages, up to where the assistant's answer begins."""
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, with nothing added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, exactly: special tokens and spaces as they are."""
    return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def eos_ids(model: PreTrainedModel, fallback: int | None = None) -> frozenset[int]:
    """The tokens that end a sequence, from the generation config, then the config, then `fallback`."""
    for source in (model.generation_config, model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            return frozenset(value if isinstance(value, Iterable) else [value])
    return frozenset() if fallback is None else frozenset([fallback])
