"""Prompts of one's own: rows of a JSONL file, or of a data set on the Hugging Face hub.

A row holds `prompt` (text) or `messages` (turns that end with the user's), and may hold `system`, `reference` (the
right answer) and `split`. Without a split of its own a row belongs to one by the hash of its words, so the same prompt,
however it is spaced or capitalised, is never in two.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from parse.models import Messages

Prompt = str | Messages

FIELDS = ("prompt", "messages", "system", "reference", "split")


class Rows:
    """A task whose prompts are rows. Of each prompt the reference is known, or of none."""

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], source: str = "the data"
    ) -> None:
        """Read and check rows.

        Args:
            settings: the recipe's section `data`.
            source: what messages call the rows.

        Raises:
            ValueError: for a row that is no prompt, a prompt in two splits, or references in a part of the rows.
        """
        self.source, self.compare = source, _comparison(settings["check"])
        self.prompts: dict[str, list[Prompt]] = {split: [] for split in settings["shares"]}
        self.references: dict[str, str] = {}
        self.duplicates, found = 0, dict[str, str]()
        for number, row in enumerate(rows, 1):
            if settings["max_rows"] and len(found) == settings["max_rows"]:
                break
            row = _renamed(row, settings["fields"])
            prompt = _prompt_of(row, settings["system"], f"{source}, row {number}")
            split = row.get("split") or _split_of(prompt, settings["shares"])
            if split not in self.prompts:
                raise ValueError(f"{source}, row {number}: split is {split!r}; allowed: {', '.join(self.prompts)}")
            words = _words(key_of(prompt))
            if words in found:
                self.duplicates += 1
                if found[words] != split:
                    raise ValueError(
                        f"{source}, row {number}: the same prompt is in the splits {found[words]!r} and {split!r}: "
                        "keep it in one, or leave the field `split` out"
                    )
                continue
            found[words] = split
            self.prompts[split].append(prompt)
            if "reference" in row:
                self.references[key_of(prompt)] = str(row["reference"])
        if not found:
            raise ValueError(f"{source} holds no row: give at least one with `prompt` or `messages`")
        if self.references and len(self.references) < len(found):
            raise ValueError(
                f"{source}: {len(self.references)} of {len(found)} rows have a `reference`: give every row one, or "
                "none (then the target's own answers are what is right)"
            )

    @property
    def checks(self) -> bool:
        """Whether answers can be checked against references."""
        return bool(self.references)

    def draw_prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """So many prompts of a split or all there are, in an order that the seed decides."""
        prompts = list(self.prompts[split])
        random.Random(f"{split} {seed}").shuffle(prompts)
        return prompts[:count]

    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether a finished answer says what the reference says."""
        return self.compare(answer, self.references[key_of(prompt)])


def load_rows(source: str, settings: Mapping[str, Any]) -> Rows:
    """The task of a JSONL file, or of a hub data set (`org/name`).

    Raises:
        ValueError: for a file that is not there or a line that is no JSON object; and as `Rows` does.
    """
    if not source.endswith((".jsonl", ".json")):
        from datasets import load_dataset

        rows = load_dataset(source, settings["config"], split=settings["split"])
        return Rows(rows, settings, source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{source} is not there: give a JSONL file, a line a prompt")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Rows([_object(line, f"{source}, line {i}") for i, line in enumerate(lines, 1)], settings, source)


def key_of(prompt: Prompt) -> str:
    """A prompt as a key of a dictionary."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__}: write one object a line, such as {{'prompt': '...'}}")
    return row


def _renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The fields that a task reads, by their names here."""
    return {name: row[fields.get(name, name)] for name in FIELDS if row.get(fields.get(name, name)) is not None}


def _prompt_of(row: Mapping[str, Any], system: str | None, where: str) -> Prompt:
    """Text, or messages where a conversation or a system's turn is given."""
    messages, prompt, system = row.get("messages"), row.get("prompt"), row.get("system", system)
    if (messages is None) == (prompt is None):
        raise ValueError(
            f"{where} must hold `prompt` or `messages`, one of them; it holds {', '.join(row) or 'nothing'}"
        )
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: `prompt` must be text, and is {type(prompt).__name__}")
    if not (messages or (prompt or "").strip()):
        raise ValueError(f"{where}: the prompt is empty")
    if prompt is not None and system is None:
        return prompt
    turns: Messages = messages if messages is not None else [{"role": "user", "content": str(prompt)}]
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: `messages` must be a list of objects with `role` and `content`") from error
    if turns[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: `messages` ends with the assistant's turn: end with the turn that is to be answered"
        )
    if system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _split_of(prompt: Prompt, shares: Mapping[str, int]) -> str:
    """The split of a prompt, by the hash of its words."""
    digest = hashlib.sha256(_words(key_of(prompt)).encode()).digest()
    place = int.from_bytes(digest[:4], "big") % sum(shares.values())
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("shares cover every place")


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _comparison(check: str) -> Callable[[str, str], bool]:
    """How an answer is compared with a reference."""
    if check == "math":
        return _same_mathematics
    return {"contains": _contains, "equal": lambda a, b: _words(a) == _words(b), "number": _same_number}[check]


def _contains(answer: str, reference: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_words(reference))}(?!\w)", _words(answer)) is not None


def _same_number(answer: str, reference: str) -> bool:
    """Whether the last numbers of both are the same."""
    last = [re.findall(r"-?\d[\d,]*\.?\d*", text) for text in (answer, reference)]
    return all(last) and len({float(numbers[-1].replace(",", "")) for numbers in last}) == 1


def _same_mathematics(answer: str, reference: str) -> bool:
    """Whether the last formula of both is the same, by the library math-verify."""
    from math_verify import parse, verify

    return bool(verify(parse(reference), parse(answer)))
