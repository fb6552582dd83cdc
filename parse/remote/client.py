"""Talks with a vLLM server over its public HTTP interface; what fails on the way is tried again.

All requests of a server run in an event loop in a thread of its own. A coroutine of the scheduler awaits them as
`Call`s, so that many are on their way at the same time, beside passes on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, fields
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urldefrag

import httpx

from parse.scheduler import Call

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds before another try: doubled each time
BUSY = (408, 409, 425, 429)  # statuses, beside those from 500 on, after which another try may go better


class ServerError(RuntimeError):
    """A server refused a request, or could not be reached for long."""


class Refused(ServerError):
    """A server refused a request."""


@dataclass(frozen=True)
class Options:
    """How a server is asked; keys of `target_options` and `draft_options` of `Engine.from_pretrained`."""

    tokenizer: str | None = None  # folder or hub id with the model's tokenizer and configuration; None: as the server's
    concurrency: int = 64  # requests at once; more wait
    timeout: float = 600  # seconds without a byte, after which a request is tried again
    patience: float = 300  # seconds from the first failure on, through all tries, after which it is given up
    key_variable: str = "VLLM_API_KEY"  # the environment variable that holds the server's key, where it wants one

    @classmethod
    def of(cls, given: dict[str, Any] | None) -> Options:
        """The options that are given by name.

        Raises:
            ValueError: for one that is not known.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(given or {}) - set(names)):
            raise ValueError(f"unknown options {unknown} of a model on a server: use {', '.join(names)}")
        return cls(**(given or {}))


