"""What a server refuses and survives: keys, limits, clients that go away, answers that break, signals."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from parse.__main__ import main as parse_main
from parse.local.runner import ModelRunner
from parse.round import Round
from parse.server.app import Stream
from parse.server.protocol import Chat, read
from parse.server.serving import Limits
from parse.server.worker import Job
from tests.http_server import CHAT, PROMPT, TEXT, Running, tiny


@pytest.fixture
def engine(target, draft, tokenizer):
    return tiny(target, draft, tokenizer)


def test_the_key_guards_all_but_health(engine):
    running = Running(engine, api_key="secret")
    try:
        assert httpx.get(f"{running.url}/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(running.url + path).status_code == 401
            assert httpx.get(running.url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert running.post("/v1/chat/completions", CHAT).status_code == 401
        assert running.client.chat.completions.create(**CHAT).choices
    finally:
        running.close()


def test_a_key_may_have_any_letters(engine):
    running = Running(engine, api_key="clé")
    try:
        for key, status in (("clé", 200), ("cle", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status
    finally:
        running.close()


def test_limits_have_statuses_of_their_own(engine):
    running = Running(engine, Limits(at_once=1, queue=1, body=500, prompt=20))
    try:
        assert running.post("/v1/completions", TEXT | {"prompt": "x" * 500}).status_code == 413
        assert running.post("/v1/completions", TEXT | {"prompt": "fig " * 30}).status_code == 400
        few = TEXT | {"prompt": "the fig"}
        assert running.post("/v1/completions", few | {"n": 3}).status_code == 422  # however long it waits
        assert running.post("/v1/completions", few | {"n": 2}).status_code == 200
        running.serving.worker.count += 1
        reply = running.post("/v1/completions", few | {"n": 2})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        running.serving.worker.count -= 1
    finally:
        running.close()


@pytest.mark.parametrize("stream", [False, True])
def test_many_that_come_together_take_no_place_that_is_taken(engine, slow, stream):
    """Of twelve at once one is answered at a time, streamed or whole."""
    running = Running(engine, Limits(at_once=1, queue=0))
    most, submit, statuses = [], running.serving.worker.submit, []

    def counting(job):
        submit(job)
        most.append(running.serving.worker.count)

    running.serving.worker.submit = counting
    ask = lambda: statuses.append(running.post("/v1/completions", TEXT | {"stream": stream}).status_code)
    try:
        for _ in range(3):
            threads = [threading.Thread(target=ask) for _ in range(12)]
            for one in threads:
                one.start()
            for one in threads:
                one.join(60)
        assert {*statuses} == {200, 429}
        assert max(most) == 1
        assert running.idle()
    finally:
        running.close()


def test_places_are_kept_for_requests_that_are_being_read(engine, monkeypatch):
    """Two that come together do not both take the last place."""
    running = Running(engine, Limits(at_once=1, queue=0))
    rounds, reading, go_on = running.serving._rounds, threading.Event(), threading.Event()

    def slowly(*rest):
        reading.set()
        go_on.wait(20)
        return rounds(*rest)

    monkeypatch.setattr(running.serving, "_rounds", slowly)
    statuses = []
    first = threading.Thread(target=lambda: statuses.append(running.post("/v1/completions", TEXT).status_code))
    try:
        first.start()
        assert reading.wait(20)
        assert running.post("/v1/completions", TEXT).status_code == 429
        go_on.set()
        first.join(20)
        assert statuses == [200]
        assert running.post("/v1/completions", TEXT).status_code == 200  # the place is free again
    finally:
        go_on.set()
        running.close()


def test_a_body_that_does_not_come_is_given_up(engine):
    running = Running(engine, Limits(seconds=0.3))
    try:
        with socket.create_connection(running.server.servers[0].sockets[0].getsockname()) as client:
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n"
            )
            client.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
            client.settimeout(20)
            assert b" 408 " in client.recv(4096).splitlines()[0]
    finally:
        running.close()


def test_a_stream_that_nobody_reads_is_cut_off():
    told = []

    async def events():
        try:
            yield "data: 1"
            raise AssertionError("nobody has read the first")
        finally:
            told.append("closed")

    async def never(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream = Stream(events(), 0.1, lambda: told.append("ended"))
    asyncio.run(asyncio.wait_for(stream.stream_response(never), 20))
    assert told == ["closed", "ended"]


def test_a_client_that_leaves_before_its_stream_begins_frees_its_row(engine, slow):
    """What it has asked for runs already, and nobody has begun to read."""

    async def gone(_):
        raise OSError("the connection is closed")

    async def asking(serving):
        rounds = await serving.rounds(read(Chat, json.dumps(LONG).encode()), [PROMPT], raw=False)
        jobs = serving.start([Job(each.answer(), lambda: None, watched=each) for each in rounds])
        assert serving.worker.count == 1
        stream = Stream(_nothing(), 60, lambda: serving.cancel(jobs))
        with pytest.raises(OSError, match="closed"):
            await stream.stream_response(gone)

    async def _nothing():
        yield ""

    running = Running(engine)
    try:
        asyncio.run(asking(running.serving))
        assert running.idle()
        assert len(slow) < 10
    finally:
        running.close()


@pytest.fixture
def slow(engine):
    """The passes of a target that takes its time over each, of which every one gives a token."""
    passes, forward = [], engine.models["target"].runner.forward

    def waiting(works, alone=None):
        passes.append(len(works))
        time.sleep(0.05)
        return forward(works)

    engine.models["target"].runner.forward = waiting
    return passes


LONG = CHAT | {"max_tokens": 400, "parse": {"method": "target"}, "stream": True}  # 400 passes


def test_a_request_that_takes_too_long_is_given_up(engine, slow):
    running = Running(engine, Limits(seconds=0.3))
    try:
        assert running.post("/v1/completions", TEXT | {"max_tokens": 400, "parse": LONG["parse"]}).status_code == 504
        assert running.idle()
        assert len(slow) < 100
    finally:
        running.close()


def test_a_client_that_goes_away_frees_its_row(engine, slow):
    """In the middle of a stream, or while it waits for the whole answer."""
    running = Running(engine)
    try:
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=LONG, timeout=60) as stream:
            next(stream.iter_lines())
        assert running.idle()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/chat/completions", json=LONG | {"stream": False}, timeout=0.5)
        assert running.idle()
        assert len(slow) < 100
        assert running.client.chat.completions.create(**CHAT).choices  # others are served as before
    finally:
        running.close()


def test_a_long_step_ends_where_somebody_comes_or_goes(engine, monkeypatch):
    """What nobody watches is written in one step, and whoever asks meanwhile does not wait for its end."""
    forward, steps = ModelRunner._run, []

    def slowly(self, passes, *rest):
        steps.append(len(passes))
        time.sleep(0.01)
        return forward(self, passes, *rest)

    monkeypatch.setattr(ModelRunner, "_run", slowly)
    running, ended = Running(engine), []
    body = LONG | {"stream": False, "max_tokens": 300}
    long = threading.Thread(target=lambda: ended.append(running.post("/v1/chat/completions", body)))
    try:
        long.start()
        while len(steps) < 5:
            time.sleep(0.005)
        assert running.post("/v1/chat/completions", body | {"max_tokens": 2}).status_code == 200
        assert not ended
        assert max(steps) == 2
        long.join(60)
        assert ended[0].status_code == 200
        steps.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=0.3)
        assert running.idle()
        assert len(steps) < 200
    finally:
        running.close()


def test_a_server_that_is_told_to_stop_finishes_what_runs(engine, slow):
    running = Running(engine)
    found = []
    body = LONG | {"max_tokens": 30}
    thread = threading.Thread(target=lambda: found.extend(running.events("/v1/chat/completions", body)))
    thread.start()
    while not slow:
        time.sleep(0.01)
    running.close()
    thread.join(20)
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(httpx.ConnectError):
        running.post("/v1/chat/completions", CHAT)


def test_an_answer_that_breaks_ends_alone(engine):
    running = Running(engine)
    try:
        runner = engine.models["target"].runner
        forward = runner.forward

        def breaking(works, alone=None):
            raise RuntimeError("the device is gone")

        runner.forward = breaking
        reply = running.post("/v1/chat/completions", CHAT)
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        chunk = json.loads(running.post("/v1/chat/completions", CHAT | {"stream": True}).text.split("\n\n")[0][6:])
        assert "the device is gone" in chunk["error"]["message"]
        runner.forward = forward
        assert running.client.chat.completions.create(**CHAT).choices
        assert running.idle()
        assert httpx.get(f"{running.url}/health").status_code == 200
    finally:
        running.close()


def test_a_text_that_cannot_be_told_ends_its_stream_alone(engine, monkeypatch):
    running = Running(engine)
    try:
        monkeypatch.setattr(Round, "text_of_first", lambda *_: 1 / 0)
        said = running.post("/v1/chat/completions", LONG).text
        assert json.loads(said.removeprefix("data: "))["error"]["message"] == "the request failed: ZeroDivisionError"
        assert running.idle()
        assert running.client.chat.completions.create(**CHAT).choices
    finally:
        running.close()


def test_the_command_serves_models_that_are_named_until_it_is_told_to_stop():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--target", "recipes/models/ledger-target", "--draft", "recipes/models/ledger-draft"]
    words += ["--verifier", "likelihood", "--port", str(port), "--name", "ledger"]
    command = [sys.executable, "-m", "parse", "serve", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr)
    said = next(line for line in lines if line.startswith("serving "))
    url = said.split(" at ")[1].strip()
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=20)
    asked = {"model": "ledger", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20}
    assert client.chat.completions.create(**asked).choices[0].message.content
    odd = asked | {"messages": [{"role": "user", "content": "a question that is none of the lists"}]}
    assert client.chat.completions.create(**odd).choices
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, extra_body={"a question that is none": 1})
    process.send_signal(signal.SIGTERM)
    said = list(lines)
    process.wait(60)
    records = [json.loads(line) for line in said]  # each line
    assert [one["status"] for one in records if one.get("route") == "/v1/chat/completions"] == [200, 200, 400]
    assert all(one["id"] and one["time"] for one in records if "route" in one)
    assert "question" not in "".join(said)  # nothing of what users say
    assert PROMPT not in "".join(said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run", "runs/nowhere"], "no recipe.yaml there"),
        ([], "no target is named"),
        (["--port", "none"], "must be a number of at least 1"),
        (["--api-key", ""], "the API key is empty"),
        (["--treshold", "1"], "unrecognized arguments"),
    ],
)
def test_a_command_that_cannot_serve_says_why(words, says, capsys):
    try:
        status = parse_main(["serve", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert says in capsys.readouterr().err


def test_the_command_loads_models_in_a_thread_that_ends(monkeypatch):
    """What it leaves behind would slow down the worker's passes, see `parse.threads`."""
    threads = []

    def load(given):
        threads.append(threading.current_thread())
        raise ValueError("enough")

    monkeypatch.setattr("parse.server.command.load", load)
    assert parse_main(["serve", "--target", "x"]) == 2
    (thread,) = threads
    assert thread is not threading.current_thread()  # and `in_thread` has waited for its end
