"""Dataclasses from YAML, strictly: what is not plainly meant is an error that names it and what is allowed.

Of YAML there is what its versions and readers agree about. Plain scalars are what they are in JSON. What YAML 1.1 makes
of others (`5:50` is 350, `017` is 15, `no` is false) is an error, and so are a key that stands twice, anchors, tags and
deep nesting. What a field may hold its type says: `Annotated[int, Range(1, 9)]`, `Literal["a", "b"]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

DEEPEST = 20  # levels of nesting
LARGEST = 10**6  # bytes of a file
TEXT = "tag:yaml.org,2002:str"
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
JSON = re.compile(r"~?|null|Null|NULL|[tT]rue|TRUE|[fF]alse|FALSE|[-+]?(0|[1-9][0-9]{0,17})")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Range:
    """The least and the most that a number may be."""

    least: float
    most: float

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most

    def __str__(self) -> str:
        return f"a number from {self.least:,} to {self.most:,}"


@dataclass(frozen=True)
class Text:
    """A regular expression that the whole text matches, and the same in words."""

    pattern: str
    words: str

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text) is not None

    def __str__(self) -> str:
        return self.words


def parse(text: str) -> Any:
    """What a YAML document holds: dicts with text as keys, lists, text, finite numbers, booleans and None.

    Raises:
        ValueError: with the line and what is wrong there.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two from escapes beyond Unicode
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(place + shortened(reason, 400)) from error


def dump(content: Any) -> str:
    """Plain data as a YAML document, which `parse` reads back as the same."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False))


def shortened(text: str, most: int = 120) -> str:
    """A text as messages show it."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def build(cls: type, content: Any, section: str = "") -> Any:
    """A dataclass from what a document holds.

    Args:
        section: where in the recipe it stands, for messages.

    Raises:
        ValueError: for an unknown key, one that is missing, or a value that its field's type does not allow.
    """
    where = f"section {section!r}" if section else "the recipe"
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold keys and values, and holds {shortened(repr(content))}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise ValueError(f"unknown key {shortened(repr(key))} in {where}{_hint(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ValueError(f"{where} lacks the key {name!r}: add it")
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{section}." if section else ""
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in content.items()})


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Refuses nodes while it composes them."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise _problem(event, "anchors, aliases and tags are not allowed: write the value itself")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _problem(event, f"values are nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys([key for key, _ in node.value])
        elif isinstance(node, yaml.ScalarNode):
            if SURROGATE.search(node.value):
                raise _problem(node, "the text holds half of a character (\\ud800 to \\udfff)")
            if event.style is None and node.tag != TEXT and not _is_json(node.value):
                raise _problem(
                    node,
                    f"{shortened(node.value)} is read as different things: put it in quotes if it is text, else write "
                    "true, false, null or a decimal number (of at most 18 digits where it is an integer)",
                )
        return node


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Quotes whatever text `_Loader` would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write whatever stands twice twice."""
        return True


for _side in (_Loader, _Dumper):  # what other readers take for a number or a boolean, and this library for text
    for _tag, _pattern, _first in (
        ("float", rf"(?:{FLOAT.pattern})\Z", "-+.0123456789"),  # 1e-4
        ("int", r"[-+]?0o?[0-9]+\Z", "-+0"),  # 08, 0o17
        ("bool", r"[yYnN]\Z", "yYnN"),
    ):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _problem(at: Any, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _check_keys(keys: list[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        if key.tag != TEXT:
            raise _problem(key, "a key must be text: put it in quotes")
        if key.value in seen:
            raise _problem(key, f"the key {shortened(key.value)} stands here twice: leave one of them out")
        seen.add(key.value)


def _is_json(scalar: str) -> bool:
    """Whether a plain scalar is null, a boolean or a finite number to every reader."""
    return math.isfinite(float(scalar)) if FLOAT.fullmatch(scalar) else JSON.fullmatch(scalar) is not None


def _value(hint: Any, value: Any, key: str) -> Any:
    """A value as the hint wants it, or ValueError."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    hint = next((one for one in allowed if _fits(one, value)), None)
    if hint is None:
        names = " or ".join(map(_name_of, allowed))
        given = "null" if value is None else f"{shortened(repr(value))} ({type(value).__name__})"
        text = "str" in names.split() and type(value) in (bool, int, float)
        raise ValueError(f"{key} must be {names}, and is {given}{'; put text in quotes' if text else ''}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _value(hint, value, key)
    if origin is dict:
        return {_value(arguments[0], k, key): _value(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is list:
        items = [_value(arguments[0], item, key) for item in value]
        if not items or len({*items}) < len(items):
            raise ValueError(f"{key} is {shortened(repr(value))}: name one or more, each of them once")
        return items
    if origin is Literal and value not in arguments:
        raise ValueError(f"{key} names {shortened(repr(value))}{_hint(value, arguments)}")
    if origin is Annotated:
        kind, limit = arguments
        if value not in limit:
            raise ValueError(f"{key} is {shortened(repr(value))}: give {limit}")
        return kind(value)
    return value


def _kind(hint: Any) -> Any:
    """The plain type of what a hint allows."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return typing.get_args(hint)[0]
    if origin is Literal:
        return str
    return dict if dataclasses.is_dataclass(hint) else origin or hint


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of the right kind; an integer is a number too, and a truth value is none."""
    kind = _kind(hint)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def _name_of(hint: Any) -> str:
    """What a hint allows, in messages."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    kind = _kind(hint)
    return {types.NoneType: "null", dict: "keys and values", list: "a list"}.get(kind) or str(kind.__name__)


def _hint(name: str, allowed: typing.Iterable[str]) -> str:
    """What was perhaps meant, and what is allowed."""
    near = difflib.get_close_matches(name, allowed, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{meant} Allowed: {', '.join(allowed)}"


def read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a recipe's file.

    Raises:
        ValueError: naming the file.
    """
    what = f"recipe {shortened(str(path))}"
    if not os.path.isfile(path):
        near = ", ".join(str(p) for p in sorted(Path("recipes").glob("*.yaml"))) or "none here"
        raise ValueError(f"{what} is {'a folder' if os.path.isdir(path) else 'not there'}; recipes found: {near}")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        content = parse(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text from its byte {error.start} on: save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold keys and values, and holds {shortened(repr(content))}")
    return content


def set_value(content: dict[str, Any], override: str) -> None:
    """Set one value by `section.key=value`, in sections that are made where they are not there.

    Raises:
        ValueError: naming what was given.
    """
    what = f"override {shortened(repr(override))}"
    key, equals, value = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)) or len(sections) > DEEPEST:
        raise ValueError(f"{what} must read section.key=value, such as rollouts.train=100")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise ValueError(f"{what}: {shortened(repr(section))} is a value and has no keys")
    try:
        content[last] = parse(value)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