class Client:
    """One model of one server."""

    def __init__(self, url: str, options: Options) -> None:
        """Set up; nothing is asked yet.

        Args:
            url: http://host:port/v1#MODEL.
        """
        base, self.model = urldefrag(url)
        try:
            httpx.URL(base)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is no address ({error}): give one like http://host:8000/v1#MODEL") from error
        self.options, self.root = options, base.rstrip("/").removesuffix("/v1")
        self.url = f"{self.root}/v1"
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, name=f"client of {self.root}", daemon=True).start()
        key = os.environ.get(options.key_variable)
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(options.timeout, connect=10, pool=None),
            limits=httpx.Limits(max_connections=options.concurrency),
        )

    def call(self, steps: Coroutine[Any, Any, T]) -> Call:
        """Begin a coroutine in the client's loop; awaited in a scheduler's coroutine."""
        return Call(asyncio.run_coroutine_threadsafe(steps, self.loop))

    def ask(self, steps: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the client's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(steps, self.loop).result()

    async def get(self, path: str) -> httpx.Response:
        """A page of the server, whatever its status; tried again where the server is not there or busy."""
        return await self._tried(lambda: self._http.get(self.root + path))

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The reply to a request, whatever its status; tried again where the server is not there or busy."""
        return await self._tried(lambda: self._http.post(self.root + path, json={"model": self.model, **body}))

    async def posted(self, path: str, body: dict[str, Any]) -> Any:
        """The content of the reply to a request.

        Raises:
            Refused: where the server refuses it.
        """
        reply = await self.post(path, body)
        if reply.status_code != 200:
            raise self.refusal(reply)
        return reply.json()

    async def tokens(self, prompt: list[int], limit: int, settings: dict[str, Any]) -> AsyncIterator[list[int]]:
        """What the model writes after a prompt, some tokens at a time as they come, up to `limit` or a stop token.

        Where the connection breaks or the server restarts, it goes on after the tokens that have come.

        Raises:
            ServerError: where the server refuses the request, or is away for too long.
        """
        written, waits = 0, _Waits(self.options.patience)
        ids = list(prompt)
        while written < limit:
            body = {**settings, "prompt": ids, "max_tokens": limit - written, "stream": True, "return_token_ids": True}
            if "seed" in body:  # after a break the next tokens are drawn by other numbers than the first ones
                body["seed"] = (body["seed"] + written) % 2**31
            try:
                async for some, finished in self._stream(body):
                    written, waits = written + len(some), _Waits(self.options.patience)
                    ids += some
                    if some:
                        yield some
                    if finished:
                        return
                broken: Exception = httpx.RemoteProtocolError("the stream ended in the middle")
            except httpx.TransportError as error:
                broken = error
            except _Busy as error:
                broken = error
            await self._wait(waits, broken)

    def stream(self, prompt: list[int], limit: int, settings: dict[str, Any]) -> Stream:
        """`tokens`, begun at once, and read ahead of whoever takes them."""
        return Stream(self, self.tokens(prompt, limit, settings))

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[tuple[list[int], bool]]:
        """The tokens of each chunk of a completion, and whether it was the last one."""
        url, content = f"{self.url}/completions", {"model": self.model, **body}
        async with self._http.stream("POST", url, json=content) as reply:
            if reply.status_code != 200:
                await reply.aread()
                raise _Busy(reply) if _is_busy(reply) else self.refusal(reply)
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:  # the engine behind the server broke down
                    raise httpx.RemoteProtocolError(str(chunk["error"])[:300])
                for choice in chunk["choices"]:
                    reason = choice.get("finish_reason")
                    yield list(choice.get("token_ids") or []), reason in ("stop", "length")
                    if reason not in (None, "stop", "length"):  # the server is about to stop
                        raise httpx.RemoteProtocolError(f"the text was left ({reason})")

    async def _tried(self, request: Callable[[], Coroutine[Any, Any, httpx.Response]]) -> httpx.Response:
        waits = _Waits(self.options.patience)
        while True:
            try:
                reply = await request()
                if not _is_busy(reply):
                    return reply
                broken: Exception = _Busy(reply)
            except httpx.TransportError as error:
                broken = error
            await self._wait(waits, broken)

    async def _wait(self, waits: _Waits, broken: Exception) -> None:
        """Wait before another try.

        Raises:
            ServerError: where patience has run out.
        """
        seconds = waits.next(broken)
        if waits.is_over(seconds):
            reason = f"{type(broken).__name__}: {broken}".strip(": ")
            raise ServerError(
                f"{self.url} has failed for {self.options.patience:g} s ({reason:.300}): start the server, or "
                "mend the address; a longer wait is the option `patience`"
            ) from broken
        await asyncio.sleep(seconds)

    def refusal(self, reply: httpx.Response) -> Refused:
        """What to say of a request that the server refuses."""
        if reply.status_code in (401, 403):
            return Refused(f"{self.url} wants another key: set the environment variable {self.options.key_variable}")
        try:
            content = reply.json()
            reason = content.get("error", content)
            reason = reason.get("message", reason) if isinstance(reason, dict) else reason
        except ValueError:
            reason = reply.text
        return Refused(f"{self.url} refuses a request (status {reply.status_code}): {reason!s:.500}")


class Stream:
    """Tokens as they come from a server."""

    def __init__(self, client: Client, source: AsyncIterator[list[int]]) -> None:
        self._client, self._come = client, asyncio.Queue[list[int] | Exception | None]()
        self._reading = asyncio.run_coroutine_threadsafe(self._read(source), client.loop)

    async def _read(self, source: AsyncIterator[list[int]]) -> None:
        try:
            async for some in source:
                self._come.put_nowait(some)
        except Exception as error:  # is raised where the tokens are taken
            self._come.put_nowait(error)
        else:
            self._come.put_nowait(None)

    async def _next(self) -> list[int]:
        some = await self._come.get()
        if isinstance(some, Exception):
            raise some
        return some or []

    def next(self) -> Call:
        """The next tokens; none at the end."""
        return self._client.call(self._next())

    def close(self) -> None:
        """Let the server stop."""
        self._reading.cancel()


class _Busy(Exception):
    """The server has no time now, or is broken for a while."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(f"status {reply.status_code}: {reply.text[:200]}")
        self.after = reply.headers.get("retry-after", "")


def _is_busy(reply: httpx.Response) -> bool:
    return reply.status_code in BUSY or (reply.status_code >= 500 and reply.status_code != 501)


@dataclass
class _Waits:
    """How long to wait before each further try: longer each time, never to the same moment as others."""

    patience: float  # seconds from the first failure on
    _last: float = 0.0
    _first: float | None = None  # by the monotonic clock

    def is_over(self, seconds: float) -> bool:
        """Whether patience ends before so many seconds are over."""
        self._first = time.monotonic() if self._first is None else self._first
        return time.monotonic() + seconds > self._first + self.patience

    def next(self, broken: Exception) -> float:
        """Seconds, or as many as the server asks for."""
        self._last = min(max(2 * self._last, FIRST_WAIT), LONGEST_WAIT)
        after = broken.after if isinstance(broken, _Busy) else ""
        return float(after) if after.isdecimal() else self._last * random.uniform(0.5, 1)
