"""The recipe: one YAML file = one experiment, read by every stage and by the evaluation.

The dataclasses are the schema: each field says its type, every number its range, and every text its form or its
choices. Loading is strict: an unknown key or a value that its field does not allow is an error that names it and the
remedy, before anything expensive. `section.key=value` on the command line overrides the file. Arguments under
`trainer:` go to TRL's configuration class as they are.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from recipes.fields import (
    Check,
    Count,
    Label,
    Layers,
    Minutes,
    Name,
    Project,
    Rate,
    Source,
    Threads,
    Url,
    Variable,
    Whole,
    Words,
)
from recipes.strict import Range, build, read, set_value
from recipes.verifier_schema import VerifierSection


class RecipeError(ValueError):
    """A recipe that cannot be run as written; the message names the key and the remedy."""


Stage = Literal["pretrain", "answers", "distill", "rollouts", "align", "relabel", "verifier"]
Method = Literal[
    "target",
    "generate",
    "assisted",
    "speculation",
    "draft",
    "cascade",
    "sequential",
    "parse",
    "parse_lookahead",
    "parse_probe",
    "parse_folded",
    "parse_adapter",
    "parse_prompt",
    "parse_likelihood",
]
STAGES: tuple[str, ...] = typing.get_args(Stage)
CHAIN: tuple[Stage, ...] = ("answers", "distill", "rollouts", "verifier")  # no alignment; "relabel" comes with it


@dataclass(frozen=True)
class Pretrain:
    """Make a small model from nothing on the task's own text (the embedded pair only)."""

    output: Source  # folder of the model
    speaker: Literal["target", "draft"]  # one habit, reads every manner, judges; or its own manner
    architecture: dict[str, Any]  # arguments of the model's configuration, with `model_type`
    minutes: Minutes
    batch_size: Count = 8
    learning_rate: Rate = 1e-3
    judge_minutes: Annotated[float, Range(0, 10**5)] = 0  # then the layers above the exit learn judging turns too
    exit_layer: Layers | None = None  # the answer is learnt at this layer too (Llama only)
    threads: Threads | None = None  # CPU threads; None leaves torch's default


@dataclass(frozen=True)
class NewTokenizer:
    """A vocabulary of the draft's own: see `recipes.vocabulary`."""

    vocab_size: Annotated[int, Range(261, 10**6)]  # every byte, and five control tokens, at least


@dataclass(frozen=True)
class NewDraft:
    """A draft that is no checkpoint yet: the target with fewer layers, or random weights of some configuration."""

    layers: Layers | None = None  # of the target's that are kept, evenly spaced, the first and the last among them
    config: dict[str, Any] | None = None  # arguments of a configuration, with `model_type`
    tokenizer: NewTokenizer | None = None  # beside `config`; None: the target's


@dataclass(frozen=True)
class Shares:
    """How many parts of the rows each split gets, where rows name none."""

    answers: Whole
    train: Whole
    calibration: Whole
    test: Whole


@dataclass(frozen=True)
class HarnessSection:
    """A task of EleutherAI's lm-evaluation-harness, where `task` is lm_eval:NAME; see `eval.tasks.harness`."""

    include_path: Source | None = None  # a folder with tasks of one's own, in the harness's YAML
    num_fewshot: Whole | None = None  # examples before each question; None: as many as the task says
    fewshot_as_multiturn: bool = False  # the examples as turns of a conversation
    metric: Words | None = None  # by which an answer is right; None: the task's first one
    filter: Words | None = None  # of the answer's text; None: the task's last one
    threshold: Annotated[float, Range(-(10**9), 10**9)] | None = None  # the score from which on an answer is right
    confirm_run_unsafe_code: bool = False  # let a task run the code that a model wrote, as the harness's switch does


@dataclass(frozen=True)
class Data:
    """How rows are read, where `task` is a JSONL file or a data set of the hub; see `eval.tasks.rows`."""

    check: Check = "contains"  # how an answer is compared with its `reference`, or a function of one's own that does
    system: Words | None = None  # the system's turn, where a row has none of its own
    fields: dict[Literal["prompt", "messages", "system", "reference", "split"], Words] = field(default_factory=dict)
    # the rows' own names of these
    shares: Shares = field(default_factory=lambda: Shares(answers=6, train=4, calibration=4, test=2))  # of the splits
    max_rows: Count | None = None  # the first so many rows
    config: Words | None = None  # of a hub data set
    split: Words = "train"  # of a hub data set: all rows are read from it
    harness: HarnessSection = field(default_factory=HarnessSection)


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server (vLLM, SGLang) that gives the target's answers, or compares others with them."""

    url: Url
    model: Words | None = None  # its name there; None: the recipe's target
    concurrency: Annotated[int, Range(1, 4096)] = 32  # requests at a time, of each process
    timeout: Annotated[float, Range(0.001, 10**6)] = 600  # seconds a request may take
    retries: Annotated[int, Range(0, 1000)] = 4  # of a request that fails
    key_variable: Variable = "OPENAI_API_KEY"  # the environment variable that holds the key, where one is needed
    extra_body: dict[str, Any] = field(default_factory=dict)  # more of each request, as the server knows it


