"""TRL's trainers as the stages run them: arguments from the recipe, checkpoints to go on from, guards.

A trainer's arguments are the recipe's, untouched, over defaults that suit the machine. Checkpoints are kept in the
stage's scratch folder until the stage is done; the next start of a killed one goes on from the last whole one.
"""

from __future__ import annotations

import difflib
import json
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import DistillationTrainer, SFTTrainer

from recipes.digests import Digests
from recipes.files import write_text
from recipes.progress import progress_bar
from recipes.run import KEPT, Run
from recipes.schema import Recipe, RecipeError

# numbers of a trainer: their kind, what they are at least, and that in words
OURS = {
    "output_dir": "it keeps checkpoints and finds them by itself",
    "resume_from_checkpoint": "it keeps checkpoints and finds them by itself",
    "report_to": "set logging.wandb",
}
TINY = 1e-12
COUNT = (int, 1, "a whole number from 1 on")
POSITIVE = (int | float, TINY, "a number above 0")
NUMBERS: dict[str, tuple[Any, float, str]] = {
    "max_steps": (int, 1, "a whole number from 1 on, or leave it out for num_train_epochs"),
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": POSITIVE,
    "max_length": COUNT,
    "max_completion_length": COUNT,
    "save_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "temperature": POSITIVE,
    "warmup_steps": (int | float, 0, "a number from 0 on"),
    "weight_decay": (int | float, 0, "a number from 0 on"),
    "max_grad_norm": (int | float, 0, "a number from 0 on"),
}
SEAL = "digests.json"  # in a checkpoint
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def arguments(kind: type, given: dict[str, Any], recipe: Recipe, section: str, **defaults: Any) -> Any:
    """TRL's configuration of a kind.

    Args:
        given: the recipe's keys of `section`.
        defaults: what the stage prefers.

    Raises:
        RecipeError: for a key or a value that TRL refuses.
    """
    _check_keys(kind, given, section)
    _check_numbers(given, section)
    on_gpu = torch.cuda.is_available()
    common = {
        "output_dir": str(recipe.folder / f".{section}-checkpoints"),
        "seed": recipe.seed,
        "report_to": "wandb" if recipe.logging.wandb else "none",  # the run that is open
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_steps": 10,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    try:
        return kind(**{**common, **defaults, **given})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"section {section!r} is refused by TRL: {error}") from error


def lora_config(given: dict[str, Any], section: str) -> LoraConfig:
    """PEFT's configuration: the recipe's keys of `section` over `LORA`.

    Raises:
        RecipeError: for a key or a value that PEFT refuses.
    """
    _check_keys(LoraConfig, given, section)
    for key, (least, most) in {"r": (1, 8192), "lora_alpha": (TINY, 1e6), "lora_dropout": (0, 0.99)}.items():
        value = given.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RecipeError(f"{section}.{key} is {value!r}: give a number from {least:g} to {most:g}")
    if (task := given.get("task_type", "CAUSAL_LM")) != "CAUSAL_LM":
        raise RecipeError(f"{section}.task_type is {task!r}: the draft is a causal language model, so leave it out")
    for key in ("inference_mode", "alora_invocation_tokens"):
        if given.get(key):
            raise RecipeError(f"{section}.{key} is set, and the draft's LoRA is learnt and merged: leave it out")
    try:
        return LoraConfig(**{**LORA, **given})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"section {section!r} is refused by PEFT: {error}") from error


def _check_numbers(given: dict[str, Any], section: str) -> None:
    """Refuse numbers with which nothing would be learnt, or that fail at the first step."""
    for key, instead in OURS.items():
        if key in given:
            raise RecipeError(f"{section}.{key} is the stage's own: {instead}")
    for key, (kind, least, words) in NUMBERS.items():
        value = given.get(key)
        if key not in given or (key == "max_steps" and value == -1) or (key == "max_length" and value is None):
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value < least:
            raise RecipeError(f"{section}.{key} is {value!r}: give {words}")


def _check_keys(kind: type, given: dict[str, Any], section: str) -> None:
    allowed = [field.name for field in fields(kind) if field.init]
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown key {key!r} in section {section!r}{hint} See {kind.__name__}")


class AnswerTrainer(SFTTrainer):
    """TRL's SFTTrainer; on a CPU with logits of the answers' tokens alone.

    There TRL computes the loss at every position, prompts and padding too, which costs most with a large vocabulary.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """The mean negative log-likelihood of the tokens to be learnt."""
        if not self.args.use_cpu or self.args.loss_type != "nll" or self.args.label_smoothing_factor or rest:
            return super().compute_loss(model, inputs, *rest, **options)
        labels = inputs["labels"]  # [B, T]
        learnt = labels != -100  # [B, T]
        first = max(1, int(learnt.any(0).long().argmax()))  # the first token that any of the texts learns
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        output = model(**given, use_cache=False, logits_to_keep=labels.shape[1] - first + 1)
        wanted = learnt[:, first:]  # [B, T - first]
        logits = output.logits[:, :-1][wanted].float()  # [M, V]
        count = options.get("num_items_in_batch")  # over all processes, of which DDP takes the mean
        loss = cross_entropy(logits, labels[:, first:][wanted], reduction="sum")
        loss = loss / len(logits) if count is None else loss * self.accelerator.num_processes / count
        return (loss, output) if options.get("return_outputs") else loss


class NotFinite(RuntimeError):
    """A loss that is no number: training on would spoil every weight."""


class Guarded(Trainer):
    """Put in front of one of TRL's trainers: skips a batch with nothing to learn, stops where a loss is no number."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """The trainer's loss; zero for a batch of which no token is to be learnt."""
        labels = inputs.get("labels")
        if labels is None or bool((labels[..., 1:] != -100).any()) or not self.model.training:
            return super().compute_loss(model, inputs, *rest, **options)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits.sum() * 0.0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        """One step; see `NotFinite`."""
        loss: Tensor = super().training_step(model, inputs, *rest)
        if not torch.isfinite(loss):
            raise NotFinite(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the samples "
                f"{self._places(inputs)}: look at them, lower learning_rate, or clip more (max_grad_norm); nothing of "
                "this step is kept"
            )
        return loss

    def _places(self, inputs: Any) -> list[int] | str:
        """The indices in the data set of a batch's samples; their first tokens where they are packed."""
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
        if ids is None or "input_ids" not in self.train_dataset.column_names:
            return "of this batch"
        batch = [row[row != -1].tolist() for row in ids]
        found = [
            i for i, own in enumerate(self.train_dataset["input_ids"]) if any(row[: len(own)] == own for row in batch)
        ]
        return found or f"that begin with the tokens {[row[:8] for row in batch]}"

    def _run_epoch(self, **options: Any) -> None:
        """An epoch of the library's loop, unless a checkpoint of the last step was loaded: it would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**options)


class OnPolicyTrainer(DistillationTrainer):
    """TRL's, with an order of prompts that an epoch's number decides: so a start in the middle finds the same one."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler


