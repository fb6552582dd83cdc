"""Models and their prompts: loading them, and refusing in time what the engine cannot run.

The packed pass needs a causal language model whose cache can be rolled back by tokens and that takes
positions. What cannot (recurrent state, encoder-decoder, ALiBi, no cache at all) is refused from its
configuration, before any weight is read.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Messages = list[dict[str, str]]
# options that say where a model's weights lie
PLACING = {"device_map", "tp_plan", "distributed_config", "quantization_config"}
# options that say which files are a model's: configuration and tokenizer are among them
FINDING = {"revision", "subfolder", "gguf_file", "token", "cache_dir", "local_files_only"}


def load_model(
    source: str | Path | PreTrainedModel | PeftModel,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model ready for inference: from a path, a hub id, or as given.

    A PEFT folder is loaded with the model that it was trained on, and merged into it.

    Args:
        device: default: the GPU where there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.
        attention: `transformers`' name of an implementation; None takes the model's own best.
        options: more arguments of `transformers`' `from_pretrained`, such as `device_map`, `tp_plan` or
            `quantization_config`, or `gguf_file` for quantised weights of that kind, which become `dtype`; those that
            place the model leave no choice to `device`.

    Raises:
        ValueError: if its weights are pickled, the engine cannot run its architecture, or it has no such attention.
    """
    options = options or {}
    if device is not None and (placing := sorted(PLACING & options.keys())):
        raise ValueError(f"device={str(device)!r} and {', '.join(placing)} both place the model: give one of them")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(source, PreTrainedModel | PeftModel):
        # a PEFT model's base holds the adapter's weights beside its own
        loaded: PreTrainedModel = source if isinstance(source, PreTrainedModel) else cast(Any, source).get_base_model()
        check_architecture(loaded.config)
        loaded.eval()  # type: ignore[no-untyped-call]
        if attention:
            loaded.set_attn_implementation(attention)
        return loaded
    if (adapter := Path(source) / "adapter_config.json").is_file():
        base = load_model(_base_of(adapter), device, dtype, attention, options)
        return _merged(base, Path(source))
    check_weights(source)
    check_architecture(AutoConfig.from_pretrained(source, **finding(options)))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, attn_implementation=attention, **options
    )
    placed = PLACING & options.keys()
    return cast(PreTrainedModel, (model if placed else model.to(device)).eval())  # type: ignore[arg-type]


