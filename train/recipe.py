"""The recipe: one YAML file = one experiment, read by every stage and by the evaluation.

Loading is strict: an unknown key, a wrong type or a missing file is an error that names it and the
remedy, before anything expensive. `section.key=value` on the command line overrides the file.
Arguments under `trainer:` go to TRL's configuration class as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

VERIFIERS = ("best", "probe", "adapter", "prompt", "likelihood")
STAGES = ("pretrain", "answers", "distill", "rollouts", "align", "relabel", "verifier")
CHECKS = ("contains", "equal", "number", "math")  # ways to compare an answer with its reference
SHARES = {"answers": 6, "train": 4, "calibration": 4, "test": 2}  # of the splits, where rows name none
CHAIN = ("answers", "distill", "rollouts", "verifier")  # without alignment; "relabel" comes with it by itself


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML in which 1e-4 is a number, as it is to everybody but YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class RecipeError(ValueError):
    """A recipe that cannot be run as written; the message names the key and the remedy."""


@dataclass(frozen=True)
class Pretrain:
    """Make a small model from nothing on the task's own text (the embedded pair only)."""

    output: str  # folder of the model
    speaker: str  # "target" (one habit, reads every manner, judges) or "draft" (its own manner)
    architecture: dict[str, Any]  # arguments of the model's configuration, with `model_type`
    minutes: float
    batch_size: int = 8
    learning_rate: float = 1e-3
    judge_minutes: float = 0  # then, for the layers above the exit to learn judging turns too
    exit_layer: int | None = None  # the answer is learnt at this layer too (Llama only)
    threads: int | None = None  # CPU threads; None leaves torch's default


@dataclass(frozen=True)
class NewDraft:
    """A draft that is no checkpoint yet: the target with fewer layers, or random weights of some configuration."""

    layers: int | None = None  # of the target's that are kept, evenly spaced, the first and the last among them
    config: dict[str, Any] | None = None  # arguments of a configuration, with `model_type`; the target's tokenizer


@dataclass(frozen=True)
class Data:
    """How rows are read, where `task` is a JSONL file or a data set of the hub; see `eval.tasks.rows`."""

    check: str = "contains"  # how an answer is compared with its `reference`: also "equal", "number", "math"
    system: str | None = None  # the system's turn, where a row has none of its own
    fields: dict[str, str] = field(default_factory=dict)  # our name of a field: the rows' name
    shares: dict[str, int] = field(default_factory=lambda: dict(SHARES))  # of the splits, where rows name none
    max_rows: int | None = None
    config: str | None = None  # of a hub data set
    split: str = "train"  # of a hub data set: all rows are read from it


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server (vLLM, SGLang) that gives the target's answers."""

    url: str  # such as http://localhost:8000/v1
    model: str | None = None  # its name there; None: the recipe's target
    concurrency: int = 32  # requests at a time, of each process
    timeout: float = 600  # seconds a request may take
    retries: int = 4
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key, where one is needed


@dataclass(frozen=True)
class Answers:
    """What the target answers to the training prompts."""

    prompts: int = 480
    batch_size: int = 48
    server: Server | None = None  # None: the engine here
    thinking: str = "keep"  # or "drop": leave out of the answers what stands between <think> and </think>


@dataclass(frozen=True)
class Distill:
    """The draft learns the target's answers."""

    method: str = "sequence"  # or "logits", "on_policy", "gold"; see `train.distill`
    lora: dict[str, Any] | None = None  # PEFT LoraConfig, merged afterwards; None trains every weight
    top_k: int = 16  # of the target's next tokens whose log-probabilities "logits" keeps
    trainer: dict[str, Any] = field(default_factory=dict)  # TRL: SFTConfig, DistillationConfig or GOLDConfig


@dataclass(frozen=True)
class Align:
    """The draft learns by LoRA where the target takes it up: see `train.align`."""

    method: str = "dpo"  # or "on_policy"
    prompts: int = 300  # whose rollouts give the pairs
    lora: dict[str, Any] = field(default_factory=dict)  # PEFT LoraConfig
    trainer: dict[str, Any] = field(default_factory=dict)  # TRL: DPOConfig or DistillationConfig


@dataclass(frozen=True)
class Rollouts:
    """What the draft answers, and which of its prefixes the target can still finish rightly."""

    train: int = 400  # prompts
    calibration: int = 400
    test: int = 400  # on which the verifier is measured
    rounds: int = 8  # drafts a prompt at most, each behind the target's repair of the one before
    labels: str = "bisect"  # or "all": ask the target about every prefix
    labeller: str = "auto"  # "task", its checker, where it has one; else "agreement": the target compares with its own
    samples: int = 1  # ways on from a prefix, of which the most decide; 1 is greedy
    recheck: int = 100  # labels to ask again, to know their noise
    batch_size: int = 48


