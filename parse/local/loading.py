"""Models and their prompts: loading them, and refusing in time what the engine cannot run.

The packed pass needs a causal language model whose cache can be rolled back by tokens and that takes
positions. What cannot (recurrent state, encoder-decoder, ALiBi, no cache at all) is refused from its
configuration, before any weight is read.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

Messages = list[dict[str, str]]
# options that say where a model's weights lie
PLACING = {"device_map", "tp_plan", "distributed_config", "quantization_config"}
# options that say which files are a model's: configuration and tokenizer are among them
FINDING = {"revision", "subfolder", "gguf_file", "token", "cache_dir", "local_files_only"}
# options of `transformers`' `from_pretrained`
OPTIONS = (
    PLACING
    | FINDING
    | {"max_memory", "offload_folder", "offload_buffers", "tp_size", "device_mesh", "trust_remote_code", "variant"}
    | {"use_kernels", "kernel_config", "experts_implementation", "key_mapping", "force_download", "proxies"}
    | {"low_cpu_mem_usage", "ignore_mismatched_sizes", "code_revision"}
)
# of a configuration: what may be another while the weights are the same
CONFIGURED = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "sliding_window"}
OURS = {  # and what to use instead
    "dtype": "the argument dtype",
    "output_loading_info": "nothing",
    "torch_dtype": "the argument dtype",
    "attn_implementation": "the argument attention",
    "use_safetensors": "a checkpoint of safetensors",
}
ANOTHER = "restore the configuration that belongs to these weights"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
LFS = b"version https://git-lfs"


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
    if not isinstance(options, dict):
        raise ValueError(
            f"options of from_pretrained must be keys and values, such as {{'device_map': 'auto'}}: {options!r}"
        )
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
        return _heeding_softcap(loaded)
    if not Path(source).is_dir() and not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{source} is not a folder here; give the folder of a model, or a hub id such as org/name")
    if (adapter := Path(source) / "adapter_config.json").is_file():
        check_weights(source)
        base = load_model(_base_of(adapter), device, dtype, attention, options)
        return _merged(base, Path(source))
    config = AutoConfig.from_pretrained(source, **finding(options))
    check_architecture(config)
    check_options(options, config)
    if "gguf_file" not in options:
        check_weights(Path(source) / options.get("subfolder", ""))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = whole_model(source, dtype=dtype, attn_implementation=attention, **{**options, **finding(options)})
    placed = PLACING & options.keys()
    return _heeding_softcap(cast(PreTrainedModel, (model if placed else model.to(device)).eval()))  # type: ignore[arg-type]


def _heeding_softcap(model: PreTrainedModel) -> PreTrainedModel:
    """The model; where it bounds its scores, by an attention that does so too (`transformers` 5.17 takes another)."""
    if softcap_of(model) and model.config._attn_implementation == SDPA:
        model.set_attn_implementation("eager")
    return model


def softcap_of(model: PreTrainedModel) -> float | None:
    """What a model bounds its attention's scores by, as Gemma 2 does; PyTorch's own attention cannot."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def whole_model(source: str | Path, **options: Any) -> PreTrainedModel:
    """A model by `transformers`' `from_pretrained`.

    Raises:
        ValueError: for weights that are not those of its configuration: what is missing would be drawn at random.
    """
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # type: ignore[attr-defined]  # else the same is said, as a table
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        model, found = loaded
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError(f"the weights in {source} have other shapes than its config.json says: {ANOTHER}") from error
    finally:
        logging.set_verbosity(level)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} lacks the weights {', '.join(missing[:3])} that its config.json asks for: {ANOTHER}"
        )
    held = {re.sub(r"\.\d+\.", ".0.", name) for name, _ in model.named_parameters()}
    if more := sorted(name for name in found["unexpected_keys"] if re.sub(r"\.\d+\.", ".0.", name) in held):
        raise ValueError(f"{source} holds the weights {', '.join(more[:3])} beyond its config.json: {ANOTHER}")
    return cast(PreTrainedModel, model)


