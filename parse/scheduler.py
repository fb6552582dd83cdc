"""Many answers at once: a scheduler runs coroutines, and the work that they await at the same moment as one batch.

Coroutines, because a request then reads like the algorithm, is cancelled by closing it wherever it stands, streams by
being advanced step by step, and awaits a call to a server in the same words as a pass on this machine.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
MOMENT = 0.02  # seconds after which what was submitted or cancelled meanwhile is looked at, where all wait for calls
Steps = Coroutine[Any, Any, T]


class Work(Protocol):
    """What a coroutine awaits: one sequence's part in a batch that a runner runs."""

    @property
    def runner(self) -> Runner:
        """Who runs it."""
        ...


class Runner(Protocol):
    """Runs the work of many sequences as one batch."""

    def forward(self, works: Sequence[Any], alone: Callable[[], bool] | None = None) -> list[Any]:
        """Their outputs, in order.

        Args:
            alone: whether nobody else waits, so that each may do more than it was asked for; None where somebody does,
                or looks at one of them after each step.
        """
        ...


@dataclass(eq=False)
class Task(Generic[T]):
    """A coroutine that a scheduler runs."""

    steps: Steps[T]
    watched: bool = False  # somebody looks at it between its steps, so that they are kept small
    done: bool = False
    cancelled: bool = False  # to be closed as soon as nothing runs
    wanted: Work | Future[Any] | None = None  # what it awaits
    _result: T | None = field(default=None, repr=False)
    _error: BaseException | None = field(default=None, repr=False)

    @property
    def failed(self) -> bool:
        """Whether it ended without a result."""
        return self._error is not None

    @property
    def result(self) -> T:
        """What it returned.

        Raises:
            whatever it raised; `Cancelled` where it was cancelled.
        """
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def advance(self, output: Any = None, error: BaseException | None = None) -> None:
        """Run to the next await, or to the end."""
        self.wanted = None  # what was awaited is done, whatever happens now
        try:
            self.wanted = self.steps.throw(error) if error is not None else self.steps.send(output)
        except StopIteration as finished:
            self._finish(finished.value, None)
        except Exception as failure:
            self._finish(None, failure)
        except BaseException as stop:  # Ctrl-C, in the thread that happens to run this
            self._finish(None, Cancelled(f"stopped by {type(stop).__name__}"))
            raise

    def close(self) -> None:
        """Stop where it stands; nothing happens where it is done."""
        if not self.done:
            if isinstance(self.wanted, Future):
                self.wanted.cancel()
            self.steps.close()
            self._finish(None, Cancelled("this request was cancelled"))

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        self.done, self.wanted, self._result, self._error = True, None, result, error


@dataclass(frozen=True)
class Call:
    """A call that runs elsewhere, as in a thread that waits for a server; awaiting it gives its result."""

    future: Future[Any]

    def __await__(self) -> Generator[Future[Any], Any, Any]:
        return (yield self.future)


class Cancelled(Exception):
    """A request that was cancelled has no result."""


def _runner_of(task: Task[Any]) -> Runner | None:
    """Whose work a task awaits; None where it is done, or awaits a call."""
    return None if task.wanted is None or isinstance(task.wanted, Future) else task.wanted.runner


