"""A small server that speaks of vLLM's interface what the engine uses, over a tiny model, and fails when it is told to.

Whether a real one does the same is tested in `test_vllm.py`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from parse.local.model import LocalModel
from parse.sampling import Sampling
from parse.scheduler import run


class VllmLike:
    """A server in a thread of this process."""

    def __init__(self, model: LocalModel, root: str, port: int = 0, context: int = 256, cache: bool = True) -> None:
        self.model, self.root, self.context, self.cache = model, root, context, cache
        self.failures: list[
            str
        ] = []  # of the next requests: a status, "cut", "abort" or "hang" (in the middle), "drop"
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.routes: set[str] = {"/v1/models", "/tokenize", "/metrics", "/generative_scoring", "/v1/completions"}
        self.going = 0  # streams
        self.delay = 0.0  # seconds that a token takes longer
        self._lock = threading.Lock()
        app = FastAPI()
        app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST"])
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        """Stop, whatever runs."""
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(20)

    async def _answer(self, path: str, http: Request) -> Response:
        path = f"/{path}"
        if path not in self.routes:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = json.loads(await http.body() or b"{}")
        self.seen.append((path, body))
        failure = self.failures.pop(0) if self.failures and http.method == "POST" else ""
        if failure.isdecimal():
            return JSONResponse({"error": {"message": f"told to say {failure}"}}, int(failure))
        if failure == "drop":
            return StreamingResponse(_broken(), media_type="application/json")
        if path == "/v1/models":
            card = {"id": "tiny", "root": self.root, "max_model_len": self.context}
            return JSONResponse({"data": [card]})
        if path == "/metrics":
            return PlainTextResponse(
                f'vllm:cache_config_info{{block_size="16",enable_prefix_caching="{self.cache}"}} 1\n'
            )
        if path == "/tokenize":
            ids = self.model.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": self.context})
        if path == "/generative_scoring":
            return await asyncio.to_thread(self._scores, body)
        if body.get("stream"):
            return StreamingResponse(self._stream(body, failure), media_type="text/event-stream")
        return await asyncio.to_thread(self._likelihoods, body)

    @torch.inference_mode()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        with self._lock:
            return run(self.model.logits(ids, first=-len(ids)))

    def _scores(self, body: dict[str, Any]) -> Response:
        if max(body["label_token_ids"]) >= self.model.vocabulary:
            return JSONResponse({"error": {"message": "label_token_id is out of vocabulary range"}}, 400)
        data = []
        for index, item in enumerate(body["items"]):
            logits = self._logits([*body["query"], *item][: self.context - 1])[-1]  # cut in silence, as vLLM does
            data.append({"index": index, "score": float(logits[body["label_token_ids"]].softmax(-1)[0])})
        return JSONResponse({"data": data})

    def _likelihoods(self, body: dict[str, Any]) -> Response:
        ids = body["prompt"]
        log_probs = self._logits(ids).log_softmax(-1)  # [L, V]
        told: list[Any] = [None]
        for token, row in zip(ids[1:], log_probs, strict=False):
            likeliest = {token, *row.topk(body["prompt_logprobs"]).indices.tolist()}
            told.append({str(one): {"logprob": float(row[one])} for one in likeliest})
        after = {f"token_id:{token}": float(log_probs[-1][token]) for token in body.get("logprob_token_ids", [])}
        return JSONResponse({"choices": [{"prompt_logprobs": told, "logprobs": {"top_logprobs": [after]}}]})

    async def _stream(self, body: dict[str, Any], failure: str) -> Any:
        self.going += 1
        try:
            ids, count = list(body["prompt"]), 0
            sampling = Sampling(body["temperature"], body.get("top_k", 0), body.get("top_p", 1.0), body.get("seed"))
            while count < body["max_tokens"]:
                await asyncio.sleep(self.delay)
                logits = (await asyncio.to_thread(self._logits, ids))[-1].clone()
                for token, bias in body.get("logit_bias", {}).items():
                    logits[int(token)] += bias
                ids.append(sampling(logits))
                count += 1
                ends = ids[-1] in body["stop_token_ids"]
                reason = "stop" if ends else "length" if count == body["max_tokens"] else None
                yield f"data: {json.dumps({'choices': [{'token_ids': ids[-1:], 'finish_reason': reason}]})}\n\n"
                if ends:
                    break
                if failure == "abort" and count == 3:  # as a server says that is about to stop
                    yield f"data: {json.dumps({'choices': [{'token_ids': [], 'finish_reason': 'abort'}]})}\n\n"
                    break
                if failure == "hang":
                    await asyncio.sleep(2)
                if failure == "cut" and count == 3:
                    raise ConnectionError("told to break")
            yield "data: [DONE]\n\n"
        finally:
            self.going -= 1


async def _broken() -> Any:
    yield b"{"
    raise ConnectionError("told to break")
