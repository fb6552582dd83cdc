"""python -m recipes.reference: docs/recipe.md, every key of a recipe, out of the schema's docstrings and comments."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from recipes import schema
from recipes.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Recipe reference

Written by `python -m recipes.reference` out of the schema in `recipes/`. One YAML file is one experiment.
`section.key=value` on the command line overrides it; an unknown key is an error that names the nearest one.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section("", schema.Recipe)])


def _section(name: str, cls: type, whole: Any = None) -> Iterator[str]:
    """A section's table, then those of the sections within.

    Args:
        whole: what the section holds where it is left out, if it may be.
    """
    hints, meanings = typing.get_type_hints(cls, include_extras=True), _meanings(cls)
    fields = dataclasses.fields(cls)
    prefix = f"{name}." if name else ""
    inner = {f.name: found for f in fields if (found := _dataclass_in(hints[f.name]))}
    yield f"## `{name}`" if name else "## The whole"
    yield ""
    yield (inspect.getdoc(cls) or "").replace("\n", " ")
    yield ""
    yield "| key | may be | default | meaning |"
    yield "|---|---|---|---|"
    for f in fields:
        words = _words(hints[f.name]).replace("|", "\\|")
        yield f"| `{prefix}{f.name}` | {words} | {_default(f, whole)} | {meanings.get(f.name, '')} |"
    yield ""
    for key, found in inner.items():
        made = next(f.default_factory for f in fields if f.name == key)
        yield from _section(f"{prefix}{key}", found, None if made is dataclasses.MISSING else made())


def _dataclass_in(hint: Any) -> type | None:
    """The section that a key holds, if it holds one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((each for each in options if dataclasses.is_dataclass(each) and isinstance(each, type)), None)


def _words(hint: Any) -> str:
    """What a key may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        whole = "whole " if arguments[0] is int else ""
        return " ".join(f"{whole}{limit}".replace("whole a number", "a whole number") for limit in arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_words(each) for each in arguments)
    if origin is list:
        return f"a list of: {_words(arguments[0])}"
    if origin is dict or hint is dict:
        return "keys and values"
    if dataclasses.is_dataclass(hint):
        return "a section"
    return {bool: "`true`, `false`", type(None): "`null`", str: "text", int: "a whole number", float: "a number"}[hint]


def _default(f: Any, whole: Any) -> str:
    """What a key is where it is left out, of itself or with its section."""
    if whole is not None:
        value = getattr(whole, f.name)
    elif f.default_factory is not dataclasses.MISSING:
        value = f.default_factory()
    elif f.default is dataclasses.MISSING:
        return "required"
    else:
        value = f.default
    if dataclasses.is_dataclass(value):
        return "see below"
    plain = {"None": "null", "True": "true", "False": "false"}
    return f"`{plain.get(str(value), value)}`"


def _meanings(cls: type) -> dict[str, str]:
    """The comments of a section's keys, its own before those of the section that it extends."""
    found: dict[str, str] = {}
    for base in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        body = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]  # type: ignore[attr-defined]
        for node in body:
            assert isinstance(node.target, ast.Name)
            lines = [line for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            last = node.end_lineno or node.lineno
            while last + 1 in comments and source.splitlines()[last].lstrip().startswith("#"):
                last += 1
                lines.append(last)
            if lines:
                found[node.target.id] = " ".join(comments[line] for line in lines).replace("|", "\\|")
    return found


if __name__ == "__main__":
    write_text(PAGE, page())
    print(PAGE, file=sys.stderr)
