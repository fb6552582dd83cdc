"""Trained verifiers: what they read, how they are saved, and for which target they may be used.

`Probe` reads the target's states at the draft's own tokens; `Adapter` reads its states behind short suffixes on which a
LoRA acts. Both read the free evidence too, both give hazards, that the answer goes wrong in a segment, and both are
confident in a prefix as far as nothing went wrong up to its end. A trained verifier is a folder: `verifier.json` names
kind, base model, tokenizer, segmenter and calibrated thresholds, `head.safetensors` holds the head, and an adapter is a
PEFT folder as well.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from parse.prompts import turn_after_answer
from parse.text import encode_text, eos_ids
from parse.verifiers import Calibration, Evidence, Likelihood, Prompt, Verifier

TOKEN_EVIDENCE = 4  # log-probability, entropy, margin, and whether it is the end-of-sequence token
INNER, HEAD_WIDTH = 192, 48  # of a probe's attention: its width, and that of each of its heads
LARGEST = 65504.0  # of float16, in which states are kept to learn from: heads never see larger numbers
SEGMENT_EVIDENCE = 13  # of the three their lowest, mean and highest so far and in the segment where they tell; the end


class LayerNorms(nn.Module):
    """The states of several layers, each layer's normalised by itself: upper ones are many times larger."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] of any floating-point type to float32 [..., width]."""
        known = states.float().clamp(-LARGEST, LARGEST)  # [..., width]
        parts = known.view(*states.shape[:-1], self.layers, self.width // self.layers)  # [..., layers, D]
        return nn.functional.layer_norm(parts, parts.shape[-1:]).flatten(-2) * self.weight + self.bias


class HazardHead(nn.Module):
    """From a state and free evidence to the hazard that the answer goes wrong there.

    The confidence of a prefix is the chance to have survived every hazard up to its end, exp(-sum softplus(hazard)): a
    discrete-time survival model, so confidences never rise along a draft.
    """

    def __init__(self, width: int, evidence: int, hidden: int = 128, dropout: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        self.norm = LayerNorms(width, layers)
        self.body = nn.Sequential(
            nn.Linear(width + evidence, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.dropout = nn.Dropout(dropout)  # of the states
        nn.init.constant_(cast(nn.Linear, self.body[-1]).bias, -5.0)  # most are right

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make a head of the same shape."""
        first = cast(nn.Linear, self.body[0])
        own = {"evidence": first.in_features - self.norm.width, "hidden": first.out_features}
        return {"width": self.norm.width, "layers": self.norm.layers, **own}

    def forward(self, states: Tensor, evidence: Tensor) -> Tensor:
        """States [..., width] and evidence [..., E] to hazards [...], none of them negative."""
        joined = torch.cat([self.dropout(self.norm(states)), evidence], dim=-1)  # [..., width + E]
        return nn.functional.softplus(self.body(joined).squeeze(-1))


class Attention(nn.Module):
    """A pre-normalised block of causal attention and a small network, over the target's states; it needs no positions.

    Those are in the states that it reads.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        b, t, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(b, t, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)  # [3, B, heads, T, 48]
        query, key, value = parts.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, T, 48]
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + cast(Tensor, self.body(self.norms[1](x)))


class AttentiveHead(nn.Module):
    """A `HazardHead` behind blocks of attention over what stands before the draft, and the draft.

    So a token is judged beside what it should agree with: the prompt, and what was said before.
    """

    def __init__(
        self,
        width: int,
        evidence: int,
        hidden: int = 128,
        dropout: float = 0.0,
        layers: int = 1,
        blocks: int = 2,
        inner: int = INNER,
    ) -> None:
        super().__init__()
        self.norm, self.into = LayerNorms(width, layers), nn.Linear(width, inner)
        self.blocks = nn.ModuleList(Attention(inner, dropout) for _ in range(blocks))
        self.head = HazardHead(inner, evidence, hidden, dropout)
        self.dropout = nn.Dropout(dropout)  # of the states

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that make a head of the same shape."""
        own = {"width": self.norm.width, "layers": self.norm.layers, "blocks": len(self.blocks)}
        return {**self.head.sizes, **own, "inner": self.into.out_features}

    def forward(self, texts: Tensor, places: Tensor, evidence: Tensor) -> Tensor:
        """Hazards [M] of the drafts' tokens, none of them negative.

        Args:
            texts: [B, T, width], the states of each text up to its draft's end, padded behind it.
            places: int64 [M, 2], text and index of each draft's tokens.
            evidence: [M, E], theirs.
        """
        x = self.into(self.dropout(self.norm(texts)))  # [B, T, inner]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x[places[:, 0], places[:, 1]], evidence))


def survival(hazards: Tensor) -> Tensor:
    """The chance that nothing went wrong up to each segment's end, from the hazards [K] of the segments."""
    return torch.exp(-hazards.cumsum(0))


def token_inputs(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The probe's inputs: states [M, width] of any floating-point type, and evidence float32 [M, 4].

    The end-of-sequence token was never read, so it borrows the state that predicted it.
    """
    assert evidence.states is not None
    states = evidence.states  # [N, width]
    missing = len(evidence.log_prob) - len(states)  # 1 where the draft ended
    states = torch.cat([states, states[len(states) - 1 :].expand(missing, -1)])  # [M, width]
    is_end = torch.zeros_like(evidence.log_prob)
    is_end[len(evidence.log_prob) - missing :] = 1
    columns = [evidence.log_prob, evidence.entropy, evidence.margin, is_end]
    return states, torch.stack(columns, dim=-1)


def text_inputs(evidences: Sequence[Evidence]) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a probe with attention, of B drafts: texts [B, T, width], places [M, 2] and evidence [M, 4].

    See `AttentiveHead`, and `token_inputs` for the end-of-sequence token.
    """
    rows, places, columns = [], [], []
    for number, evidence in enumerate(evidences):
        assert evidence.context_states is not None
        assert evidence.states is not None
        _, free = token_inputs(evidence)  # [M, 4]
        first, count = len(evidence.context_states), len(evidence.states)
        rows.append(torch.cat([evidence.context_states, evidence.states]))  # [C + N, width]
        index = torch.arange(len(free), device=free.device).clamp(max=count - 1) + first  # [M]
        places.append(torch.stack([torch.full_like(index, number), index], dim=-1))
        columns.append(free)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.cat(places), torch.cat(columns)


def segment_evidence(evidence: Evidence) -> Tensor:
    """Free evidence of each segment and of the draft so far: float32 [K, 13]."""
    rows = []
    for start, stop in evidence.bounds:
        row = [torch.tensor(float(stop > evidence.ends[-1]), device=evidence.log_prob.device)]
        for since in (start, 0):
            log_prob, entropy, margin = (
                part[since:stop] for part in (evidence.log_prob, evidence.entropy, evidence.margin)
            )
            row += [log_prob.min(), log_prob.mean(), entropy.max(), entropy.mean(), margin.max(), margin.mean()]
        rows.append(torch.stack(row))
    return torch.stack(rows)  # [K, 13]


@dataclass
class Probe:
    """A trained head on the target's states at the draft's own tokens; needs no suffix and no mask.

    One with attention reads the states of what stands before the draft as well.
    """

    head: HazardHead | AttentiveHead
    layers: tuple[int, ...]
    threshold: float = 0.5
    kind: str = "probe"
    suffix_ids: list[int] = field(default_factory=list)
    reads_draft: bool = True
    adapted: None = None
    calibration: Calibration | None = None

    @property
    def reads_context(self) -> bool:
        """Whether the head attends to what stands before the draft."""
        return isinstance(self.head, AttentiveHead)

    def hazards(self, evidence: Evidence) -> Tensor:
        """The hazard of each segment, the sum over its tokens: float32 [K]."""
        inputs = text_inputs([evidence]) if self.reads_context else token_inputs(evidence)
        tokens = self.head(*inputs)  # [M]
        return torch.stack([tokens[start:stop].sum() for start, stop in evidence.bounds])

    @torch.inference_mode()
    def confidences(self, evidence: Evidence) -> Tensor:
        """The chance that nothing went wrong up to each end: float32 [K]."""
        return survival(self.hazards(evidence))


@dataclass
class Adapter:
    """A short suffix behind every prefix, a LoRA that acts on the suffixes alone, and a head on the last token of each.

    What the target has read keeps its states (but for rounding in a pass of few tokens): it goes on from the accepted
    prefix as if nobody had asked.
    """

    adapted: PeftModel
    head: HazardHead
    suffix_ids: list[int]
    threshold: float = 0.5
    kind: str = "adapter"
    layers: tuple[int, ...] = ()
    reads_draft: bool = True
    reads_context: bool = False
    calibration: Calibration | None = None

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
        "layers": list(verifier.layers),
        "suffix_ids": verifier.suffix_ids,
        "threshold": verifier.threshold,
        **facts,
    }
    if isinstance(verifier, Likelihood):
        record |= {"rule": verifier.rule, "scope": verifier.scope}
    if isinstance(verifier, Adapter):
        verifier.adapted.save_pretrained(str(folder))
    if isinstance(verifier, Probe | Adapter):
        record |= {"head": verifier.head.sizes}
        tensors = {name: value.contiguous().cpu() for name, value in verifier.head.state_dict().items()}
        save_file(tensors, folder / "head.safetensors")
    (folder / "verifier.json").write_text(json.dumps(record, indent=2) + "\n")


def load(name: str | Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Verifier:
    """Load a saved verifier with its calibration, or make an untrained one: "prompt" or "likelihood".

    Raises:
        FileNotFoundError: if the folder holds no `verifier.json`.
        ValueError: if the verifier was made for another target, other end tokens or another tokenizer, or its files are
            damaged.
    """
    if name == "prompt":
        return Prompt.of(tokenizer)
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
        verifier, facts = _made(record, path.parent, target, tokenizer), record["calibration"]
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
    record: dict[str, Any], folder: Path, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Verifier:
    """The verifier that a folder's record describes, for the target that it was made for."""
    if record["base"] != fingerprint(target):
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
    ends = sorted(eos_ids(target, tokenizer.eos_token_id))
    if record.get("end_ids", ends) != ends:
        raise ValueError(
            f"the verifier in {folder} was calibrated for answers that end with the tokens {record['end_ids']}, and "
            f"the target's now end with {ends}: restore eos_token_id in its generation config, or run the stage "
            "`verifier` again"
        )
    threshold = float(record["threshold"])
    if record["kind"] == "prompt":
        return Prompt.of(tokenizer, threshold)
    if record["kind"] == "likelihood":
        return Likelihood(record["rule"], record["scope"], threshold)
    kind = AttentiveHead if "blocks" in record["head"] else HazardHead
    head: Any = kind(**record["head"])
    head.load_state_dict(load_file(folder / "head.safetensors"))
    head = head.to(target.device).eval()
    if record["kind"] == "adapter":
        adapted = PeftModel.from_pretrained(sharing(target), str(folder))
        return Adapter(adapted.eval(), head, record["suffix_ids"], threshold)
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