def load_tokenizer(model: PreTrainedModel, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model; `options` as for the model."""
    loaded = AutoTokenizer.from_pretrained(model.config.name_or_path, **finding(options))
    return cast(PreTrainedTokenizerBase, loaded)


def finding(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those of a model's options with which its configuration and its tokenizer are found as well.

    A model's own code is run only where they say `trust_remote_code`.
    """
    found = {name: value for name, value in (options or {}).items() if name in FINDING}
    return {**found, "trust_remote_code": trusts_code(options)}


def trusts_code(options: dict[str, Any] | None) -> bool:
    """Whether a model's options let it run code of its own."""
    return (options or {}).get("trust_remote_code") is True


def base_of(source: str | Path) -> str:
    """The model whose configuration and weights a source has: of a PEFT folder the model it was trained on."""
    adapter = Path(source) / "adapter_config.json"
    return _base_of(adapter) if adapter.is_file() else str(source)


def tokenizer_of(source: str | Path) -> str:
    """Where a source's tokenizer lies: a PEFT folder may lack one, and has its model's."""
    return str(source) if (Path(source) / "tokenizer_config.json").is_file() else base_of(source)


def _base_of(adapter: Path) -> str:
    """The model that a PEFT folder was trained on: the one it names, or the folder of that name beside it."""
    named = str(json.loads(adapter.read_text())["base_model_name_or_path"])
    beside = adapter.parent.parent / Path(named).name
    return str(beside) if (beside / "config.json").is_file() else named


def _merged(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """A model with the LoRA of a folder added to its weights, so that it costs nothing."""
    lora: Any = PeftModel.from_pretrained(base, str(adapter))
    check_mergeable(lora, str(adapter))
    merged = cast(PreTrainedModel, lora.merge_and_unload())
    if (adapter / "tokenizer_config.json").is_file():
        merged.config.name_or_path = str(adapter)
    return merged.eval()  # type: ignore[no-untyped-call,no-any-return]


def check_mergeable(lora: PeftModel, name: str) -> None:
    """Raise ValueError for a LoRA on an embedding that is the LM head as well: merged, it would change both."""
    model = cast(PreTrainedModel, lora.get_base_model())
    ends = model.get_input_embeddings(), cast(Any, model).get_output_embeddings()
    adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in ends)
    if adapted and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ValueError(
            f"{name} adapts the embedding or the LM head, and in {model.config.name_or_path} they are one weight "
            "(tie_word_embeddings): to merge it would change both. Leave embed_tokens and lm_head out of "
            "target_modules and modules_to_save"
        )


def check_options(options: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise ValueError for options of `from_pretrained` that it does not know, or that are ours to set."""
    for name, instead in OURS.items():
        if name in options:
            raise ValueError(f"the option {name!r} is set by the engine: use {instead}")
    for name in options:
        if name not in OPTIONS and not (name in CONFIGURED and hasattr(config, name)):
            near = get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown option {name!r} of from_pretrained{hint} Allowed: {', '.join(sorted(OPTIONS))}")
    place = options.get("device_map")
    if isinstance(place, dict) or place is None or place in DEVICE_MAPS:
        return
    try:
        known = isinstance(place, str | torch.device) and (
            torch.device(place).type != "cuda" or torch.cuda.is_available()
        )
    except RuntimeError:
        known = False
    if not known:
        raise ValueError(f"device_map={place!r} is no device here: use one such as cpu, or {', '.join(DEVICE_MAPS)}")


def is_distributed(model: PreTrainedModel) -> bool:
    """Whether its weights are split over several processes, as `tp_plan` does."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def check_weights(source: str | Path) -> None:
    """Raise ValueError for a folder without weights, with a part of them, or with pickled ones alone.

    To load a pickle is to run what it holds.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickled and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{source} holds pickled weights ({', '.join(pickled[:3])}) and no safetensors: loading a pickle runs "
            "whatever code is in it. If you trust its origin, load it with transformers once and call "
            "save_pretrained(FOLDER), which writes safetensors; or use another checkpoint"
        )
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    if (folder / "adapter_config.json").is_file():
        wanted = {"adapter_model.safetensors"}
    elif index := next(iter(sorted(folder.glob("*.safetensors.index*.json"))), None):
        try:
            wanted = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}): download it again") from error
    else:
        wanted = {name for name in files if re.fullmatch(r"model(\.[\w-]+)?\.safetensors", name)} or {
            "model.safetensors"
        }
    if missing := sorted(wanted - set(files)):
        held = f"; it holds {', '.join([*files][:3])}" if files else " (no *.safetensors)"
        raise ValueError(
            f"{source} lacks {', '.join(missing[:3])}, weights that it should hold{held}: download them, or name "
            "another folder"
        )
    for name in sorted(wanted):
        _check_readable(files[name])


def _check_readable(file: Path) -> None:
    """Raise ValueError for a file of weights that is cut, or stands for one that was not downloaded."""
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(
                f"{file} is a git-lfs pointer, not the weights themselves: run `git lfs pull` in its folder"
            )
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): download it again") from error


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
FLEX, SDPA = "flex_attention", "sdpa"
ATTENTION = {"auto": None, "sdpa": SDPA, "flex": FLEX}

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, in `transformers`' words


def attention_types(config: PreTrainedConfig) -> set[str]:
    """The kinds of attention among a model's layers, in `transformers`' words."""
    named = getattr(config, "layer_types", None)
    return set(named or [SLIDING if getattr(config, "sliding_window", None) else FULL])


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text, prompt and answer, that a model can take; None: any.

    With LongRoPE (Phi-3, Phi-4-mini) it ends where the rotations change. After that all cached keys would be others,
    and those of the texts beside it in a batch as well.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one, or one for each kind of layer
    changes = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    limits = [getattr(config, "max_position_embeddings", None), *changes]
    return min((limit for limit in limits if limit is not None), default=None)


# what `transformers`' generate does where a generation config asks for it, and the engine does not
UNHEEDED = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "watermarking_config",
    "constraints",
    "force_words_ids",
    "dola_layers",
    "guidance_scale",
    "stop_strings",
    "num_beams",
    "penalty_alpha",
    "max_time",
)
NEUTRAL = {"repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"}  # where they are 1


def warn_of_unheeded(model: PreTrainedModel) -> None:
    """Say what a model's generation config asks for in vain, as Qwen2.5's do for a penalty of repetitions."""
    wanted = {name: getattr(model.generation_config, name, None) for name in UNHEEDED}
    if ignored := [
        f"{name}={value}" for name, value in wanted.items() if value and not (value == 1 and name in NEUTRAL)
    ]:
        warnings.warn(
            f"the generation config of {model.config.name_or_path} asks for {', '.join(ignored)}, which `generate` of "
            "transformers heeds and this engine does not: its answers are the model's likeliest tokens, or draws from "
            "its own probabilities, up to one of its end tokens",
            stacklevel=3,
        )
