"""Verifiers on disk, and for which target they may be used.

A verifier is a folder: `verifier.json` names kind, base model, tokenizer, segmenter and calibrated thresholds,
`head.safetensors` holds the head of a trained one, and an adapter is a PEFT folder as well.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.text import eos_ids
from parse.verifiers.adapter import Adapter, sharing
from parse.verifiers.base import Calibration, Verifier
from parse.verifiers.folded import Folded
from parse.verifiers.heads import AttentiveHead, HazardHead, RiseHead
from parse.verifiers.likelihood import Likelihood
from parse.verifiers.probe import Probe
from parse.verifiers.prompt import PromptVerifier


def save(folder: Path, verifier: Verifier, target: PreTrainedModel, facts: dict[str, Any]) -> None:
    """Write `verifier.json`, and the head where there is one.

    Args:
        facts: what else to record: segmenter, tokenizer hash, end tokens, calibration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": verifier.kind,
        "base": fingerprint(target),
        "base_name": target.config.name_or_path,
        "layers": list(verifier.needs.layers),
        "suffix_ids": list(verifier.needs.suffix_ids),
        "threshold": verifier.threshold,
        **facts,
    }
    if isinstance(verifier, Likelihood):
        record |= {"rule": verifier.rule, "scope": verifier.scope}
    if isinstance(verifier, Adapter):
        verifier.adapted.save_pretrained(str(folder))
    if isinstance(verifier, Folded):
        record |= {"labels": list(verifier.labels)}
    if isinstance(verifier, Probe | Folded | Adapter):
        record |= {"head": verifier.head.sizes}
        tensors = {name: value.contiguous().cpu() for name, value in verifier.head.state_dict().items()}
        save_file(tensors, folder / "head.safetensors")
    (folder / "verifier.json").write_text(json.dumps(record, indent=2) + "\n")


def load(
    name: str | Path,
    target: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int] | None = None,
) -> Verifier:
    """Load a saved verifier with its calibration, or make an untrained one: "prompt" or "likelihood".

    Args:
        target: None where it is on a server, which shows no weights.
        end_ids: the tokens that end its answers, where it shows none.

    Raises:
        FileNotFoundError: if the folder holds no `verifier.json`.
        ValueError: if the verifier was made for another target, other end tokens or another tokenizer, or its files are
            damaged.
    """
    if name == "prompt":
        return PromptVerifier.of(tokenizer)
    if name == "likelihood":
        return Likelihood()
    path = Path(name) / "verifier.json"
    if not path.is_file():
        raise FileNotFoundError(
            f'verifier={str(name)!r}: no such verifier; use "prompt", "likelihood", or a folder that holds '
            "verifier.json (the `verifier` stage of `python -m train` writes one)"
        )
    try:
        record = json.loads(path.read_text())
        ends = end_ids if target is None else eos_ids(target, cast(Any, tokenizer).eos_token_id)
        verifier = _made(record, path.parent, target, tokenizer, sorted(ends or ()))
        facts = record["calibration"]
        settings = facts["handback"], facts.get("horizon"), record["segments"]
        verifier.calibration = Calibration(record["thresholds"], *settings)
        return verifier
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(
            f"the verifier in {path.parent} is damaged ({type(error).__name__}: {error}): restore the folder, or run "
            "the stage `verifier` again"
        ) from error


def _made(
    record: dict[str, Any],
    folder: Path,
    target: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
) -> Verifier:
    """The verifier that a folder's record describes, for the target that it was made for."""
    if target is not None and record["base"] != fingerprint(target):
        raise ValueError(
            f"the verifier in {folder} was trained on {record['base_name']!r} (weights {record['base'][:12]}), "
            f"and the target is {target.config.name_or_path!r} (weights {fingerprint(target)[:12]}): "
            "train a verifier for this target or load that one"
        )
    if record["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the verifier in {folder} was trained with another tokenizer or chat template "
            f"({record['tokenizer'][:12]}, the target's is {tokenizer_hash(tokenizer)[:12]}): train it again"
        )
    if record.get("end_ids", ends) != ends:
        raise ValueError(
            f"the verifier in {folder} was calibrated for answers that end with the tokens {record['end_ids']}, and "
            f"the target's now end with {ends}: restore eos_token_id in its generation config, or run the stage "
            "`verifier` again"
        )
    threshold = float(record["threshold"])
    if record["kind"] == "prompt":
        return PromptVerifier.of(tokenizer, threshold)
    if record["kind"] == "likelihood":
        return Likelihood(record["rule"], record["scope"], threshold)
    attends, folded = "blocks" in record["head"], record["kind"] == "folded"
    kind: Any = RiseHead if folded else AttentiveHead if attends else HazardHead
    head = kind(**record["head"])
    head.load_state_dict(load_file(folder / "head.safetensors"))
    head = head.to("cpu" if target is None else target.device).eval()
    if record["kind"] in ("probe", "adapter") and target is None:
        raise ValueError(
            f"the verifier in {folder} is of the kind {record['kind']!r}, which no server can give: use the kind "
            f"`folded`, such as {folder / 'others' / 'folded'} beside it, or verifier.kind=folded and the stage "
            "`verifier` again"
        )
    if record["kind"] == "adapter":
        assert target is not None
        adapted = PeftModel.from_pretrained(sharing(target), str(folder))
        return Adapter(adapted.eval(), head, record["suffix_ids"], threshold)
    if folded:
        return Folded(head, record["layers"][0], tuple(record["labels"]), threshold=threshold)
    return Probe(head, tuple(record["layers"]), threshold)


def fingerprint(model: PreTrainedModel) -> str:
    """The identity of a model's weights, whatever the path and the floating-point type: hex sha256.

    Hashes names, shapes and the first eight values of each parameter, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:8].to(torch.bfloat16).float().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {values}".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The identity of a vocabulary and its chat template: hex sha256."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