def finding(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those of a model's options with which its configuration and its tokenizer are found as well."""
    return {name: value for name, value in (options or {}).items() if name in FINDING}


def _base_of(adapter: Path) -> str:
    """The model that a PEFT folder was trained on: the one it names, or the folder of that name beside it."""
    named = str(json.loads(adapter.read_text())["base_model_name_or_path"])
    beside = adapter.parent.parent / Path(named).name
    return str(beside) if (beside / "config.json").is_file() else named


def _merged(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """A model with the LoRA of a folder added to its weights, so that it costs nothing."""
    check_weights(adapter)
    lora: Any = PeftModel.from_pretrained(base, str(adapter))
    merged = cast(PreTrainedModel, lora.merge_and_unload())
    if (adapter / "tokenizer_config.json").is_file():
        merged.config.name_or_path = str(adapter)
    return merged.eval()  # type: ignore[no-untyped-call,no-any-return]


def is_distributed(model: PreTrainedModel) -> bool:
    """Whether its weights are split over several processes, as `tp_plan` does."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def check_weights(source: str | Path) -> None:
    """Raise ValueError for a folder that holds pickled weights alone: to load a pickle is to run what it holds."""
    folder = Path(source)
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickled and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{source} holds pickled weights ({', '.join(pickled[:3])}) and no safetensors: loading a pickle runs "
            "whatever code is in it. If you trust its origin, load it with transformers once and call "
            "save_pretrained(FOLDER), which writes safetensors; or use another checkpoint"
        )


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
    if "local" in (getattr(config, "attention_layers", None) or ()) or getattr(config, "index_block_size", None):
        raise ValueError(
            f"{name} ({kind}) chooses the keys that a query reads by their places in the cache, not by their "
            f"positions, and in the packed pass those differ; {advice}"
        )
    if unknown := sorted(attention_types(config) - {FULL, SLIDING}):
        raise ValueError(
            f"{name} ({kind}) has layers of type {', '.join(unknown)}, which the packed pass cannot mask; {advice}"
        )


# The target's attention, by what `Engine.from_pretrained` calls it. "auto" leaves a model its own best: dense masks
# over scaled-dot-product attention, or its own code where it has sinks or soft caps. With a suffix of 4 tokens on a CPU
# the packed pass costs 1.03 times a causal pass of as many tokens, so there is next to nothing to gain: sharing the
# prefix keys and merging by log-sum-exp took 0.92 to 0.97 times as long, of attention's tenth of the pass.
# "flex" leaves out whole blocks that nobody sees, on a GPU and for long drafts; on a CPU it is slow.
FLEX = "flex_attention"
ATTENTION = {"auto": None, "sdpa": "sdpa", "flex": FLEX}

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, in `transformers`' words


def attention_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of attention among a model's layers, in `transformers`' words."""
    named = getattr(config, "layer_types", None)
    return set(named or [SLIDING if getattr(config, "sliding_window", None) else FULL])


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text, prompt and answer, that a model can take; None: any.

    With LongRoPE (Phi-3, Phi-4-mini) it ends where the rotations change. Behind that all cached keys would be others,
    and those of the texts beside it in a batch as well.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one, or one for each kind of layer
    changes = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    limits = [getattr(config, "max_position_embeddings", None), *changes]
    return min((limit for limit in limits if limit is not None), default=None)


# what `transformers`' generate does to logits where a generation config asks for it, and the engine does not
UNHEEDED = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def warn_of_unheeded(model: PreTrainedModel) -> None:
    """Say what a model's generation config asks for in vain, as Qwen2.5's do for a penalty of repetitions."""
    wanted = {name: getattr(model.generation_config, name, None) for name in UNHEEDED}
    if ignored := [f"{name}={value}" for name, value in wanted.items() if value and value != 1]:
        warnings.warn(
            f"the generation config of {model.config.name_or_path} asks for {', '.join(ignored)}, which `generate` of "
            "transformers heeds and this engine does not: its answers are the model's likeliest tokens, or draws from "
            "its own probabilities",
            stacklevel=3,
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


def encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that go on from another text with these words; what looks like a special token in them is text.

    Tokenizers of SentencePiece's kind put a space before a text, which must not come between two pieces: so the
    words are encoded behind a line break, which is then left out.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True}
    line, both = (list(tokenizer.encode(words, **options)) for words in ("\n", "\n" + text))
    return both[len(line) :] if both[: len(line)] == line else list(tokenizer.encode(text, **options))


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, exactly: special tokens and spaces as they are."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # the same, without a look at the type of each token
        return cast(str, backend.decode(list(ids), skip_special_tokens=False))
    return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def certain_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`text_of`, but for a character at its end of which bytes may be missing yet: it comes with the later tokens."""
    return text_of(ids, tokenizer).rstrip("\N{REPLACEMENT CHARACTER}")


def text_behind(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that tokens add to another text: some tokenizers drop the space in front of a text that stands alone."""
    line = encode_text("\n", tokenizer)
    return text_of([*line, *ids], tokenizer)[len(text_of(line, tokenizer)) :]


def eos_ids(model: PreTrainedModel, fallback: int | None = None) -> frozenset[int]:
    """The tokens that end a sequence, from the generation config, then the config, then `fallback`."""
    for source in (model.generation_config, model.config):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            return frozenset(value if isinstance(value, Iterable) else [value])
    return frozenset() if fallback is None else frozenset([fallback])
