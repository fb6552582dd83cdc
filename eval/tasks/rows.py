"""Prompts of one's own: rows of a JSONL file, or of a data set on the Hugging Face hub.

A row holds `prompt` (text) or `messages` (turns that end with the user's), and may hold `system`, `reference` (the
right answer, or a list of which any is right) and `split`. Without a split of its own a row belongs to one by the hash
of its words, so the same words, however they are spaced or capitalised, are never in two. If any prompt is a
conversation, all are: a column of a data set holds one type.

The questions of MT-Bench and Spec-Bench are read as they are: of a row's `turns`, which are the user's alone, the first
is asked, as the second follows an answer; their references, which some have and for two turns, are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answer_checks import CHECKS, check_reference
from eval.tasks.task import Prompt, Task
from eval.tasks.user_checker import load_checker
from parse.prompts import as_messages, checked_text, checked_turn, shown

FIELDS = ("prompt", "messages", "turns", "system", "reference", "split")
ROLES = ("system", "developer", "user", "assistant", "tool")


class Rows(Task):
    """A task whose prompts are rows. Of each prompt the reference is known, or of none."""

    def __init__(
        self, rows: Iterable[Mapping[str, Any] | None], settings: Mapping[str, Any], source: str = "the data"
    ) -> None:
        """Read and check rows.

        Args:
            rows: None is a blank line, which counts where messages number the rows.
            settings: the recipe's section `data`.
            source: what messages call the rows.

        Raises:
            ValueError: for a row that is no prompt, a prompt in two splits or with two references, a reference that
                the check cannot use, and references in a part of the rows.
        """
        self.source = source
        self.duplicates = 0  # rows that were left out, since an earlier one holds the same prompt
        distinct = self._distinct(rows, settings)
        if not distinct:
            raise ValueError(f"{source} holds no row: give at least one with `prompt` or `messages`")
        if 0 < (count := sum(bool(row.references) for row in distinct)) < len(distinct):
            raise ValueError(
                f"{source}: {count} of {len(distinct)} rows have a `reference`: give every row one, or none (then the "
                "target's own answers are what is right)"
            )
        conversations = any(not isinstance(row.prompt, str) for row in distinct)
        self.by_split: dict[str, list[Prompt]] = {split: [] for split in settings["shares"]}
        references: dict[str, tuple[str, ...]] = {}
        for row in distinct:
            prompt = as_messages(row.prompt) if conversations else row.prompt
            self.by_split[row.split].append(prompt)
            if row.references:
                references[key_of(prompt)] = row.references
        self.references = references
        self._check: str = settings["check"]
        self._checker = load_checker(self._check, bool(references)) if ":" in self._check else None  # the user's own
        if self._checker:
            self.first_wrong, self.corrupted = self._checker.first_wrong, self._checker.corrupted
        self.checks = bool(references or self._checker)

    def _distinct(self, rows: Iterable[Mapping[str, Any] | None], settings: Mapping[str, Any]) -> list[_Row]:
        """Rows of which no two hold the same prompt, and none contradicts another."""
        shares = settings["shares"]
        if min(shares.values(), default=0) < 0 or not sum(shares.values()):
            raise ValueError(f"data.shares is {dict(shares)}: give shares of 0 or more, and more than 0 in all")
        distinct, splits = dict[str, _Row](), dict[str, str]()
        for number, given in enumerate(rows, 1):
            if given is None:
                continue
            if settings["max_rows"] and len(distinct) == settings["max_rows"]:
                break
            where = f"{self.source}, row {number}"
            row = _read(given, settings, where)
            split = splits.setdefault(row.words, row.split)
            if split != row.split:
                raise ValueError(
                    f"{where}: the same prompt is in the splits {split!r} and {row.split!r}: keep it in one, or leave "
                    "the field `split` out"
                )
            first = distinct.setdefault(key_of(as_messages(row.prompt)), row)
            if set(first.references) != set(row.references):
                right, other = (" or ".join(map(repr, one.references)) or "none" for one in (first, row))
                raise ValueError(
                    f"{where}: the same prompt has the reference {right} in an earlier row, and {other} here: keep one "
                    "row, with a list of all right answers if there are several"
                )
            self.duplicates += first is not row
        return list(distinct.values())

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """See `Task`. Each has its place in the order by itself: one row more is one prompt more."""
        place = lambda prompt: hashlib.sha256(f"{split} {seed} {key_of(prompt)}".encode()).digest()
        return iter(sorted(self.by_split[split], key=place))

    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether a finished answer, without its thinking, says what the reference says, or one of a list of them."""
        if not self.references and self._checker:
            return self._checker(prompt, answer)
        references = self.references[key_of(prompt)]
        if self._checker:
            return any(self._checker(prompt, answer, reference) for reference in references)
        return any(CHECKS[self._check](answer, reference) for reference in references)

    def content(self) -> bytes:
        """See `Task`."""
        content = json.dumps([self._check, self.by_split, self.references], sort_keys=True).encode()
        return content + (self._checker.file.read_bytes() if self._checker and self._checker.file else b"")


