"""Clients of a server, each with one request at a time; a process of its own that loads nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence


async def ask_all(url: str, model: str, prompts: Sequence[str], at_once: int) -> float:
    """The seconds that so many clients take, from the first request on."""
    import httpx

    waiting = iter(prompts)
    kept = httpx.Limits(max_keepalive_connections=at_once)  # a connection for each client, as when they are apart
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=kept) as client:

        async def ask() -> None:
            for prompt in waiting:
                body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
                (await client.post("/v1/chat/completions", json=body)).raise_for_status()

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(at_once)))
        return time.perf_counter() - started


if __name__ == "__main__":
    print(asyncio.run(ask_all(**json.load(sys.stdin))))
