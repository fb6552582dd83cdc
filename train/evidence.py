"""The evidence that trained verifiers learn from: packed passes over labelled drafts, whose states are kept on disk.

The states of thousands of drafts do not fit into memory. They are written to a file as float16, and tensors are views
of that file: the system loads pages when they are used and drops them when memory is short. Everything else about a
draft is one line of JSON. The states of a text that stands before several drafts are stored once. A start that was
killed resumes after the last whole line, with any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from eval.verifier_metrics import Draft, Example, examine, known_cuts
from parse import Engine
from parse.verifiers import Evidence, Needs
from parse.verifiers.heads import LARGEST
from recipes.digests import of_values
from recipes.progress import progress_bar

BYTES = 2  # a number of a state
FREE = ("log_prob", "entropy", "margin", "top")  # of each token, nats; the last one a logit

Place = tuple[int, int]  # first row and number of rows in a file of states
Record = dict[str, Any]  # what the index holds of a draft


def up_to_first_invalid(draft: Draft) -> Draft:
    """The draft up to and including its first invalid cut: later verdicts are never used."""
    known = known_cuts(draft.valid)
    end = draft.ends[known - 1]
    ended = draft.ended and known == len(draft.ends)
    return replace(draft, ids=draft.ids[:end], ends=draft.ends[:known], valid=draft.valid[:known], ended=ended)


def gather(engine: Engine, drafts: Sequence[Draft], needs: Needs, folder: Path, what: str) -> list[Example]:
    """The evidence of a packed pass over each draft, in the order of the drafts.

    Args:
        needs: what the passes give.
        folder: of such evidence; what is there already is not made again.
        what: the name on the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other in set(folder.parent.iterdir()) - {folder}:  # evidence of other layers
        shutil.rmtree(other, ignore_errors=True)
    store = EvidenceStore(folder)
    keys = [_key(draft) for draft in drafts]
    left = {key: draft for key, draft in zip(keys, drafts, strict=True) if key not in store.records}
    with progress_bar(what, total=len(left)) as bar, store:

        def keep(one: Example) -> Example:
            store.add(_key(one.draft), one)
            bar.update()
            return replace(one, evidence=_without_tensors(one.evidence))  # frees the pass's tensors

        for _ in examine(engine, list(left.values()), needs, then=keep):
            pass
    return [Example(draft, store.evidence(key, draft)) for key, draft in zip(keys, drafts, strict=True)]


class EvidenceStore:
    """Files of states, each with an index. Those of earlier starts are read; this start writes one pair of its own."""

    def __init__(self, folder: Path) -> None:
        self.records: dict[str, tuple[Path, Record]] = {}  # by draft's key: the file of its states, and its line
        for index in sorted(folder.glob("*.jsonl")):
            self._read(index)
        self._index = folder / f"{time.time_ns()}-{PartialState().process_index}.jsonl"
        self._mapped: dict[Path, Tensor] = {}  # float16 [numbers]
        self._rows = 0
        self._before: dict[str, Place] = {}  # by text before drafts: where its states are

    def __enter__(self) -> EvidenceStore:
        self._lines, self._states = self._index.open("w"), _states_of(self._index).open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._states.close()

    def add(self, key: str, one: Example) -> None:
        """Keep the evidence of a draft. Its line is written after its states, so that a whole line has them."""
        evidence = one.evidence
        line: Record = {"width": 0, "states": None, "context": None, "layers": evidence.layers}
        line |= {name: getattr(evidence, name).tolist() for name in FREE}
        if evidence.states is not None:
            line |= {"width": evidence.states.shape[1], "states": self._write(evidence.states)}
        if evidence.context_states is not None:
            before = of_values(one.draft.context_ids)
            if before not in self._before:
                self._before[before] = self._write(evidence.context_states)
            line["context"] = self._before[before]
        self._states.flush()
        self._lines.write(json.dumps([key, line]) + "\n")
        self._lines.flush()
        self.records[key] = (_states_of(self._index), line)

    def evidence(self, key: str, draft: Draft) -> Evidence:
        """What is kept of a draft; states are float16 views of a file."""
        path, line = self.records[key]
        free = {name: torch.tensor(line[name], dtype=torch.float32) for name in FREE}  # [M] each, top [N]
        states, context = (self._view(path, line[name], line["width"]) for name in ("states", "context"))
        return Evidence(draft.ends, **free, states=states, context_states=context, layers=tuple(line["layers"]))

    def _write(self, states: Tensor) -> Place:
        """Append states [rows, width]."""
        half = states.float().clamp(-LARGEST, LARGEST).to("cpu", torch.float16)  # [rows, width]
        self._states.write(half.contiguous().numpy().data)
        place = (self._rows, len(half))
        self._rows += len(half)
        return place

    def _view(self, path: Path, place: Place | None, width: int) -> Tensor | None:
        """States [rows, width] in a file."""
        if place is None:
            return None
        if path not in self._mapped:
            count = path.stat().st_size // BYTES  # shared: a private mapping must fit into memory
            self._mapped[path] = torch.from_file(str(path), shared=True, size=count, dtype=torch.float16)
        first, rows = place
        return self._mapped[path][first * width : (first + rows) * width].view(rows, width)

    def _read(self, index: Path) -> None:
        """Read the whole lines of an earlier start whose states are there too."""
        with contextlib.suppress(OSError):
            states = _states_of(index)
            size = states.stat().st_size
            for text in index.read_text(errors="replace").split("\n")[:-1]:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    key, line = json.loads(text)
                    places = [place for place in (line["states"], line["context"]) if place]
                    if all((first + rows) * line["width"] * BYTES <= size for first, rows in places):
                        self.records[key] = (states, line)


def _states_of(index: Path) -> Path:
    return index.with_suffix(".f16")


def _key(draft: Draft) -> str:
    """What the evidence of a draft depends on."""
    return of_values([draft.context_ids, draft.ids, draft.ends, draft.ended])


def _without_tensors(evidence: Evidence) -> Evidence:
    nothing = torch.empty(0)
    return Evidence(evidence.ends, nothing, nothing, nothing)
