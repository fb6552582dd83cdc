"""The run folder: resolved recipe, provenance, which stages are done, progress.

A stage writes into a temporary folder that takes its final name when it is whole, so a stage killed
at any moment leaves nothing half-written; the next start of the same recipe finds what it kept there and
goes on. A stage is skipped where its recipe section and everything before it are unchanged. Where there are
several processes they share the folder, and one of them names and records.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.utils import logging

from train.recipe import STAGES, Recipe, RecipeError, to_dict

SHARED = ("target", "draft", "task", "data", "segments", "seed")  # keys that every stage depends on
FOLDERS = {
    "answers": "answers",
    "distill": "draft",
    "rollouts": "rollouts",
    "align": "draft-lora",
    "relabel": "rollouts-aligned",
    "verifier": "verifier",
}
KEPT = ".kept"  # in a stage's scratch folder: what it goes on from where it was killed
SECRET_KEY = re.compile(r"(hub|access|auth|api|bearer)_?(token|key)$|secret|password", re.IGNORECASE)
SECRET = re.compile(r"\b(hf_|sk-|ghp_)[\w-]{8,}")
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


class Run:
    """A run folder and what is in it; one start at a time.

    Raises:
        RecipeError: where another start works in the folder.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, recipe.folder
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.is_main = self._state.is_main_process
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            write_text(self.folder / "recipe.yaml", yaml.safe_dump(without_secrets(to_dict(recipe)), sort_keys=False))
        self._state.wait_for_everyone()

    def _lock(self) -> None:
        """Keep the folder to this process until it ends, however it ends."""
        self._held = FileLock(self.folder / ".lock", is_singleton=True)
        try:
            self._held.acquire(blocking=False)
        except Timeout as error:
            raise RecipeError(
                f"{self.folder} is in use by another start: wait for it to end, stop it, or give this one a folder of "
                "its own (runs=OTHER)"
            ) from error

    def __enter__(self) -> Run:
        section = self.recipe.logging
        if self.is_main and section.wandb:
            import wandb

            identity = self.folder / ".wandb-id"  # stages that start by themselves log to the same run
            if not identity.is_file():
                write_text(identity, uuid.uuid4().hex[:8])
            wandb.init(
                project=section.project,
                name=section.name or self.recipe.name,
                mode=section.wandb,  # type: ignore[arg-type]  # the recipe has been checked
                id=identity.read_text(),
                resume="allow",
                dir=self.folder,
                config=without_secrets(to_dict(self.recipe)),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            if self.recipe.logging.wandb:
                import wandb

                wandb.finish()
            self._held.release()

    def log(self, stage: str, figures: dict[str, Any]) -> None:
        """Give figures of a stage to Weights & Biases, where the recipe asks for it."""
        if self.is_main and self.recipe.logging.wandb:
            import wandb

            wandb.log({f"{stage}/{name}": value for name, value in figures.items()})

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def path(self, stage: str) -> Path:
        """The folder that a stage writes."""
        return self.folder / FOLDERS[stage]

    def is_done(self, stage: str) -> bool:
        """Whether the stage has run with this recipe and all that comes before it."""
        record = self._provenance().get("stages", {}).get(stage, {})
        return record.get("hash") == self._hash(stage) and self.path(stage).is_dir()

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[Path]:
        """Run a stage's body with the folder to write; it takes its name when the body ends, on every process.

        What a killed start of the same stage and recipe kept under `KEPT` is still there.
        """
        started = time.time()
        scratch = self.folder / f".{FOLDERS[stage]}.part"
        if self.is_main:
            self._claim(scratch, self._hash(stage))
        self._state.wait_for_everyone()
        yield scratch
        self._state.wait_for_everyone()
        if self.is_main:
            shutil.rmtree(scratch / KEPT)
            shutil.rmtree(self.path(stage), ignore_errors=True)
            scratch.rename(self.path(stage))
            self._record(stage, time.time() - started)
            self.log(stage, {"seconds": time.time() - started, **_gpu_memory()})
        self._state.wait_for_everyone()

    def _claim(self, scratch: Path, content: str) -> None:
        """Make the scratch folder, with what is kept there where it is for the same content and nothing else."""
        kept, stamp = scratch / KEPT, scratch / KEPT / "recipe.sha256"
        if not (stamp.is_file() and stamp.read_text() == content):
            shutil.rmtree(scratch, ignore_errors=True)
        for path in scratch.iterdir() if scratch.is_dir() else ():
            if path != kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept.mkdir(parents=True, exist_ok=True)
        write_text(stamp, content)

    def _hash(self, stage: str) -> str:
        """The content that a stage's outcome depends on: its section and all earlier ones."""
        content = to_dict(self.recipe)
        order = [s for s in STAGES if s in FOLDERS]
        earlier = order[: order.index(stage) + 1]
        aligned = self.recipe.aligned
        kept = {key: content[key] for key in (*SHARED, *earlier) if key in content and (aligned or key != "align")}
        if aligned and "rollouts" in earlier:
            kept["pairs"] = self.recipe.align.prompts  # the rollouts are of these, and of no others
        kept["max_new_tokens"] = content["engine"]["max_new_tokens"]
        if stage == "verifier":
            kept |= {key: content["engine"][key] for key in ("policy", "handback")}  # a threshold is for these
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def _provenance(self) -> dict[str, Any]:
        path = self.folder / "provenance.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _record(self, stage: str, seconds: float) -> None:
        provenance = self._provenance() | {
            "argv": without_secrets(sys.argv),
            "git_commit": _git_commit(),
            "packages": {name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "hardware": hardware(),
        }
        record = {"hash": self._hash(stage), "seconds": round(seconds, 1)}
        provenance["stages"] = provenance.get("stages", {}) | {stage: record}
        write_text(self.folder / "provenance.json", json.dumps(provenance, indent=2) + "\n")


def without_secrets(content: Any) -> Any:
    """Plain data with what looks like a password or a token blotted out, by its key or by its own look."""
    if isinstance(content, dict):
        return {k: "[redacted]" if v and SECRET_KEY.search(k) else without_secrets(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [without_secrets(item) for item in content]
    if isinstance(content, str):
        key, equals, _ = content.partition("=")
        if equals and SECRET_KEY.search(key):
            return f"{key}=[redacted]"
        return SECRET.sub("[redacted]", content)
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text)
    scratch.replace(path)


def hardware() -> str:
    """The machine, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    return f"{os.cpu_count()} CPU cores, {model}, {torch.get_num_threads()} threads"


def _gpu_memory() -> dict[str, float]:
    """The most that was allocated on the GPU since it was last asked, GiB."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {"gpu_memory_gib": peak}


class _Lines(io.TextIOBase):
    """Where no terminal rewrites a line, each state of a progress bar takes a line of its own."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return sys.stderr.write(f"{line}\n") if line else 0


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar that estimates once there is something to go by: texts that begin together end together."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm formats the bar from."""
        values: dict[str, Any] = super().format_dict
        if 50 * values["n"] < (values["total"] or 0):
            values["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
        return values


def progress_bar(what: str, total: int) -> tqdm[Any]:
    """A progress bar with rate and remaining time; off a terminal, a line every ten seconds."""
    if sys.stderr.isatty():
        return _Bar(desc=what, total=total, mininterval=0.2, dynamic_ncols=True)
    return _Bar(desc=what, total=total, mininterval=10, maxinterval=10, ascii=True, ncols=100, file=_Lines())


def quieten() -> None:
    """Silence the libraries' own bars and notices, so that ours can be read."""
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)  # PEFT mends it itself


def _git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
