"""A call in a thread of its own: for what may take too long, and for what starts threads of its own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def in_thread(call: Callable[[], T], seconds: float | None = None) -> T:
    """What a call returns, made in a thread that ends with it.

    On a CPU, each thread in which torch computes keeps helpers of OpenMP's. Where they are more than there are cores,
    they sleep between operations, which slows down small models most: so whoever computes once, such as to load a
    model, does it here, and the helpers end with the thread.

    Args:
        seconds: after which the call is stopped at its next step; None lets it take its time.

    Raises:
        TimeoutError: where it takes longer.
        BaseException: whatever it raises.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        if not outcome:  # too late, or Ctrl-C
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, result)