@dataclass(frozen=True)
class Fit:
    """How a trained verifier learns."""

    epochs: int
    learning_rate: float
    batch_size: int = 16  # drafts, over all processes
    error_weight: float = 1.0  # of a draft's first invalid cut beside its valid ones
    hidden: int = 128  # units of the head
    dropout: float = 0.0


@dataclass(frozen=True)
class ProbeSection(Fit):
    """The head on the target's states at the draft's own tokens."""

    epochs: int = 40
    learning_rate: float = 2e-3
    layers: list[int] = field(default_factory=lambda: [-1])  # hidden states that it reads, 0 is the embedding


@dataclass(frozen=True)
class AdapterSection(Fit):
    """The activated LoRA on short suffixes, and its head."""

    epochs: int = 6
    learning_rate: float = 1e-3
    suffix: int = 2  # tokens
    rank: int = 16
    layers: int | None = None  # so many of the last ones are adapted; None for all


@dataclass(frozen=True)
class VerifierSection:
    """The verifier and its threshold."""

    kind: str = "best"  # "probe", "adapter", "prompt" or "likelihood"; or the "best" of all on held-out prompts
    max_accuracy_loss: float = 0.01
    probe: ProbeSection = field(default_factory=ProbeSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)


@dataclass(frozen=True)
class EngineSection:
    """How the engine answers; the arguments of `Engine.generate`, and `compile` of `Engine.from_pretrained`."""

    max_new_tokens: int = 512
    policy: str = "first_fail"
    handback: str = "segment"
    horizon: int | str | None = None
    lookahead: int = 0
    compile: bool | None = True  # in evaluations: forward passes are compiled where that pays, before the first prompt
    target_options: dict[str, Any] = field(default_factory=dict)  # of `from_pretrained`, such as {device_map: auto}
    draft_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Eval:
    """The end-to-end evaluation."""

    prompts: int = 200
    methods: list[str] = field(default_factory=lambda: ["target", "draft", "cascade", "sequential", "parse"])
    warmup: int = 3
    threads: int | None = None  # CPU threads; None leaves torch's default
    sweep_prompts: int = 20  # on which PARSE is run at other thresholds too; 0 for none


@dataclass(frozen=True)
class Logging:
    """Where a run's figures go beside the console and its folder."""

    wandb: str | None = None  # "online" or "offline"
    project: str = "parse"
    name: str | None = None  # of the run there; None takes the recipe's


@dataclass(frozen=True)
class Recipe:
    """A whole experiment. Sections are the stages; what is above them is shared."""

    name: str
    target: str
    draft: str | NewDraft  # a checkpoint, or how to make one
    task: str  # a task's name, a JSONL file, or a data set of the hub
    segments: str | int = "sentence"
    seed: int = 0
    runs: str = "runs"
    stages: list[str] = field(default_factory=lambda: list(CHAIN))
    data: Data = field(default_factory=Data)
    pretrain: dict[str, Pretrain] = field(default_factory=dict)
    answers: Answers = field(default_factory=Answers)
    distill: Distill = field(default_factory=Distill)
    rollouts: Rollouts = field(default_factory=Rollouts)
    align: Align = field(default_factory=Align)
    verifier: VerifierSection = field(default_factory=VerifierSection)
    engine: EngineSection = field(default_factory=EngineSection)
    eval: Eval = field(default_factory=Eval)
    logging: Logging = field(default_factory=Logging)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name

    @property
    def aligned(self) -> bool:
        """Whether a LoRA aligns the draft behind its distillation."""
        return "align" in self.stages

    @property
    def draft_folder(self) -> Path:
        """The draft that is verified and evaluated."""
        return self.folder / ("draft-lora" if self.aligned else "draft")

    @property
    def rollouts_folder(self) -> Path:
        """What that draft answers, with labels."""
        return self.folder / ("rollouts-aligned" if self.aligned else "rollouts")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        overrides: `section.key=value`, the value in YAML.

    Raises:
        RecipeError: naming the file, the key, and what is allowed.
    """
    if not Path(path).is_file():
        near = ", ".join(str(p) for p in sorted(Path("recipes").glob("*.yaml"))) or "none here"
        raise RecipeError(f"recipe {path} is not there; recipes found: {near}")
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} must hold keys and values, and holds {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    recipe: Recipe = _build(Recipe, content, "")
    _check(recipe)
    return recipe


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe or a section as plain data."""
    return dataclasses.asdict(recipe)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r} must read section.key=value, such as rollouts.train=100")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"override {override!r}: {section!r} is a value and has no keys")
    content[last] = yaml.load(value, _Loader)


def _build(cls: type, content: Any, section: str) -> Any:
    """A dataclass from a mapping, strictly."""
    where = f"section {section!r}" if section else "the recipe"
    if not isinstance(content, dict):
        raise RecipeError(f"{where} must hold keys and values, and holds {content!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown key {key!r} in {where}{hint} Allowed: {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise RecipeError(f"{where} lacks the key {name!r}: add it")
    hints = typing.get_type_hints(cls)
    prefix = f"{section}." if section else ""
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in content.items()})


