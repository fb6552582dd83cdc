"""Verifiers of a target on a server: which kinds it can give, and whether it is the target that they were made for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parse.remote.client import Refused
from parse.remote.model import RemoteModel
from parse.sampling import Written
from parse.scheduler import run
from parse.verifiers import Folded, Verifier
from parse.verifiers.saved import load

APART = 0.1  # mean difference of confidences that other floating-point types explain
FOLD = "run `python -m parse fold RUN FOLDER`, and serve that folder"


def served_verifier(name: str | Path, target: RemoteModel) -> Verifier:
    """A verifier by its name or folder, for a target on a server.

    A server shows no weights. So a saved verifier keeps some drafts with the confidences that its target gave, and the
    server has to give about the same.

    Raises:
        ValueError: for a kind that no server can give, or a server that has another target.
    """
    verifier = load(name, None, target.tokenizer, target.eos_ids)
    if isinstance(verifier, Folded):
        if "rises" not in target.provides:
            raise ValueError(f"{target.name} has no rows of a folded verifier, as {name} needs: {FOLD}")
        if not {*verifier.labels} <= target.forbidden:
            raise ValueError(
                f"{target.name} has {len(target.forbidden)} rows of a folded verifier, and {name} has "
                f"{len(verifier.labels)}: {FOLD}"
            )
        verifier = replace(verifier, served=True)
    if verifier.calibration is not None:
        _check(verifier, json.loads((Path(name) / "verifier.json").read_text()).get("checks", []), target, str(name))
    return verifier


def _check(verifier: Verifier, checks: list[dict[str, Any]], target: RemoteModel, name: str) -> None:
    """Refuse a server that judges the verifier's own examples otherwise."""
    if not checks:
        raise ValueError(
            f"the verifier in {name} keeps no examples by which a server could be known: run the stage `verifier` again"
        )
    try:
        apart = sum(_apart(verifier, check, target) for check in checks) / len(checks)
    except Refused as error:
        raise ValueError(f"{target.name} cannot be asked for the verdicts of {name} ({error})") from error
    if apart > APART:
        raise ValueError(
            f"{target.name} is not the target of the verifier in {name}: on {len(checks)} of its examples the "
            f"confidences are {apart:.2f} away on average" + (f"; {FOLD}" if isinstance(verifier, Folded) else "")
        )


def _apart(verifier: Verifier, check: dict[str, Any], target: RemoteModel) -> float:
    """The mean difference of a server's confidences in an example from those that are kept."""
    sequence = target.open(check["prompt_ids"])
    draft = Written(check["draft_ids"], check["ended"])
    evidence = run(sequence.verify([], draft, check["ends"], verifier.needs))
    return float((verifier.confidences(evidence) - torch.tensor(check["confidences"])).abs().mean())
