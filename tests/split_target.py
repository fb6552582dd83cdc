"""The shipped target, its weights split over the processes that torchrun starts: each prints what it answers."""

import json
import sys

import torch

from parse import Engine
from tests.conftest import MODELS
from tests.test_batch import PROMPTS

WAYS = [
    {"threshold": 0.5},
    {"threshold": 0.5, "lookahead": 3, "batch_size": 1},
    {"threshold": 0.5, "temperature": 1.0, "seed": 3},
]
LIMIT = 16


def answers(engine: Engine) -> list[list[list[int]]]:
    """Token ids, by way and prompt."""
    return [[result.token_ids for result in engine.generate(PROMPTS[:3], LIMIT, **ways)] for ways in WAYS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    pair = MODELS / "ledger-target", MODELS / "ledger-draft"
    engine = Engine.from_pretrained(*pair, "prompt", compile=True, target_options={"tp_plan": "auto"})
    engine.models["draft"].runner.compiled = None  # it could be, and would take long
    compiled = any(engine.models["target"].runner.compiled.pays.values())
    found = {"answers": answers(engine), "distributed": engine.distributed, "compiled": compiled}
    try:
        engine.generate(PROMPTS[0], LIMIT, threshold=0.5, temperature=1.0)
    except ValueError as error:
        found["refused"] = str(error)
    sys.stdout.write(f"found: {json.dumps(found)}\n")