def load_rows(source: str, settings: Mapping[str, Any]) -> Rows:
    """The task of a file of JSON objects, one per line or in one array, or of a hub data set (`org/name`).

    Raises:
        ValueError: for what cannot be read, naming the line or the settings; and as `Rows` does.
    """
    if source.endswith((".jsonl", ".json")):
        return Rows(list(_file_rows(source)), settings, source)
    return Rows(_hub_rows(source, settings), settings, source)


def key_of(prompt: Prompt) -> str:
    """A prompt as a key of a dictionary."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


# ---------------------------------------------------------------------------------------------------------------- files


def _file_rows(source: str) -> Iterator[dict[str, Any] | None]:
    """The objects of a file; None for a blank line, so that rows are numbered as lines are."""
    try:
        data = Path(source).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{source} is not there: give a JSONL file, one prompt per line") from error
    except OSError as error:
        raise ValueError(
            f"{source} cannot be read ({error.strerror}): give a JSONL file, one prompt per line"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}, line {number} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    if source.endswith(".json") and text.lstrip().startswith("["):
        for number, row in enumerate(_json(text, source, "the array"), 1):
            yield _object(row, f"{source}, row {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):  # not where `splitlines` does: JSON strings may hold U+2028
        where = f"{source}, line {number}"
        yield _object(_json(line, where, "one object per line"), where) if line.strip() else None


def _json(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read: write {wanted}") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): write {wanted}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{where} is {type(row).__name__}: write one object per line, such as {{"prompt": "..."}}')
    return row


def _hub_rows(source: str, settings: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    config, split = settings["config"], settings["split"]
    try:
        rows = load_dataset(source, config, split=split)
    except Exception as error:  # of the hub, of the network, of the files: each library has its own
        raise ValueError(
            f"task {source!r} cannot be read from the hub with data.config={config} and data.split={split}: "
            f"{type(error).__name__}: {error}"
        ) from error
    names = [settings["fields"].get(name, name) for name in FIELDS]
    if not {*names[:3]} & {*rows.column_names}:
        raise ValueError(
            f"{source} has the columns {', '.join(rows.column_names)}, and neither `{names[0]}` nor `{names[1]}`: say "
            "which holds the prompts, as data.fields={prompt: NAME}"
        )
    return rows.select_columns([name for name in rows.column_names if name in names])  # others may be images


# ----------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Row:
    """What a row says."""

    prompt: Prompt
    words: str  # of the prompt: prompts with the same words are in one split
    split: str
    references: tuple[str, ...]  # each is right; none: nothing is known


def _read(row: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> _Row:
    names = {name: settings["fields"].get(name, name) for name in FIELDS}
    fields = {name: row[theirs] for name, theirs in names.items() if row.get(theirs) is not None}
    if "turns" in fields and not {"prompt", "messages"} & fields.keys():
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: `{names['turns']}` must be a list of the user's texts, and is {shown(turns)}")
        fields = {name: fields[name] for name in fields.keys() & {"system", "split"}} | {"prompt": turns[0]}
    if ("messages" in fields) == ("prompt" in fields):
        raise ValueError(
            f"{where} must hold `{names['prompt']}` or `{names['messages']}`, one of them; it holds "
            f"{', '.join(map(_name, row)) or 'nothing'}"
        )
    prompt = _prompt_of(fields, settings["system"], where)
    words, shares = words_of(prompt), settings["shares"]
    split = fields["split"] if "split" in fields else split_of(words, shares)
    if not isinstance(split, str) or split not in shares:
        raise ValueError(f"{where}: split is {split!r}; allowed: {', '.join(shares)}")
    references = _references(fields["reference"], settings["check"], where) if "reference" in fields else ()
    return _Row(prompt, words, split, references)


def _prompt_of(fields: Mapping[str, Any], system: str | None, where: str) -> Prompt:
    """Text, or messages where a conversation or a system's turn is given."""
    system = checked_text(fields.get("system", system or ""), f"{where}: `system`")
    if "prompt" in fields:
        if isinstance(fields["prompt"], list):
            raise ValueError(
                f"{where}: `prompt` must be text: name a list of turns `messages`, or say so in data.fields"
            )
        prompt = checked_text(fields["prompt"], f"{where}: `prompt`")
        turns = as_messages(prompt)
    else:
        prompt, messages = None, fields["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{where}: `messages` must be a list of one turn or more, and is {shown(messages)}")
        turns = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(messages, 1)]
    if turns[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{where}: `messages` ends with the {turns[-1]['role']}'s turn: end with the turn that is to be answered"
        )
    if not turns[-1]["content"].strip():
        raise ValueError(f"{where}: the prompt is empty")
    told = turns[0]["role"] in ("system", "developer")
    if told and fields.get("system"):
        raise ValueError(f"{where} has a `system`, and `messages` that begin with another: keep one of them")
    if system and not told:
        return [{"role": "system", "content": system}, *turns]
    return turns if prompt is None else prompt