@dataclass(frozen=True)
class Answers:
    """What the target answers to the training prompts."""

    prompts: Count = 480  # how many the target answers
    batch_size: Count = 48  # answers at a time
    source: Literal["target", "references"] = "target"  # "references": what the rows call right, not the target's words
    server: Server | None = None  # None: the engine here
    thinking: Literal["keep", "drop"] = "keep"  # "drop" leaves out what stands between `<think>` and `</think>`


@dataclass(frozen=True)
class Distill:
    """The draft learns the target's answers."""

    method: Literal["sequence", "logits", "on_policy", "gold"] = "sequence"  # see `train.distill`
    lora: dict[str, Any] | None = None  # PEFT LoraConfig; None trains every weight
    lora_from: Source | None = None  # a PEFT folder, whose LoRA goes on learning instead of a new one
    merge: bool = True  # the LoRA into the draft's weights; false leaves a PEFT folder, which the engine merges
    top_k: Count = 16  # of the target's next tokens whose log-probabilities "logits" keeps
    trainer: dict[str, Any] = field(default_factory=dict)  # TRL: SFTConfig, DistillationConfig or GOLDConfig

    @property
    def by_lora(self) -> bool:
        """Whether a LoRA learns, and not every weight."""
        return self.lora is not None or self.lora_from is not None


@dataclass(frozen=True)
class Align:
    """The draft learns by LoRA where the target takes it up: see `train.align`."""

    method: Literal["dpo", "on_policy"] = "dpo"  # pairs of preferred continuations, or the target's next tokens
    prompts: Count = 300  # whose rollouts give the pairs
    lora: dict[str, Any] = field(default_factory=dict)  # PEFT LoraConfig
    trainer: dict[str, Any] = field(default_factory=dict)  # TRL: DPOConfig or DistillationConfig


@dataclass(frozen=True)
class Rollouts:
    """What the draft answers, and which of its prefixes the target can still finish rightly."""

    train: Count = 2000  # prompts that verifiers learn from
    calibration: Count = 400  # prompts that the threshold is calibrated on
    test: Count = 400  # prompts on which the verifier is measured
    minutes: Minutes | None = 60  # after which no other training prompt is taken up; they come last
    rounds: Count = 8  # the target repairs fewer drafts of a prompt than that
    drafts: Count = 3  # of each training prompt: one by the draft itself, the others by disturbed copies of it, which
    # err more often
    negatives: Whole = 0  # copies of each right one by the draft itself, with a fault that the task makes, where it can
    labels: Literal["auto", "checker", "bisect", "all"] = "auto"  # "checker": by the task's program, where it knows the
    # first wrong sentence, which costs one way on of the target for each wrong draft; "bisect" and "all" by its ways
    # on, "all" from every prefix. "auto" is "checker" for training prompts where the program knows, else "bisect"
    labeller: Literal["auto", "task", "agreement"] = "auto"  # "task", its checker, where it has one; else "agreement":
    # answers are compared with the target's own
    judge: Server | None = None  # a model that compares them, here and in evaluations; None: the target does
    samples: Count = 1  # ways on from a prefix, of which the most decide; 1 is greedy
    recheck: Whole = 100  # labels to ask again, to know their noise
    batch_size: Count = 48  # prompts at a time


@dataclass(frozen=True)
class EngineSection:
    """How the engine answers; the arguments of `Engine.generate`, and `compile` of `Engine.from_pretrained`."""

    max_new_tokens: Count = 512  # of an answer
    policy: Literal["first_fail", "longest", "whole"] = "first_fail"  # which of the judged prefixes are accepted
    handback: Literal["segment", "never"] = "segment"  # after a repair the draft drafts again, or never
    horizon: Literal["segment"] | Count | None = None  # tokens that the draft writes at a time; None for whole answers
    lookahead: Whole = 0  # tokens that the draft proposes at a time while the target writes
    compile: bool | None = True  # in evaluations: forward passes are compiled where that pays, before the first prompt
    target_options: dict[str, Any] = field(default_factory=dict)  # of `from_pretrained`, such as {device_map: auto}
    draft_options: dict[str, Any] = field(default_factory=dict)  # the same for the draft
    target_url: Url | None = None  # a vLLM server that serves the target, http://host:8000/v1#MODEL; what needs its
    # weights, the stage `verifier`, loads them here all the same


@dataclass(frozen=True)
class Eval:
    """The end-to-end evaluation."""

    prompts: Count = 200  # test prompts
    methods: list[Method] | None = (
        None  # None: all that these models can do, by the chosen verifier; see
        # `eval.methods.WHAT`
    )
    concurrency: list[Annotated[int, Range(1, 4096)]] | None = None  # requests at once; a table each, the first one
    # with plots and transcripts; None: 1 and 8, on a GPU 32 too, where there are two prompts for each
    draft: Source | None = None  # the folders that are evaluated; None: the run's own
    verifier: Source | None = None
    speculation_draft: Source | None = None  # for "speculation"; None: the recipe's draft
    warmup: Whole = 3  # prompts that run twice
    threads: Threads | None = None  # CPU threads; None leaves torch's default
    sweep_prompts: Whole = 30  # on which PARSE is timed at other thresholds too; 0 for none


