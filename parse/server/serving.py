"""An engine behind a server: what requests may ask of it, and how they wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from parse.engine import Engine
from parse.generation import Generation, Settings
from parse.round import NoRoom, Round
from parse.scheduler import Steps
from parse.server import protocol
from parse.server.metrics import Expected, Metrics
from parse.server.protocol import Refused
from parse.server.worker import Job, Worker

T = TypeVar("T")
log = logging.getLogger("parse.server")
Leaving = Callable[[], Coroutine[Any, Any, None]]  # waits until the client closes the connection


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how much may wait."""

    at_once: int = 16  # answers that are written at a time
    queue: int = 256  # answers that may wait; more: status 429
    body: int = 2**22  # bytes; more: 413
    prompt: int | None = None  # tokens; more: 400, as where the context leaves no room
    n: int = 16  # choices of a prompt; more: 422
    seconds: float = 600  # of a request; longer: 504


class Serving:
    """An engine, the name that clients know it by, and the requests that it answers."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        defaults: dict[str, Any] | None = None,
        limits: Limits | None = None,
        expected: Expected | None = None,
    ) -> None:
        """Set up.

        Args:
            defaults: arguments of `Engine.generate` for what a request does not say.
            expected: what calibration's test measured, see `Metrics`.
        """
        self.engine, self.name, self.defaults = engine, name, dict(defaults or {})
        self.limits, self.started = limits or Limits(), int(time.time())
        self.metrics = Metrics(name, expected)
        self.worker = Worker(engine.scheduler, self.limits.at_once)
        self.closing, self._preparing = False, 0  # answers that are about to be submitted

    def close(self) -> None:
        """Stop answering."""
        self.closing = True
        self.worker.close()

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not served."""
        if model is not None and model != self.name:
            raise Refused(404, f"the model {model!r} is not served here: use {self.name!r}", "model", "model_not_found")

    @property
    def context_length(self) -> int | None:
        """The tokens of the target's longest text."""
        return self.engine.models["target"].context_length

    def check_tokens(self, ids: Sequence[int], name: str) -> None:
        """Refuse tokens that the target does not know."""
        try:
            self.engine.models["target"].check_tokens(ids)
        except ValueError as error:
            raise Refused(400, str(error), name) from error

    def check(self, asked: protocol.Request, prompts: int) -> None:
        """Refuse another model, too many choices, and more than may wait."""
        self.check_model(asked.model)
        choices, limits = asked.n or 1, self.limits
        if choices > limits.n:
            raise Refused(422, f"n={choices}: at most {limits.n} choices are given here", "n")
        if self.closing:
            raise Refused(503, "the server is about to stop")
        if not self.worker.alive:
            raise Refused(503, "the server answers nothing any more: its log says why")
        if (more := choices * prompts) > limits.at_once + limits.queue:
            raise Refused(422, f"{more} answers are asked for, and at most {limits.at_once + limits.queue} are at once")
        if self.worker.count + self._preparing + more > limits.at_once + limits.queue:
            waiting = max(self.worker.count + self._preparing - limits.at_once, 0)
            raise Refused(429, f"{waiting} answers wait, and at most {limits.queue} may: try later")

    def as_calibrated(self, asked: protocol.Request, limit: int | None) -> bool:
        """Whether nothing is asked for that the verifier was not calibrated with, such as an answer cut short.

        Args:
            limit: tokens of an answer; None for the server's own.
        """
        own = int(self.defaults.get("max_new_tokens", Settings.max_new_tokens))
        return asked.as_calibrated and (limit is None or limit >= own)

    async def rounds(self, asked: protocol.Request, prompts: Sequence[Any], raw: bool) -> list[Round]:
        """The answers that a request asks for: of each prompt all choices. Other requests go on meanwhile.

        Raises:
            Refused: for settings or a prompt that the engine refuses.
        """
        places = len(prompts) * (asked.n or 1)  # which nobody else may take meanwhile
        self._preparing += places
        try:
            return await asyncio.to_thread(self._rounds, asked, prompts, raw)
        finally:
            self._preparing -= places

    def _rounds(self, asked: protocol.Request, prompts: Sequence[Any], raw: bool) -> list[Round]:
        made, field, most = list[Round](), "prompt" if raw else "messages", self.limits.prompt
        try:
            settings = [self.engine.settings(**asked.settings(self.defaults, choice)) for choice in range(asked.n or 1)]
            for prompt in prompts:
                first = self.engine.request(prompt, settings[0], raw)
                length = len(first.prompt_ids)
                if most is not None and length > most:
                    message = f"a prompt has {length} tokens, and at most {most} are read here"
                    raise Refused(400, message, field, "context_length_exceeded")
                self.metrics.prompt(length)
                made += [first, *(self.engine.again(first, each) for each in settings[1:])]
        except NoRoom as error:
            raise Refused(400, str(error), field, "context_length_exceeded") from error
        except ValueError as error:
            raise Refused(400, str(error), _field_of(str(error))) from error
        return made

    async def run(self, steps: Sequence[Steps[T]], leaving: Leaving, as_calibrated: bool = False) -> list[T]:
        """What coroutines return, once all are finished; see `changes`."""
        change = asyncio.Event()
        jobs = self.start([Job(each, waking(change)) for each in steps])
        async with aclosing(self.changes(jobs, change, leaving, as_calibrated)) as changes:
            async for _ in changes:
                pass
        return [job.result for job in jobs]

    def start(self, jobs: list[Job[T]]) -> list[Job[T]]:
        """Queue jobs, at once after `rounds`, so that nobody else takes their places; see `changes`."""
        for job in jobs:
            self.worker.submit(job)
        return jobs

    def cancel(self, jobs: Sequence[Job[Any]]) -> None:
        """Stop what still runs of them."""
        for job in jobs:
            self.worker.cancel(job)

    async def changes(
        self, jobs: Sequence[Job[Any]], change: asyncio.Event, leaving: Leaving, as_calibrated: bool = False
    ) -> AsyncGenerator[None, None]:
        """Wait for jobs that were started, and yield whenever one has changed, until all are done.

        They are cancelled where the client goes away, the time is over, or the generator is closed.

        Args:
            as_calibrated: see `Metrics.finished`.

        Raises:
            Refused: where one of them broke or took too long.
            Gone: where the client is gone.
        """
        started, left = time.perf_counter(), asyncio.ensure_future(leaving())
        left.add_done_callback(lambda _: change.set())
        try:
            while not all(job.done for job in jobs):
                rest = started + self.limits.seconds - time.perf_counter()
                if rest <= 0:
                    raise Refused(504, f"the answer took longer than {self.limits.seconds:g} s")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest):
                        await change.wait()
                change.clear()
                if left.done():
                    raise Gone
                yield
            yield  # whoever looked just before the last change
        finally:
            left.cancel()
            self.cancel(jobs)
        for job in jobs:
            try:
                answer = job.result
            except Exception as error:  # of whatever kind: it ends this request alone
                log.error("an answer failed", exc_info=error)
                raise Refused(500, f"the answer failed: {type(error).__name__}: {error}") from error
            if isinstance(answer, Generation):
                self.metrics.finished(answer, job.ended - started, as_calibrated)


def _field_of(message: str) -> str | None:
    """The request's field that the engine refuses, whose messages begin with the setting: NAME=VALUE."""
    name = message.partition("=")[0]
    if name in protocol.Switches.model_fields:
        return f"parse.{name}"
    name = {"max_new_tokens": "max_tokens"}.get(name, name)
    return name if name in protocol.Request.model_fields else None


def waking(change: asyncio.Event) -> Callable[[], None]:
    """Sets an event of the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # of a loop that is closed: nobody waits any more
            loop.call_soon_threadsafe(change.set)

    return wake
