"""Who may use a model: one pass at a time, and a compiler only while no other model is in use.

A pass changes a model for its duration (`parse.local.linear`) and writes into a cache that other texts share; a
compiler changes what all models share. So passes that several threads ask for wait for each other, and one warm-up
waits for another one before it takes a model's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_guard = RLock()
warming_up = RLock()  # of all models: whoever holds it may wait for the others while it holds a model's lock


def lock_of(model: nn.Module) -> Any:
    """The lock that whoever uses the model holds."""
    with _guard:
        return _locks.setdefault(model, RLock())


@contextmanager
def others_idle() -> Iterator[bool]:
    """Whether no other thread uses any model; if so, none begins to within."""
    with ExitStack() as held, _guard:
        idle = True
        for lock in list(_locks.values()):
            idle = idle and lock.acquire(blocking=False)
            if not idle:
                break
            held.callback(lock.release)
        yield idle
