"""What the terminal's command answers with: the models that are named, else those of a run folder.

All is checked before a model is loaded, and what is not there is refused with the option that names it. Nothing here
imports torch before it is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from parse.remote import is_address

if TYPE_CHECKING:
    from parse.engine import Engine

MODEL = "a folder that holds a model, a hub id such as org/name or gpt2, or a vLLM server, http://host:8000/v1#MODEL"
VERIFIER = '"prompt", "likelihood", or a folder that holds verifier.json'
RECORD = {"kind", "base", "tokenizer", "threshold"}  # what every verifier.json holds
OPTIONS = ("target_options", "draft_options")  # of `Engine.from_pretrained`, in a recipe's engine section
LARGE = 2**24  # bytes
EXPECTED = (OSError, ValueError, RuntimeError, ImportError)  # what libraries raise for what users can mend
AGAIN = "start `python -m train` with its recipe again"


def load(given: dict[str, Any]) -> tuple[Engine, dict[str, Any], str | None]:
    """The engine that a command's options name, arguments of `Engine.generate`, and where its verifier is.

    Args:
        given: the options by name; what is not given is the run's, or the engine's own.

    Raises:
        ValueError: for what is not there or not allowed, before a model is loaded; and where loading fails.
    """
    recipe = read_recipe(Path(given["run"])) if "run" in given else {}

    from parse.generation import Settings
    from parse.segments import check_segmenter

    names = {field.name for field in dataclasses.fields(Settings)}
    of_run = {"max_new_tokens"} if given.get("method") in ("target", "draft") else names  # alone: without rounds
    section = recipe.get("engine", {})
    chosen = {name: section[name] for name in of_run & section.keys()}
    chosen |= {name: given[name] for name in names & given.keys()}
    try:
        settings = Settings(**chosen)
    except TypeError as error:
        raise ValueError(f"a setting among {chosen} is of the wrong type: {error}") from error
    segments = given.get("segments")
    if segments is not None:
        check_segmenter(segments)
    needed = {"target": True, "draft": settings.method != "target" or settings.lookahead > 0}
    needed["verifier"] = settings.method == "parse"
    parts = {part: find(part, given, recipe) for part, need in needed.items() if need}
    options: dict[str, Any] = {**parts, **{name: without_code(section.get(name)) for name in OPTIONS}}
    options |= {f"{part}_options": _of_server(part, given, recipe) for part, name in parts.items() if is_address(name)}

    from parse.engine import Engine

    try:
        engine = Engine.from_pretrained(**options, segments=segments, compile=given.get("compile"))
    except Exception as error:  # of whatever kind a library raises for a file that it cannot read
        kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        raise ValueError(f"{', '.join(parts.values())}: loading fails: {kind}{error}") from error
    return engine, chosen, parts.get("verifier")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder, as plain data.

    Raises:
        ValueError: where there is none, or not at least `target`, `stages` and `engine` in it.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"--run {folder}: no recipe.yaml there; give a run folder (`make quickstart` makes one)")
    recipe: dict[str, Any] = {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        section = recipe["engine"]
        kinds = {"target": str, "stages": list, "engine": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(recipe[key], kind)]
        wrong += [f"engine.{key}" for key in OPTIONS if not isinstance(section.get(key) or {}, dict)]
        reason = f"{', '.join(wrong)} of the wrong type" if wrong else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f"no valid YAML: {error}"
    except KeyError as error:
        reason = f"the key {error} is missing"
    except (AttributeError, TypeError):
        reason = "no keys and values"
    if reason:
        raise ValueError(
            f"--run {folder}: its recipe.yaml is damaged ({reason}): {AGAIN}, or name the models themselves"
        )
    return recipe


def find(part: str, given: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The "target", the "draft" or the "verifier": what is given under that name, else what the run holds.

    Args:
        given: the command's options by name, "run" among them where there is a recipe.
        recipe: of the run; empty without one.

    Raises:
        ValueError: where none is named, or it is not there.
    """
    if part in given:
        name, what = given[part], f"--{part} {given[part]!r}"
    elif recipe:
        name = _of_run(part, Path(given["run"]), recipe)
        what = f"--run {given['run']}: its {part} {name!r}"
    else:
        raise ValueError(f"no {part} is named: give --run FOLDER, or --target with --draft and --verifier")
    if reason := (_missing_verifier if part == "verifier" else _missing_model)(name):
        raise ValueError(f"{what}: {reason}; give --{part} {VERIFIER if part == 'verifier' else MODEL}")
    return str(name)


def _of_server(part: str, given: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """How a server is asked for a run's model: the tokenizer is the run's own, wherever the server has its files."""
    if part != "target" or not recipe:
        return {}
    from parse.local.loading import base_of

    target = _of_run("target", Path(given["run"]), recipe)
    return {"tokenizer": str(base_of(target))} if not _missing_model(target) else {}


def without_code(options: dict[str, Any] | None) -> dict[str, Any]:
    """Options that a run loads a model with, but for leave to run the model's own code."""
    options = dict(options or {})
    if options.pop("trust_remote_code", None):
        warnings.warn("the run's trust_remote_code is left out: no model's own code is run", stacklevel=2)
    return options


def _of_run(part: str, folder: Path, recipe: dict[str, Any]) -> str:
    if part == "target":  # as seen from here, or from where training was started, somewhere above the run folder
        places = [start / recipe["target"] for start in (Path(), *folder.resolve().parents)]
        return next((str(place) for place in places if _holds_model(place)), recipe["target"])
    aligned = "align" in recipe["stages"]
    made, stage = {"draft": ("draft-lora", "align") if aligned else ("draft", "distill")}.get(part, (part, part))
    if not (folder / made).is_dir():
        raise ValueError(
            f"--run {folder}: no {made}/ there, for its stage `{stage}` is not done: {AGAIN}, which does what is "
            f"missing, or give --{part}"
        )
    if reason := _damage(folder, made, stage):
        raise ValueError(f"--run {folder}: {reason}; remove the folder {folder / made} and {AGAIN}, or give --{part}")
    return str(folder / made)


def _damage(run: Path, made: str, stage: str) -> str | None:
    """Which file is not as the stage wrote it, by the run's record; large files are looked for only."""
    try:
        wrote = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["stages"][stage]["wrote"]
        paths = [(run / made / name, digest) for name, digest in wrote.items() if not name.endswith((".md", ".html"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for path, digest in paths:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size < LARGE and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{path} is damaged"
    return None


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


def _missing_model(name: str) -> str | None:
    """Why no model is to be had by that name; None where one is, as a folder here or from the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]
    from transformers.utils.hub import cached_file

    if is_address(name):  # a server, which is asked when the engine is made
        return None
    if Path(name).is_dir():
        return None if _holds_model(Path(name)) else "this folder holds no config.json"
    try:
        validate_repo_id(name)
        cached_file(name, "config.json")
    except HFValidationError:
        return "no such folder is here, and a hub id has another form"
    except (OSError, ValueError) as error:
        return f"no such folder is here, and the hub does not give it ({error})"
    return None


def _missing_verifier(name: str) -> str | None:
    """Why no verifier is to be had by that name; None where one is."""
    path = Path(name) / "verifier.json"
    if name in ("prompt", "likelihood"):
        return None
    if not path.is_file():
        return "no such verifier is here"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        record = None
    sound = isinstance(record, dict) and record.keys() >= RECORD
    return None if sound else f"{path} is damaged (the stage `verifier` writes it anew where the folder is removed)"
