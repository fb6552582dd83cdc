"""The routes: what clients of OpenAI's interface ask for, and what they get."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parse.generation import Generation
from parse.local.model import LocalModel
from parse.round import Round
from parse.server.formats import ChatFormat, CompletionFormat, Format
from parse.server.protocol import Chat, Completion, Detokenize, Refused, Switches, Tokenize, read
from parse.server.scores import Scores, scored
from parse.server.serving import Gone, Serving, waking
from parse.server.worker import Job
from parse.text import find_stop, text_of

COMPLETION_TOKENS = 16  # of /v1/completions where the request does not say, as OpenAI has it
POLICY = {  # the page asks nobody but this server
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'"
}
IDENTITY = "x-request-id"
GONE = 499  # the status, in the metrics alone, of a client that went away
log = logging.getLogger("parse.server")


def create_app(serving: Serving, api_key: str | None = None, log_texts: bool = False) -> FastAPI:
    """The server's application, for uvicorn or a test client.

    Args:
        api_key: what clients must send as their bearer token; None lets in everybody.
        log_texts: write what is asked and answered into the log as well.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(serving.close)

    async def authorised(http: Request) -> None:  # not async, it would wait for a thread of a pool
        if api_key is not None and not hmac.compare_digest(_key_of(http), api_key.encode()):
            message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
            raise Refused(401, message, code="invalid_api_key")

    async def refuse(http: Request, error: Exception) -> Response:
        if isinstance(error, Gone | ClientDisconnect):
            error = Refused(GONE, "the client went away")
        elif isinstance(error, HTTPException):
            error = Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
        elif not isinstance(error, Refused):
            error = _broken(http, error)
        _failed(http, error.status, error.code)
        headers = {IDENTITY: http.state.identity}  # also where the error is answered above `Identified`
        if error.status in (429, 503):
            headers["retry-after"] = "1"
        if error.status == 401:
            headers["www-authenticate"] = 'Basic realm="the API key, as the password"'  # so that a browser asks for it
        return JSONResponse(error.body, error.status, headers)

    app = FastAPI(title="PARSE", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Identified)
    for kind in (Refused, Gone, ClientDisconnect, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.state.serving, app.state.log_texts = serving, log_texts
    app.add_api_route("/health", health)
    guard = [Depends(authorised)]
    for path, route, method in ROUTES:
        app.add_api_route(path, route, methods=[method], dependencies=guard, response_model=None)
    return app


def _broken(http: Request, error: Exception) -> Refused:
    """What a client hears of an error of ours; the log has the rest."""
    log.error({**_asked(http), "message": "a request failed"}, exc_info=error)
    return Refused(500, f"the request failed: {type(error).__name__}")


class Identified:
    """Gives each request an identity, its own where it sends one, and sends it back with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        identity = Headers(scope=scope).get(IDENTITY, "")[:200] or uuid.uuid4().hex
        scope.setdefault("state", {})["identity"] = identity

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[IDENTITY] = identity
            await send(message)

        await self.app(scope, receive, sending)


class Stream(StreamingResponse):
    """Events for a client that reads them; they end where it does not, so that nothing waits for it for ever."""

    def __init__(self, events: AsyncGenerator[str, None], seconds: float, ended: Callable[[], None]) -> None:
        """Set up.

        Args:
            seconds: that it may take, with all reading.
            ended: is called at the end, whether anything was sent or not.
        """
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.events, self.seconds, self.ended = events, seconds, ended

    async def stream_response(self, send: Send) -> None:
        """Send what there is."""
        try:
            async with asyncio.timeout(self.seconds), aclosing(self.events):
                await super().stream_response(send)
        except TimeoutError:
            log.warning("a stream was not read to its end within %g s: it ends here", self.seconds)
        finally:
            self.ended()


async def _leaving(http: Request) -> None:
    """Wait until the client, whose body was read, goes away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _serving(http: Request) -> Serving:
    return http.app.state.serving  # type: ignore[no-any-return]


async def health(http: Request) -> Response:
    """Whether requests are answered."""
    serving = _serving(http)
    return Response(status_code=200 if serving.worker.alive and not serving.closing else 503)


async def metrics(http: Request) -> Response:
    """The figures, as Prometheus reads them."""
    figures, worker = _serving(http).metrics, _serving(http).worker
    figures.running.set(worker.running)
    figures.waiting.set(worker.waiting)
    return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)


async def models(http: Request) -> dict[str, Any]:
    """The one model."""
    serving = _serving(http)
    facts = {"object": "model", "created": serving.started, "owned_by": "parse"}
    facts |= {"root": serving.engine.models["target"].name, "max_model_len": serving.context_length}
    return {"object": "list", "data": [{"id": serving.name, **facts}]}


