"""The run folder: resolved recipe, provenance, and which stages are done.

A stage writes into a temporary folder that takes its final name when it is whole, so a stage killed at any moment
leaves nothing half-written; the next start of the same recipe finds what it kept there and continues. A stage is
skipped where all that it depends on is as it was: its part of the recipe, and the content of the data, the models and
the earlier stages' files that it reads. What a stage wrote is recorded file by file: damage is found before it is used,
and nothing that is not the run's own is deleted. With several processes one of them names and records.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from recipes.dependencies import Dependencies
from recipes.digests import Digests, of_values
from recipes.files import files_in, replace_folder, set_rights, write_text
from recipes.machine import environment, gpu_memory
from recipes.schema import Recipe, RecipeError, to_dict
from recipes.secrets import without_secrets
from recipes.strict import dump, parse

T = TypeVar("T")
FOLDERS = {
    "answers": "answers",
    "distill": "draft",
    "rollouts": "rollouts",
    "align": "draft-lora",
    "relabel": "rollouts-aligned",
    "verifier": "verifier",
}
BEGINNING = {".lock", ".provenance.json.part"}  # what a start may leave that is killed as it begins
UNREAD = {".md", ".html"}  # files of a stage that are for people alone
CACHED = "cache-*.arrow"  # what the library `datasets` leaves beside a data set that it has worked on
KEPT = ".kept"  # in a stage's scratch folder: what it resumes from where it was killed


class Run:
    """A run folder and what is in it; one start at a time.

    Args:
        content_of_task: gives the digest of what a recipe's task asks and how it checks answers.

    Raises:
        RecipeError: where another start works in the folder, it is not a run's, or its record is damaged.
    """

    def __init__(self, recipe: Recipe, content_of_task: Callable[[Recipe], str]) -> None:
        self.recipe, self.folder = recipe, recipe.folder
        # the others wait while one process looks at large models
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=3))
        self.is_main = self._state.is_main_process
        self._digests = Digests(self.folder / ".digests.json")
        self._dependencies = Dependencies(recipe, self._digests, content_of_task, self._latest)
        self._by_main(self._begin)

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"{self.folder} cannot be made ({error.strerror}): set runs to a folder that can"
            ) from error
        found = sorted(path.name for path in self.folder.iterdir() if path.name not in BEGINNING)
        if found and not self._record_file.is_file():
            raise RecipeError(
                f"{self.folder} holds {', '.join(found[:3])} and no provenance.json, so it is not a run's folder: give "
                "this run another name, or move what is there"
            )
        self._lock()
        if not self._record_file.is_file():
            write_text(self._record_file, json.dumps({"stages": {}, "history": []}) + "\n")
        self._provenance()
        try:
            parse((self.folder / "recipe.yaml").read_text())
        except (OSError, ValueError):
            self._write_recipe()

    def _by_main(self, call: Callable[[], T]) -> T:
        """What a call gives on the main process, or its error, on every process."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [call(), None]
            except Exception as error:
                outcome = [None, error]
        if self._state.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    @property
    def _record_file(self) -> Path:
        return self.folder / "provenance.json"

    def _write_recipe(self) -> None:
        write_text(self.folder / "recipe.yaml", dump(without_secrets(to_dict(self.recipe))))

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
        """Whether the stage has run with this recipe, on the data, models and files that are there now.

        Raises:
            RecipeError: where what it wrote then is damaged.
        """
        return self._by_main(lambda: self._is_done(stage))

    def _is_done(self, stage: str) -> bool:
        content = self._dependencies.hash(stage)
        self._recorded_late(stage, content)
        if self._latest(stage).get("hash") != content or not self.path(stage).is_dir():
            return False
        self._check_whole(stage)
        return True

    def check_inputs(self, stage: str, others: Collection[str] = ()) -> None:
        """Raise RecipeError unless what a stage reads is there and whole, or `others` of this start write it."""

        def check() -> None:
            for earlier in self._dependencies.reads(stage):
                if earlier not in others and not self._is_done(earlier):
                    raise RecipeError(
                        f"the stage {stage!r} reads what {earlier!r} writes, and that has not run with this "
                        "recipe, data and models: name it too, or name no stage to run all"
                    )

        self._by_main(check)

    def check_outputs(self) -> None:
        """Raise RecipeError where files that finished stages wrote are missing or are not as they wrote them."""

        def check() -> None:
            for stage in self._provenance()["stages"]:
                if stage in FOLDERS and self.path(stage).is_dir():
                    self._check_whole(stage)

        self._by_main(check)

    def _check_whole(self, stage: str) -> None:
        folder, wrote = self.path(stage), self._latest(stage).get("wrote", {})
        for name, digest in wrote.items():
            path = folder / name
            if path.suffix in UNREAD:
                continue
            state = "missing" if not path.is_file() else "damaged" if self._digests.of_file(path) != digest else ""
            if state:
                raise RecipeError(
                    f"{path} is {state}: the stage {stage!r} wrote it otherwise. Restore it, or delete the folder "
                    f"{folder} and start again, and the stage runs again"
                )

    @contextlib.contextmanager
    def stage(self, stage: str) -> Iterator[Path]:
        """Run a stage's body with the folder to write; it takes its name when the body ends, on every process.

        What a killed start of the same stage and recipe kept under `KEPT` is still there.

        Raises:
            RecipeError: where something that is not the run's own stands in the way.
        """
        started = time.time()
        scratch = self.folder / f".{FOLDERS[stage]}.part"
        self._by_main(lambda: self._claim(stage, scratch))
        read = self._by_main(lambda: self._dependencies.of(stage))  # before: what it reads may change while it runs
        yield scratch
        self._state.wait_for_everyone()
        self._by_main(lambda: self._finish(stage, scratch, read, time.time() - started))

    def _finish(self, stage: str, scratch: Path, read: dict[str, Any], seconds: float) -> None:
        """Give a stage's folder its name, and record it; a kill in between is made good by `_recorded_late`."""
        self._check_own(stage)
        set_rights(scratch)
        made = {"hash": of_values([read]), "read": read, "wrote": self._files_of(scratch), "seconds": seconds}
        write_text(self._pending(stage), json.dumps(made))
        replace_folder(self.path(stage), scratch)
        self._record_stage(stage, made)
        self.log(stage, {"seconds": seconds, **gpu_memory()})

    def _names_of(self, folder: Path) -> list[str]:
        """The files of a stage, without those that it, or the library `datasets`, kept there for itself."""
        names = [path.relative_to(folder).as_posix() for path in files_in(folder)]
        return [name for name in names if not name.startswith(f"{KEPT}/") and not Path(name).match(CACHED)]

    def _files_of(self, folder: Path) -> dict[str, str]:
        """The digests of a stage's files, by name."""
        return {name: self._digests.of_file(folder / name) for name in self._names_of(folder)}

    def _record_stage(self, stage: str, made: dict[str, Any]) -> None:
        facts = {key: made[key] for key in ("hash", "read", "wrote")}
        self.record(stage, made["seconds"], facts)
        self._write_recipe()
        self._tidy_up(stage)

    def _tidy_up(self, stage: str) -> None:
        """Remove what a recorded stage needs no more."""
        shutil.rmtree(self.path(stage) / KEPT, ignore_errors=True)
        self._pending(stage).unlink(missing_ok=True)

    def _pending(self, stage: str) -> Path:
        """Where a stage's record stands while its folder takes its name."""
        return self.folder / f".{FOLDERS[stage]}.pending.json"

    def _recorded_late(self, stage: str, content: str) -> None:
        """Finish a stage that was killed when its files were whole and it was not recorded, or not tidied up."""
        made, folder = self._read_pending(stage), self.path(stage)
        if made.get("hash") == content and folder.is_dir() and made["wrote"] == self._files_of(folder):
            latest = self._latest(stage)
            recorded = all(latest.get(key) == made[key] for key in ("hash", "wrote"))
            self._tidy_up(stage) if recorded else self._record_stage(stage, made)

    def _read_pending(self, stage: str) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            made = json.loads(self._pending(stage).read_text())
            if isinstance(made, dict) and made.keys() >= {"hash", "read", "wrote", "seconds"}:
                return made
        return {}

    def _claim(self, stage: str, scratch: Path) -> None:
        """Make the scratch folder, with what is kept there where it is for the same content and nothing else."""
        self._check_own(stage)
        content = of_values([self._dependencies.of_kept(stage)])
        kept, stamp = scratch / KEPT, scratch / KEPT / "recipe.sha256"
        if not (stamp.is_file() and stamp.read_text(errors="replace") == content):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.unlink(missing_ok=True)
        for path in scratch.iterdir() if scratch.is_dir() else ():
            if path != kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept.mkdir(parents=True, exist_ok=True)
        write_text(stamp, content)

    def _check_own(self, stage: str) -> None:
        """Raise RecipeError where the stage's folder holds what no stage of this run wrote: it would be deleted."""
        provenance, folder = self._provenance(), self.path(stage)
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise RecipeError(
                f"{folder} is a link or a file, and the stage {stage!r} writes a folder of that name: move it away; "
                "for a larger disk, set runs to a folder there"
            )
        records = [*provenance["stages"].values(), *provenance["history"]]
        own = {name for record in records if record["stage"] == stage for name in record.get("wrote", {})}
        own |= self._read_pending(stage).get("wrote", {}).keys()
        found = self._names_of(folder)
        if foreign := [name for name in found if name not in own]:
            raise RecipeError(
                f"{folder} holds {', '.join(foreign[:3])}, which no stage of this run wrote, and the stage {stage!r} "
                "is about to write that folder anew: move it elsewhere"
            )

    def forget_models(self) -> None:
        """Look at models and data again: a stage may have written a model that others read."""
        self._dependencies.forget()

    def _provenance(self) -> dict[str, Any]:
        """The run's record: the latest of each stage under `stages`, those before under `history`."""
        try:
            content = json.loads(self._record_file.read_text())
            stages, history = content["stages"], content.get("history", [])
            records = [*stages.values(), *history]
            whole = all(isinstance(one["stage"], str) and isinstance(one.get("wrote", {}), dict) for one in records)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            whole, reason = False, f"{type(error).__name__}: {error}"
        else:
            reason = "a record without its stage or its files"
        if not whole:
            raise RecipeError(
                f"{self._record_file} is damaged ({reason}), and says which stages are done: restore it, or move the "
                f"folder {self.folder} away and start again"
            )
        return {"stages": stages, "history": history}

    def _latest(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = self._provenance()["stages"].get(stage, {})
        return found

    def record(self, stage: str, seconds: float, facts: dict[str, Any]) -> None:
        """Add to the run's record how a stage, or an evaluation, was made; on the main process."""
        if not self.is_main:
            return
        entry = {
            "stage": stage,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "argv": without_secrets(sys.argv),
            "recipe": without_secrets(to_dict(self.recipe)),
            **environment(),
            **without_secrets(facts),
        }
        provenance = self._provenance()
        if before := provenance["stages"].pop(stage, None):
            provenance["history"].append(before)
        provenance["stages"][stage] = entry
        write_text(self._record_file, json.dumps(provenance, indent=2) + "\n")
