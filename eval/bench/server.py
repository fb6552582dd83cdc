"""What serving costs: requests a second through the server, over those of `Engine.generate` with as many at once.

Both answer the same prompts by the same engine, in turns, each in a thread that ends with it, as on a CPU the threads
of one slow down the other, see `parse.threads`. Every draft is accepted: so requests are short, and the server's share
is the largest. The clients live in another process, and each has one request at a time; on a machine of few cores they
take their share of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

from eval.bench.models import load_pair
from eval.bench.tables import Table
from eval.tasks import TASKS, draw_prompts
from eval.tasks.task import Prompt
from parse import Engine
from parse.server.app import create_app
from parse.server.serving import Limits, Serving
from parse.threads import in_thread
from parse.verifiers import Likelihood
from recipes.progress import progress_bar

EACH = 6  # requests of a client
LIMIT = 200  # tokens of an answer
NAME = "bench"


def measure(loads: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    engine = in_thread(lambda: _engine(max(loads)))
    rows = []
    with progress_bar("server", total=len(loads) * repeats) as bar:
        for at_once in loads:
            prompts = draw_prompts(TASKS["ledger"], "test", EACH * at_once, seed=1)
            alone, served = list[float](), list[float]()
            for turn in range(repeats + 1):  # the first one warms up
                alone.append(in_thread(partial(_by_engine, engine, prompts, at_once)))
                with _serving(engine, at_once) as url:
                    served.append(_by_clients(url, prompts, at_once))
                bar.update(turn > 0)
            ratios = [ours / own for ours, own in zip(served[1:], alone[1:], strict=True)]
            row = {"clients": at_once, "requests": len(prompts), "ratio": median(ratios), "ratios": ratios}
            rows.append(row | {"engine": median(alone[1:]), "server": median(served[1:])})
    return rows


def _engine(at_once: int) -> Engine:
    target, draft, tokenizer = load_pair("embedded")
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(threshold=0.0), compile=True)
    engine.warm_up(at_once)
    return engine


@contextmanager
def _serving(engine: Engine, at_once: int) -> Iterator[str]:
    """The address of a server of the engine."""
    import uvicorn

    app = create_app(Serving(engine, NAME, {"max_new_tokens": LIMIT}, Limits(at_once=at_once)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _by_engine(engine: Engine, prompts: Sequence[Prompt], at_once: int) -> float:
    """Requests a second."""
    started = time.perf_counter()
    engine.generate(prompts, LIMIT, batch_size=at_once)
    return len(prompts) / (time.perf_counter() - started)


def _by_clients(url: str, prompts: Sequence[Prompt], at_once: int) -> float:
    """Requests a second of so many clients in a process of their own."""
    work = json.dumps({"url": url, "model": NAME, "prompts": prompts, "at_once": at_once})
    done = subprocess.run([sys.executable, "-m", "eval.bench.clients"], input=work, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr}")
    return len(prompts) / float(done.stdout)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    head = ["clients", "requests", "Engine.generate", "server", "server / engine, median of turns (range)"]
    rates = lambda row: [f"{row[key]:.1f}/s" for key in ("engine", "server")]
    ratio = lambda row: f"{row['ratio']:.0%} ({min(row['ratios']):.0%} to {max(row['ratios']):.0%})"
    cells = [[str(row["clients"]), str(row["requests"]), *rates(row), ratio(row)] for row in rows]
    return Table("Requests a second through the server", head, cells)