@dataclass(frozen=True)
class Logging:
    """Where a run's figures go beside the console and its folder."""

    wandb: Literal["online", "offline"] | None = None  # Weights & Biases; null: nothing leaves the machine
    project: Project = "parse"  # there
    name: Label | None = None  # of the run there; None takes the recipe's


@dataclass(frozen=True)
class Recipe:
    """A whole experiment. Sections are the stages; what is above them is shared."""

    name: Name  # of the run folder
    target: Source  # the model that you serve: a folder, a hub id, or a PEFT folder
    draft: Source | NewDraft  # a checkpoint, or how to make one
    task: Source  # a task's name, a JSONL file, or a data set of the hub
    segments: Literal["sentence", "line"] | Count = (
        "sentence"  # where answers may be cut; a number: every so many tokens
    )
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0  # of prompts, training and sampling
    runs: Source = "runs"  # the folder of run folders
    stages: list[Stage] = field(default_factory=lambda: list(CHAIN))  # what a run makes, in this order
    data: Data = field(default_factory=Data)
    pretrain: dict[Name, Pretrain] = field(default_factory=dict)
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
        """Whether a LoRA aligns the draft after its distillation."""
        return "align" in self.stages

    @property
    def draft_folder(self) -> Path:
        """The draft that is verified and evaluated."""
        return self.folder / ("draft-lora" if self.aligned else "draft")

    @property
    def evaluated(self) -> tuple[Path, Path]:
        """The folders of the draft and of the verifier that are evaluated."""
        section = self.eval
        return Path(section.draft or self.draft_folder), Path(section.verifier or self.folder / "verifier")

    @property
    def rollouts_folder(self) -> Path:
        """What that draft answers, with labels."""
        return self.folder / ("rollouts-aligned" if self.aligned else "rollouts")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        overrides: `section.key=value`, the value in YAML; of two for the same key the later one holds.

    Raises:
        RecipeError: naming the file, the key, and what is allowed.
    """
    try:
        content = read(path)
        _check_trust(content)
        for override in overrides:
            set_value(content, override)
        recipe: Recipe = build(Recipe, content)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    _check(recipe)
    return recipe


def _check_trust(content: dict[str, Any]) -> None:
    """Refuse a file that lets a model run its own code: that is for whoever starts it to say."""
    section = content.get("engine")
    for name in ("target_options", "draft_options"):
        options = section.get(name) if isinstance(section, dict) else None
        if isinstance(options, dict) and "trust_remote_code" in options:
            raise RecipeError(
                f"engine.{name} holds trust_remote_code, which runs whatever code a model brings: leave it out, or, if "
                f"you have read that code, say so on the command line: engine.{name}.trust_remote_code=true"
            )


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe or a section as plain data."""
    return dataclasses.asdict(recipe)


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    if isinstance(recipe.draft, NewDraft) and (recipe.draft.layers is None) == (recipe.draft.config is None):
        raise RecipeError("draft must be a model, or hold `layers` or `config`, one of them")
    if isinstance(recipe.draft, NewDraft) and recipe.draft.tokenizer and recipe.draft.layers is not None:
        raise RecipeError(
            "draft.tokenizer is for a draft with a `config`: layers of the target read the target's tokens"
        )
    if recipe.distill.lora is not None and recipe.distill.lora_from is not None:
        raise RecipeError("distill has `lora`, a new one, and `lora_from`, one that goes on learning: keep one of them")
    for name, options in ("target", recipe.engine.target_options), ("draft", recipe.engine.draft_options):
        if split := sorted({"tp_plan", "distributed_config"} & options.keys()):
            raise RecipeError(
                f"engine.{name}_options holds {', '.join(split)}, which splits a model over processes, and those of a "
                "run each take prompts of their own: use {device_map: auto} to spread it over the GPUs of one"
            )
    if recipe.eval.methods is not None and "target" not in recipe.eval.methods:
        raise RecipeError("eval.methods lacks 'target': every speed-up is measured against it; add it")
    if (most := max(recipe.eval.concurrency or [1])) > 1 and recipe.eval.prompts < 2 * most:
        raise RecipeError(
            f"eval.concurrency has {most} requests at once, and eval.prompts is {recipe.eval.prompts}: give at least "
            f"{2 * most} prompts, so that the speed-up is measured more than once"
        )
    if recipe.engine.target_url and recipe.engine.lookahead:
        raise RecipeError(
            f"engine.lookahead is {recipe.engine.lookahead}, which takes both models on this machine, and "
            "engine.target_url puts the target on a server: set lookahead to 0"
        )
    if not any(to_dict(recipe.data.shares).values()):
        raise RecipeError("data.shares are all 0, so that no row is in a split: give one of them 1 or more")
