"""The thread that runs an engine's rounds for all requests of a server.

The event loop must not wait for a pass, and the scheduler's lock is held during one: so it only puts requests into
queues, the scheduler's and this thread's, and what changed reaches them through a callback.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from parse.round import Round
from parse.scheduler import Scheduler, Steps, Task

T = TypeVar("T")
IDLE = 0.05  # seconds between looks at whether to stop, where nothing is asked


@dataclass(eq=False)
class Job(Generic[T]):
    """A coroutine of a request: an answer, or another look at the models."""

    steps: Steps[T]
    changed: Callable[[], None]  # called in the worker's thread: the answer has grown, or the job is done
    watched: Round | None = None  # the answer, where it is told while it grows
    tokens: int = 0  # of it; their text is made where it is told, as that takes time which the models would wait
    segments: int = 0  # of it that are settled
    task: Task[T] | None = field(default=None, repr=False)
    done: bool = False
    ended: float = 0.0  # when it was done, by `time.perf_counter`

    @property
    def failed(self) -> bool:
        """Whether it ended without a result."""
        return self.task is not None and self.task.failed

    @property
    def result(self) -> T:
        """What the coroutine returned.

        Raises:
            whatever it raised; `Cancelled` where it was cancelled.
        """
        assert self.task is not None
        return self.task.result


class Worker:
    """Runs jobs, at most so many at once, in the order in which they come."""

    def __init__(self, scheduler: Scheduler, at_once: int) -> None:
        self.scheduler, self.at_once, scheduler.max_running = scheduler, at_once, at_once
        self._inbox: queue.SimpleQueue[Job[Any]] = queue.SimpleQueue()
        self._jobs: list[Job[Any]] = []  # of this thread
        self.count = 0  # jobs that are not done; changed under the lock
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="parse-worker", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        return min(self.count, self.at_once)

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return max(self.count - self.at_once, 0)

    def submit(self, job: Job[Any]) -> None:
        """Queue a job; never waits."""
        with self._lock:
            self.count += 1
        job.task = self.scheduler.submit(job.steps, watched=job.watched is not None)  # which may end a long step for it
        self._inbox.put(job)

    def cancel(self, job: Job[Any]) -> None:
        """Stop a job that was submitted, at the end of the step that runs; never waits."""
        assert job.task is not None
        self.scheduler.cancel(job.task)

    def close(self) -> None:
        """End the thread; jobs that are left are cancelled."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping.is_set():
                self._take(wait=not self._jobs)
                if self._jobs:
                    self.scheduler.step()
                    self._tell()
        self._take(wait=False)
        for job in self._jobs:
            self.cancel(job)
        self._tell()

    def _take(self, wait: bool) -> None:
        """Take up what has come; where nothing runs, wait a moment for something."""
        try:
            self._jobs.append(self._inbox.get(timeout=IDLE) if wait else self._inbox.get_nowait())
            while True:
                self._jobs.append(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _tell(self) -> None:
        """Hand out what the last step has brought."""
        for job in self._jobs:
            assert job.task is not None
            done, before = job.task.done, (job.tokens, job.segments)
            if (answer := job.watched) is not None:
                job.tokens, job.segments = len(answer.ids), len(answer.segments)
            if done:
                job.ended = time.perf_counter()
                with self._lock:
                    self.count -= 1
            job.done = done  # last: whoever sees it finds all else in its place
            if done or (job.tokens, job.segments) != before:
                job.changed()
        self._jobs = [job for job in self._jobs if not job.done]