class Progress(TrainerCallback):
    """A bar with the loss, in place of the library's lines."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_begin(self, _: Any, state: Any, *rest: Any, **options: Any) -> None:
        """Begin, perhaps in the middle."""
        self._bar = progress_bar(self.what, total=state.max_steps) if state.is_world_process_zero else None
        if self._bar is not None:
            self._bar.update(state.global_step)

    def on_step_end(self, _: Any, state: Any, *rest: Any, **options: Any) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, _: Any, state: Any, *rest: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        """A loss is known."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)

    def on_train_end(self, *rest: Any, **options: Any) -> None:
        """End."""
        if self._bar is not None:
            self._bar.close()


class Stop(TrainerCallback):
    """Where the user asks to stop (Ctrl-C, or SIGTERM), save and stop after the step; a second time, stop at once."""

    asked = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._set(dict.fromkeys(self._before, self._ask))
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        self._set(self._before)

    def _set(self, handlers: Mapping[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_step_end(self, _: Any, __: Any, control: Any, **options: Any) -> None:
        """A step is done; all processes stop after the same one, whichever of them was asked."""
        state = PartialState()
        asked = torch.tensor(float(self.asked), device=state.device)
        if state.num_processes > 1:
            asked = reduce(asked, reduction="sum")
        self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


def checkpoints(folder: Path) -> str:
    """Where a stage that writes `folder` keeps its checkpoints."""
    return str(folder / KEPT / "checkpoints")


def train(trainer: Trainer, stage: str, run: Run, folder: Path) -> None:
    """Train, from the last checkpoint where there is one, and save the model and the losses into `folder`.

    Raises:
        RecipeError: where the loss is lost.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(stage))
    trainer.add_callback(Sealed())
    with Stop() as stop:
        trainer.add_callback(stop)
        try:
            result = trainer.train(resume_from_checkpoint=_last_whole(Path(str(trainer.args.output_dir))))
        except NotFinite as error:
            raise RecipeError(f"{stage}: {error}") from error
    if stop.asked:
        raise KeyboardInterrupt
    if trainer.is_fsdp_enabled:  # whole weights, whatever the topology's file says of checkpoints
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if run.is_main:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle
        history = [{k: v for k, v in log.items() if k in ("step", "loss")} for log in trainer.state.log_history]
        write_text(folder / "losses.json", json.dumps([log for log in history if "loss" in log]) + "\n")
        losses = [log["loss"] for log in history if "loss" in log] or [result.training_loss]
        run.say(f"{stage}: {result.global_step} steps, training loss {sum(losses) / len(losses):.4f}")


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that is as it was written; what is not is taken away."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if _is_whole(path):
            return str(path)
        print(f"{path.name} is damaged or was not finished: training continues from the one before it")
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are those that `Sealed` saw."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        return bool(seal) and all(Digests().of_file(checkpoint / name) == digest for name, digest in seal.items())
    except (OSError, ValueError, AttributeError):
        return False


class Sealed(TrainerCallback):
    """Writes the digests of a checkpoint's files beside them, when it is whole."""

    def on_save(self, args: Any, state: Any, *rest: Any, **options: Any) -> None:
        """A checkpoint is written, by all processes."""
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_text(folder / SEAL, json.dumps(Digests().of_folder(folder)))


def same_vocabulary(recipe: Recipe, method: str, draft: Any, target: Any, logits: tuple[int, int]) -> None:
    """Raise RecipeError unless distributions over the next token can be compared.

    Args:
        draft, target: their tokenizers.
        logits: the widths of their logits.
    """
    if draft.get_vocab() != target.get_vocab() or logits[0] != logits[1]:
        raise RecipeError(
            f"{method} compares distributions over the next token, and the draft {recipe.draft} ({len(draft)} tokens, "
            f"{logits[0]} logits) has another vocabulary than the target {recipe.target} ({len(target)} tokens, "
            f"{logits[1]} logits): use distill.method=sequence or gold and align.method=dpo, or make the draft "
            "from the target (draft: {layers: N})"
        )


def training_kind(trainer: type) -> type:
    """One of TRL's trainers with the guards in front."""
    return type(trainer.__name__, (Guarded, trainer), {})
