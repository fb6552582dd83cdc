"""A checker of one's own, for rows: `data.check: module:function`, of the working directory or what is installed.

    def check(prompt, answer):                 # rows without references
    def check(prompt, answer, reference):      # rows with; of several references any may be met
        return True or False

The module may define two functions more, which give labels that cost nothing (see `eval.tasks.Task`):
`first_wrong(prompt, answer)`, the index of the first wrong sentence of an answer or a prefix of one, or None; and
`corrupted(prompt, answer, rng)`, a right answer with a fault put in, or None.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class UserChecker:
    """A user's functions."""

    name: str  # module:function
    function: Callable[..., Any]
    first_wrong: Callable[..., int | None] | None
    corrupted: Callable[..., str | None] | None
    file: Path | None  # of the module, by whose content the checker is known

    def __call__(self, *given: Any) -> bool:
        """What the function says of prompt, answer and, where there is one, reference.

        Raises:
            ValueError: where that is neither True nor False.
        """
        said = self.function(*given)
        if type(said).__name__ not in ("bool", "bool_"):  # numpy's too
            raise ValueError(
                f"data.check={self.name} gives {said!r:.80} ({type(said).__name__}) for the prompt {given[0]!r:.80}: "
                "return True or False"
            )
        return bool(said)


def load_checker(name: str, references: bool) -> UserChecker:
    """The checker `module:function`.

    Args:
        references: whether the rows have any.

    Raises:
        ValueError: where there is no such module or function, or it does not take what it will be given.
    """
    module_name, _, function_name = name.partition(":")
    module = _import(name, module_name)
    functions = {key: value for key, value in vars(module).items() if callable(value) and not inspect.isclass(value)}
    if function_name not in functions:
        own = ", ".join(
            key for key, value in functions.items() if inspect.getmodule(value) is module and not key.startswith("_")
        )
        raise ValueError(f"data.check={name}: {module_name} has no function {function_name!r}; it has: {own or 'none'}")
    takes = ("prompt", "answer", "reference") if references else ("prompt", "answer")
    _check_takes(name, function_name, functions[function_name], takes)
    more = {"first_wrong": ("prompt", "answer"), "corrupted": ("prompt", "answer", "rng")}
    for key, given in more.items():
        if key in functions:
            _check_takes(name, key, functions[key], given)
    first_wrong, corrupted = (functions.get(key) for key in more)
    file = Path(module.__file__) if module.__file__ else None
    index = first_wrong and partial(_index, name, first_wrong)
    return UserChecker(name, functions[function_name], index, corrupted, file)


def _index(name: str, first_wrong: Callable[..., Any], prompt: Any, answer: str) -> int | None:
    """What the user's `first_wrong` says.

    Raises:
        ValueError: where that is neither an index nor None.
    """
    said = first_wrong(prompt, answer)
    if said is None or (isinstance(said, int) and not isinstance(said, bool) and said >= 0):
        return said
    raise ValueError(
        f"data.check={name}: first_wrong gives {said!r:.80} for the prompt {prompt!r:.80}: return the index of the "
        "first wrong sentence, from 0 on, or None"
    )


def _import(name: str, module_name: str) -> ModuleType:
    """The module, from the working directory first."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"data.check={name}: there is no module {module_name} in {here}, and none is installed: start where "
                f"{module_name.replace('.', '/')}.py lies, or name another"
            ) from error
        raise ValueError(f"data.check={name}: {module_name} cannot be imported: {error}") from error
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"data.check={name}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _check_takes(name: str, function_name: str, function: Callable[..., Any], given: tuple[str, ...]) -> None:
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        raise ValueError(
            f"data.check={name}: {function_name} is called with ({', '.join(given)}), and takes "
            f"{inspect.signature(function)}: {error}"
        ) from error