def _turn(turn: Any, where: str) -> dict[str, str]:
    """Role and content of a turn, whose content may be given in parts."""
    if isinstance(turn, Mapping):
        if turn.get("role") not in ROLES:
            raise ValueError(f"{where}: `role` is {shown(turn.get('role'))}; allowed: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise ValueError(
                f"{where} calls a tool, which is not supported: leave the row out, or write the call as text"
            )
    return checked_turn(turn, where)


def _name(field: Any) -> str:
    """A field's name in a message, which must be printable."""
    return str(field) if str(field).isprintable() else ascii(field)


def _references(value: Any, check: str, where: str) -> tuple[str, ...]:
    """The right answers that a row gives: text or numbers, one or a list."""
    if value == []:
        raise ValueError(f"{where}: `reference` is an empty list: give the right answers, or no reference to any row")
    texts = tuple(_reference(one, where) for one in (value if isinstance(value, list) else [value]))
    for text in texts:
        try:
            if ":" not in check:
                check_reference(check, text)
        except ValueError as error:
            raise ValueError(f"{where}: `reference` {error}") from error
    return texts


def _reference(value: Any, where: str) -> str:
    if isinstance(value, str):
        return checked_text(value, f"{where}: `reference`")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as a column of numbers that are not all whole gives them
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value in (math.inf, -math.inf)
        or value != value
    ):
        raise ValueError(f"{where}: `reference` is {shown(value)}: write it as text, as a right answer would say it")
    return str(value)


def split_of(words: str, shares: Mapping[str, int]) -> str:
    """The split of a prompt, by the hash of its words."""
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") % sum(shares.values())
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("shares cover every place")


def words_of(prompt: Prompt) -> str:
    """What is said, however it is spaced, capitalised and encoded."""
    texts = [unicodedata.normalize("NFKC", turn["content"]).casefold() for turn in as_messages(prompt)]
    return "\n".join(" ".join(text.split()) for text in texts)