async def tokenize(http: Request) -> dict[str, Any]:
    """The target's tokens of a text, or of a chat up to where the answer begins."""
    serving = _serving(http)
    asked: Tokenize = read(Tokenize, await body_of(http))
    serving.check_model(asked.model)
    tokenizer = serving.engine.tokenizer

    def encoded() -> list[int]:
        if asked.messages:
            return serving.engine.encode([one.turn() for one in asked.messages])
        return list(tokenizer.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens))

    try:
        ids = await asyncio.to_thread(encoded)  # a long text takes a while, and others stream meanwhile
    except ValueError as error:
        raise Refused(400, str(error)) from error
    return {"tokens": ids, "count": len(ids), "max_model_len": serving.context_length}


async def detokenize(http: Request) -> dict[str, Any]:
    """The text of some of the target's tokens."""
    serving = _serving(http)
    asked: Detokenize = read(Detokenize, await body_of(http))
    serving.check_model(asked.model)
    serving.check_tokens(asked.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(text_of, asked.tokens, serving.engine.tokenizer)}


async def chat(http: Request) -> Response:
    """An answer to a conversation."""
    serving = _serving(http)
    asked: Chat = read(Chat, await body_of(http))
    serving.check(asked, prompts=1)
    if asked.limit == 0:
        raise Refused(400, "max_tokens is 0: ask for a token at least", "max_tokens")
    rounds = await serving.rounds(asked, [[message.turn() for message in asked.messages]], raw=False)
    form = ChatFormat(serving.name, asked, [each.prompt_ids for each in rounds], serving.engine.tokenizer)
    as_calibrated = serving.as_calibrated(asked, asked.limit)
    if asked.stream:
        return _streaming(http, form, rounds, as_calibrated)
    results = await serving.run([each.answer() for each in rounds], partial(_leaving, http), as_calibrated)
    return _whole(http, form, results, [None] * len(results))


async def completions(http: Request) -> Response:
    """What follows texts, or how likely they are."""
    serving = _serving(http)
    asked: Completion = read(Completion, await body_of(http))
    serving.check(asked, len(asked.prompts))
    for prompt in asked.prompts:
        if not isinstance(prompt, str):
            serving.check_tokens(prompt, "prompt")
    rates, limit = asked.logprobs is not None, COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    if asked.stream and (rates or asked.echo):
        raise Refused(400, "logprobs and echo are not streamed: leave out stream", "stream")
    if not limit and not (asked.echo and rates):
        raise Refused(400, "max_tokens is 0: ask for a token, or for echo with logprobs", "max_tokens")
    target = serving.engine.models["target"]
    if rates and not isinstance(target, LocalModel):
        raise Refused(400, f"logprobs need the target on this machine, and it is {target.name}", "logprobs")
    switches = asked.parse.model_fields_set
    if not limit and switches:
        raise Refused(400, "nothing is written, so the target alone is asked: leave out parse", "parse")
    changed: dict[str, Any] = {"max_tokens": limit or 1}
    if limit <= 1 and not switches:  # a text is rated, or a token asked for: there is nothing to draft
        changed["parse"] = Switches(method="target")
    rounds = await serving.rounds(asked.model_copy(update=changed), asked.prompts, raw=True)
    form = CompletionFormat(serving.name, asked, [each.prompt_ids for each in rounds], serving.engine.tokenizer)
    as_calibrated = serving.as_calibrated(asked, limit)
    if asked.stream:
        return _streaming(http, form, rounds, as_calibrated)
    if limit:
        results = await serving.run([each.answer() for each in rounds], partial(_leaving, http), as_calibrated)
    else:
        results = [Generation("", [], "length", [], each.stats) for each in rounds]
    scores: list[Scores | None] = [None] * len(rounds)
    if asked.logprobs is not None:
        scores = [await _rated(http, *both, asked.logprobs) for both in zip(rounds, results, strict=True)]
    return _whole(http, form, results, scores)


async def _rated(http: Request, asked: Round, result: Generation, count: int) -> Scores:
    """How likely a prompt and its answer are; one text at a time, as each takes memory for all words at all places."""
    serving = _serving(http)
    target = serving.engine.models["target"]
    assert isinstance(target, LocalModel)  # as was checked
    stopped = find_stop(text_of(result.token_ids, serving.engine.tokenizer), asked.settings.stop) is not None
    ends = target.eos_ids if result.finish_reason == "stop" and not stopped else ()
    steps = scored(target, [*asked.prompt_ids, *result.token_ids], count, ends)
    return (await serving.run([steps], partial(_leaving, http)))[0]


async def page(_: Request) -> HTMLResponse:
    """A chat that shows what was accepted."""
    return HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), headers=POLICY)


