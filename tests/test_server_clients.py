"""The server under many clients, of which some misbehave."""

import contextlib
import gc
import json
import random
import threading
import time

import httpx
import psutil
import pytest

from parse.server.serving import Limits
from tests.http_server import CHAT, PROMPT, Running, tiny

pytestmark = pytest.mark.slow
JSON = {"content-type": "application/json"}


def of_requests():
    """Threads but for those of the event loop's pool, which stay for the next request."""
    return sorted(one.name for one in threading.enumerate() if not one.name.startswith(("asyncio_", "uvloop_")))


def test_many_clients_of_which_some_misbehave(target, draft, tokenizer):
    """300 requests of 32 clients, a third given up at random, among hundreds of bodies that are none."""
    engine = tiny(target, draft, tokenizer)
    running = Running(engine, Limits(at_once=8, queue=400))
    prompts = [f"list : #{i % 9 + 1} fig rome {i % 7} ." for i in range(63)]
    expected = {prompt: result.text for prompt, result in zip(prompts, engine.generate(prompts, 30), strict=True)}
    running.post("/v1/chat/completions", CHAT)
    assert running.idle()
    threads, memory = of_requests(), psutil.Process().memory_info().rss
    wrong, finished, lock, numbers = [], [], threading.Lock(), iter(range(300))

    def ask(number):
        rng, prompt = random.Random(number), prompts[number % len(prompts)]
        body = CHAT | {"messages": [{"role": "user", "content": prompt}], "stream": number % 2 == 0}
        with httpx.Client(base_url=running.url, timeout=120) as client:
            for _ in range(2):
                broken = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
                if client.post("/v1/chat/completions", content=broken, headers=JSON).status_code != 400:
                    wrong.append((number, broken))
            if number % 3 == 0:  # goes away
                stream = client.stream("POST", "/v1/chat/completions", json=body, timeout=rng.uniform(0.01, 1))
                with contextlib.suppress(httpx.TimeoutException), stream as reply:
                    next(reply.iter_bytes(), None)
                return
            if not body["stream"]:
                text = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            else:
                text = ""
                with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                    for line in reply.iter_lines():
                        time.sleep(0.02 if number % 10 == 0 else 0)  # some read slowly
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            finished.append(number)
            if text != expected[prompt]:
                wrong.append((number, text))

    def client():
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ask(number)

    clients = [threading.Thread(target=client) for _ in range(32)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(300)
    assert wrong == []
    assert len(finished) == 200  # those that did not go away
    assert running.idle()
    assert running.serving.worker.count == 0
    gc.collect()
    assert of_requests() == threads
    assert psutil.Process().memory_info().rss < memory + 2**28
    reply = running.post("/v1/chat/completions", CHAT).json()
    assert reply["choices"][0]["message"]["content"] == engine.generate(PROMPT, 30)[0].text
    running.close()
