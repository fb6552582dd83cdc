"""A server in a thread of a test's process, over tiny models."""

import json
import threading
import time

import httpx
import openai
import uvicorn

from parse import Engine
from parse.server.app import create_app
from parse.server.metrics import Expectation, Expected
from parse.server.serving import Serving
from parse.verifiers import Likelihood

PROMPT = "list : #1 fig rome 4 ; #2 apple oslo 7 ."
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 30}
TEXT = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30}


class Running:
    """A server in a thread of this process, and a client."""

    def __init__(self, engine, limits=None, **options):
        self.engine = engine
        self.serving = Serving(
            engine, "tiny", {"max_new_tokens": 40}, limits, expected=Expected(Expectation(0.5), Expectation(0.5))
        )
        config = uvicorn.Config(create_app(self.serving, **options), port=0, log_level="error", http="h11")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)  # a test that fails does not wait for it
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=options.get("api_key", "none"), max_retries=0)

    def post(self, path, body, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=content, timeout=60, headers=headers, **options)

    def events(self, path, body):
        """A stream's chunks, and whether it ended as it should."""
        lines = self.post(path, body | {"stream": True}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def idle(self):
        """Wait until nothing runs; whether every row of the caches is free again."""
        limit = time.monotonic() + 20
        while self.serving.worker.count and time.monotonic() < limit:
            time.sleep(0.01)
        runners = [model.runner for model in self.engine.models.values()]
        return all(sorted(one._free) == list(range(len(one.cache.lengths))) for one in runners)

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert not self.serving.worker._thread.is_alive()


def tiny(target, draft, tokenizer):
    """An engine that keeps a part of what is drafted."""
    return Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.05), segments=4, compile=False)