def _value(hint: Any, value: Any, key: str) -> Any:
    """A value of the hinted type, or RecipeError."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
    allowed = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    for kind in allowed:
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            return _build(typing.cast(type, kind), value, key)
        if typing.get_origin(kind) in (dict, list) and isinstance(value, typing.get_origin(kind)):
            return _value(kind, value, key)
        if kind is Any or (kind is not float and type(value) is kind):
            return value
        if kind is float and type(value) in (int, float):
            return float(value)
    names = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise RecipeError(f"{key} must be {names}, and is {value!r} ({type(value).__name__})")


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    _check_choices("stages", recipe.stages, STAGES)
    _check_choices("verifier.kind", [recipe.verifier.kind], VERIFIERS)
    _check_choices("rollouts.labels", [recipe.rollouts.labels], ("bisect", "all"))
    _check_choices("rollouts.labeller", [recipe.rollouts.labeller], ("auto", "task", "agreement"))
    _check_choices("answers.thinking", [recipe.answers.thinking], ("keep", "drop"))
    _check_choices("distill.method", [recipe.distill.method], ("sequence", "logits", "on_policy", "gold"))
    _check_choices("align.method", [recipe.align.method], ("dpo", "on_policy"))
    _check_choices("data.check", [recipe.data.check], CHECKS)
    _check_choices("data.shares", list(recipe.data.shares), tuple(SHARES))
    if isinstance(recipe.draft, NewDraft) and (recipe.draft.layers is None) == (recipe.draft.config is None):
        raise RecipeError("draft must be a model, or hold `layers` or `config`, one of them")
    if recipe.logging.wandb is not None:
        _check_choices("logging.wandb", [recipe.logging.wandb], ("online", "offline"))
    _check_choices("engine.policy", [recipe.engine.policy], ("first_fail", "longest", "whole"))
    _check_choices("engine.handback", [recipe.engine.handback], ("segment", "never"))
    for name, options in ("target", recipe.engine.target_options), ("draft", recipe.engine.draft_options):
        if split := sorted({"tp_plan", "distributed_config"} & options.keys()):
            raise RecipeError(
                f"engine.{name}_options holds {', '.join(split)}, which splits a model over processes, and those of a "
                "run each take prompts of their own: use {device_map: auto} to spread it over the GPUs of one"
            )
    methods = ("target", "speculation", "draft", "cascade", "sequential", "parse")
    _check_choices("eval.methods", recipe.eval.methods, methods)
    if not 0 < recipe.verifier.max_accuracy_loss < 1:
        raise RecipeError(
            f"verifier.max_accuracy_loss is {recipe.verifier.max_accuracy_loss}: give a fraction between 0 and 1, "
            "such as 0.01 for one point"
        )
    if "target" not in recipe.eval.methods:
        raise RecipeError("eval.methods lacks 'target': every speed-up is measured against it; add it")
    counts = {
        "answers.prompts": recipe.answers.prompts,
        "align.prompts": recipe.align.prompts,
        "distill.top_k": recipe.distill.top_k,
        "rollouts.train": recipe.rollouts.train,
        "rollouts.calibration": recipe.rollouts.calibration,
        "rollouts.test": recipe.rollouts.test,
        "rollouts.rounds": recipe.rollouts.rounds,
        "rollouts.samples": recipe.rollouts.samples,
        "verifier.probe.epochs": recipe.verifier.probe.epochs,
        "verifier.adapter.epochs": recipe.verifier.adapter.epochs,
        "verifier.adapter.suffix": recipe.verifier.adapter.suffix,
        "verifier.adapter.rank": recipe.verifier.adapter.rank,
        "eval.prompts": recipe.eval.prompts,
        "engine.max_new_tokens": recipe.engine.max_new_tokens,
    }
    for key, count in counts.items():
        if count < 1:
            raise RecipeError(f"{key} is {count}: give a positive number")


def _check_choices(key: str, values: typing.Sequence[str], allowed: typing.Sequence[str]) -> None:
    for value in values:
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{key} names {value!r}{hint} Allowed: {', '.join(allowed)}")


def hidden_states(layers: typing.Sequence[int], depth: int) -> tuple[int, ...]:
    """The probe's layers as indices into `hidden_states`: 0 is the embedding, `depth` the last; negative from the end.

    Raises:
        RecipeError: where there is no such state, or none is named.
    """
    if not layers or any(not -depth - 1 <= layer <= depth for layer in layers):
        raise RecipeError(
            f"verifier.probe.layers is {list(layers)}: the target has hidden states 0 (the embedding) to {depth}, or "
            f"{-depth - 1} to -1 from the end; name one or more"
        )
    return tuple(layer % (depth + 1) for layer in layers)