ROUTES = (
    ("/", page, "GET"),
    ("/metrics", metrics, "GET"),
    ("/v1/models", models, "GET"),
    ("/v1/chat/completions", chat, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/tokenize", tokenize, "POST"),
    ("/detokenize", detokenize, "POST"),
)


def _key_of(http: Request) -> bytes:
    """The key that a client sends: a bearer token, or a browser's password."""
    kind, _, given = http.headers.get("authorization", "").partition(" ")
    key = given.encode("latin-1")  # as the header was decoded
    if kind.lower() != "basic":
        return key
    try:
        return base64.b64decode(key, validate=True).partition(b":")[2]
    except ValueError:
        return b""


async def body_of(http: Request) -> bytes:
    """A request's body.

    Raises:
        Refused: where it is longer than the server reads, or comes too slowly.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other kinds any page of the web may send without asking
        raise Refused(415, f"the content type is {kind!r}: send application/json")
    limits, content = _serving(http).limits, b""
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in http.stream():
                content += chunk
                if len(content) > limits.body:
                    raise Refused(413, f"the body holds more than {limits.body} bytes")
    except TimeoutError:
        raise Refused(408, f"the body took longer than {limits.seconds:g} s") from None
    return content


def _whole(http: Request, form: Format, results: Sequence[Generation], scores: Sequence[Scores | None]) -> JSONResponse:
    content = form.whole(results, scores)
    _note(http, form, results, content["usage"])
    return JSONResponse(content)


def _note(http: Request, form: Format, results: Sequence[Generation], usage: dict[str, int]) -> None:
    """A record for the log; without what was asked and answered, unless that is wanted."""
    seconds = sum(sum(result.stats.seconds.values()) for result in results)
    record: dict[str, Any] = {**_asked(http), "status": 200, **usage, "seconds": round(seconds, 4)}
    record["accepted_tokens"] = sum(result.stats.accepted_tokens for result in results)
    if http.app.state.log_texts:
        record |= {"asked": form.asked.model_dump(mode="json"), "answers": [result.text for result in results]}
    log.info(record)


def _asked(http: Request) -> dict[str, str]:
    return {"id": http.state.identity, "route": http.url.path}


def _failed(http: Request, status: int, code: str | None = None) -> None:
    """Count a request without an answer, and note it without its words."""
    _serving(http).metrics.failed(status)
    log.info({**_asked(http), "status": status, "code": code})


def _streaming(http: Request, form: Format, rounds: Sequence[Round], as_calibrated: bool) -> StreamingResponse:
    serving, change = _serving(http), asyncio.Event()
    jobs = serving.start([Job(each.answer(), waking(change), watched=each) for each in rounds])
    changes = serving.changes(jobs, change, partial(_leaving, http), as_calibrated)
    events = _events(http, form, rounds, jobs, changes)
    return Stream(events, 2 * serving.limits.seconds, partial(serving.cancel, jobs))  # to write it, and to read it


async def _events(
    http: Request,
    form: Format,
    rounds: Sequence[Round],
    jobs: Sequence[Job[Generation]],
    running: AsyncGenerator[None, None],
) -> AsyncGenerator[str, None]:
    """Text as soon as it is certain, from whichever choice; then usage where it is wanted, and the end."""
    status = GONE
    try:
        async with aclosing(running) as changes:
            async for chunk in _chunks(changes, jobs, rounds, form):
                yield _event(chunk)
        tokens = sum(job.tokens for job in jobs)
        if form.asked.include_usage:
            yield _event(form.used(tokens))
        yield "data: [DONE]\n\n"
        status = 200
        _note(http, form, [job.result for job in jobs], form.usage(tokens))
    except Gone:
        return
    except Exception as problem:  # too late for a status
        error = problem if isinstance(problem, Refused) else _broken(http, problem)
        status = error.status
        yield _event(error.body)
    finally:
        if status != 200:
            _failed(http, status)


async def _chunks(
    changes: AsyncIterator[None], jobs: Sequence[Job[Generation]], rounds: Sequence[Round], form: Format
) -> AsyncIterator[dict[str, Any]]:
    """What each change has brought: more text, pieces of which is settled where they are from, the end of a choice."""
    shown, settled, ended = [0] * len(jobs), [0] * len(jobs), set[int]()
    async for _ in changes:
        tokens = sum(job.tokens for job in jobs)
        for i, job in enumerate(jobs):
            done, written, count = job.done, job.tokens, job.segments  # `done` first: then the others are final
            if done and job.failed:
                continue  # `changes` says why
            text = job.result.text if done else rounds[i].text_of_first(written)
            more = [] if done else rounds[i].segments[settled[i] : count]
            if text[shown[i] :] or more:
                yield form.chunk(i, text[shown[i] :], tokens, more)
            shown[i], settled[i] = len(text), count
            if done and i not in ended:
                ended.add(i)
                yield form.last(i, job.result, tokens)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