class Scheduler:
    """Runs tasks, at most so many at once; may be used from any number of threads.

    Whoever waits for a task runs steps for all. A task that fails or is cancelled leaves the others as they are.
    """

    def __init__(self, max_running: int = sys.maxsize) -> None:
        self.max_running = max_running
        self._waiting: deque[Task[Any]] = deque()
        self._running: list[Task[Any]] = []
        self._lock = RLock()
        self._stepping = False

    def submit(self, steps: Steps[T], watched: bool = False) -> Task[T]:
        """Queue a coroutine; it begins with the next step that has room for it."""
        task = Task(steps, watched)
        self._waiting.append(task)  # which needs no lock, and so waits for nobody's step
        return task

    def cancel(self, task: Task[Any]) -> None:
        """Stop a task, running or not: at once, or at the end of the step that another thread runs.

        It waits for no lock: an abandoned stream is cancelled by whatever thread collects it, amid whatever it does.
        """
        task.cancelled = True
        if self._lock.acquire(blocking=False):
            try:
                if not self._stepping:
                    task.close()
            finally:
                self._lock.release()

    def step(self) -> None:
        """Admit what there is room for, run one batch for each runner that somebody waits for, and advance the tasks.

        Where all of them wait for calls, this waits a moment for the first of these.
        """
        with self._lock:
            before, self._stepping = self._stepping, True
            try:
                self._step()
            finally:
                self._stepping = before
                for task in [*self._running, *self._waiting]:
                    if task.cancelled:
                        task.close()
                self._running = [task for task in self._running if not task.done]

    def _step(self) -> None:
        self._admit()
        calls = [task.wanted for task in self._running if isinstance(task.wanted, Future)]
        if calls and len(calls) == len(self._running) and not any(call.done() for call in calls):
            wait(calls, MOMENT, FIRST_COMPLETED)
        for task in self._running:
            if isinstance(task.wanted, Future) and task.wanted.done():
                self._take(task, task.wanted)
        runners = [_runner_of(task) for task in self._running]
        for runner in {id(runner): runner for runner in runners if runner}.values():
            self._run(runner, [task for task in self._running if _runner_of(task) is runner])

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            task = self._waiting.popleft()
            if not task.done:  # cancelled before it began
                self._running.append(task)
                task.advance()

    def _take(self, task: Task[Any], call: Future[Any]) -> None:
        try:
            output = call.result()
        except Exception as error:  # also that it was cancelled
            task.advance(error=error)
        else:
            task.advance(output)

    def _unfinished(self) -> int:
        return sum(not task.done for task in self._running)

    def _is_quiet(self) -> bool:
        """Whether nobody was submitted whom there is room for, or cancelled, since the step began."""
        admits = bool(self._waiting) and self._unfinished() < self.max_running
        return not admits and not any(task.cancelled for task in self._running)

    def _run(self, runner: Runner, tasks: list[Task[Any]]) -> None:
        alone = len(tasks) == self._unfinished() and not any(task.watched for task in tasks)
        try:
            outputs = runner.forward([task.wanted for task in tasks], self._is_quiet if alone else None)
        except Exception as error:
            for task in tasks:
                task.advance(error=error)
            return
        except BaseException:  # what it has done of the batch nobody knows
            for task in tasks:
                task.close()
            raise
        for task, output in zip(tasks, outputs, strict=True):
            task.advance(output)

    def wait(self, task: Task[T]) -> T:
        """A task's result; runs steps until it is there.

        Raises:
            whatever the task raised.
        """
        try:
            while not task.done:
                with self._lock:
                    if not task.done:
                        self.step()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            self.cancel(task)
            raise
        return task.result

    def run(self, steps: Steps[T]) -> T:
        """Run a coroutine to its end, beside whatever else runs."""
        return self.wait(self.submit(steps))

    def completed(self, steps: Iterable[Steps[T]], at_once: int) -> Generator[tuple[int, T], None, None]:
        """Run coroutines, so many at once, drawn as there is room for them; index and result of each as it finishes.

        Raises:
            whatever one of them raised; the others are cancelled, as they are where nobody listens any more.
        """
        source, running = enumerate(steps), dict[int, Task[T]]()
        try:
            while True:
                while len(running) < at_once and (entry := next(source, None)) is not None:
                    running[entry[0]] = self.submit(entry[1])
                if not running:
                    return
                with self._lock:
                    if not any(task.done for task in running.values()):
                        self.step()
                for index in [index for index, task in running.items() if task.done]:
                    yield index, running.pop(index).result
        finally:
            for task in running.values():
                self.cancel(task)

    def watch(self, steps: Steps[Any]) -> Iterator[None]:
        """Run a coroutine, in small steps, and yield after each; it is cancelled where nobody listens any more.

        Raises:
            whatever it raised.
        """
        task = self.submit(steps, watched=True)
        try:
            while not task.done:
                with self._lock:
                    if not task.done:
                        self.step()
                yield
            task.result  # noqa: B018  raises what it raised
        finally:
            self.cancel(task)


def run(steps: Steps[T]) -> T:
    """Run one coroutine to its end, alone."""
    return Scheduler().run(steps)


def run_together(steps: Iterable[Steps[T]], at_once: int) -> Generator[tuple[int, T], None, None]:
    """Run coroutines, so many at once, on their own; see `Scheduler.completed`."""
    return Scheduler().completed(steps, at_once)
