"""A target on a real vLLM server: `make test-vllm`, which installs one; without it these tests are skipped."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from eval.bench.models import load_smollm2
from eval.verifier_metrics import Draft, examine
from parse import Engine
from parse.remote.fold import fold
from parse.remote.model import RemoteModel
from parse.sampling import Written
from parse.scheduler import run
from parse.verifiers import Folded, Needs, PromptVerifier
from parse.verifiers.saved import save
from recipes.verifier_schema import FoldedSection
from tests.conftest import ROOT, facts_of
from train.verifier import examples_of
from train.verifier_training import FoldedModule, fit

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
FLAGS = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-num-batched-tokens", "4096"]
QUESTIONS = [
    "Name three fruits.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "Say hello in Spanish.",
    "What do bees make?",
    "Name a colour.",
    "Who wrote Hamlet?",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM in .venv-vllm: `make test-vllm` installs it"),
]


class Vllm:
    """A vLLM server in a process of its own."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        self.folder, self.port, self.flags = folder, port, flags
        self.url = f"http://127.0.0.1:{port}/v1#tiny"
        self.start()

    def start(self) -> None:
        omp = PYTHON.parent.parent / "lib" / "libiomp5.so"
        env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        env |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} | (
            {"LD_PRELOAD": str(omp)} if omp.exists() else {}
        )
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--model", str(self.folder), "--served-model-name", "tiny"]
        log = (self.folder.parent / f"vllm-{self.port}.log").open("a")
        self.process = subprocess.Popen(
            [*command, *FLAGS, *self.flags], env=env, stdout=log, stderr=log, start_new_session=True
        )

    def wait(self) -> None:
        """Until it answers."""
        limit = time.monotonic() + 300
        while time.monotonic() < limit:
            assert self.process.poll() is None, "vLLM ended: see its log"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError("vLLM does not answer")

    def kill(self) -> None:
        """All of its processes, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def here():
    """SmolLM2 on this machine."""
    model, tokenizer = load_smollm2()
    return Engine(model, tokenizer, segments=8, compile=False)


@pytest.fixture(scope="module")
def folded(here, tmp_path_factory):
    """A probe that was trained a little, and the target's folder with its rows."""
    place = tmp_path_factory.mktemp("vllm")
    drafts = []
    for number, question in enumerate(QUESTIONS):
        prompt, answer = here.encode(question), here.generate(question, 24, method="target")[0].token_ids
        ids = answer if number % 2 else [*answer[:8], *reversed(answer[8:])]
        ends = [end for end in (8, 16, len(ids)) if end <= len(ids)]
        valid = [bool(number % 2) or end <= 8 for end in ends]
        drafts.append(Draft(prompt, ids, ends, False, valid, True, number, 0))
    depth, rows = here.target.config.num_hidden_layers, here.models["target"].vocabulary
    found = list(examine(here, drafts, Needs(token_logprobs=True, layers=(depth,))))
    starts = FoldedModule.starts(found)
    make = lambda: FoldedModule(*starts, 4, 16, 0.0)
    module = fit(make, found, found, FoldedSection(epochs=5, learning_rate=0.01), 0.01, "folded").module
    verifier = Folded(module.folded(), depth, tuple(range(rows, rows + 4)))
    from eval.verifier_metrics import score

    facts = facts_of(here.tokenizer, 8) | {"end_ids": sorted(here.models["target"].eos_ids)}
    save(place / "verifier", verifier, here.target, facts | {"checks": examples_of(score(verifier, found))})
    source = Path(here.target.config.name_or_path)
    fold(str(source), place / "verifier", place / "folded")
    return place, verifier, drafts


@pytest.fixture(scope="module")
def server(folded):
    made = Vllm(folded[0] / "folded", free_port(), "--max-model-len", "1024")
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def away(server, folded, here):
    """The target on the server; it drafts for itself, on this machine."""
    return Engine.from_pretrained(
        server.url, here.target, folded[0] / "verifier", draft_tokenizer=here.tokenizer, compile=False
    )


def test_verdicts_are_those_of_the_local_engine(here, away, folded):
    _, verifier, drafts = folded
    asked = PromptVerifier.of(here.tokenizer)
    for draft in drafts:
        given = draft.context_ids, draft.ids, draft.ends
        told = away.verify(*given)
        assert torch.allclose(told, here.verify(*given, verifier=verifier), atol=1e-3)
        assert torch.allclose(away.verify(*given, verifier=asked), here.verify(*given, verifier=asked), atol=1e-2)
    assert 0.02 < told.min() < 0.999


def test_nothing_accepted_is_the_servers_own_greedy_answer(server, away):
    prompt = away.encode(QUESTIONS[2])
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
    body["logit_bias"] = {str(token): -100 for token in away.verifier.labels}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    choice = json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]
    own = [token for token in choice["token_ids"] if token not in away.models["target"].eos_ids]
    found = away.generate(QUESTIONS[2], 40, threshold=1.1)[0]
    assert found.token_ids == own
    assert found.stats.draft_tokens > 0


def test_many_at_once_are_answered_as_each_alone(away):
    settings = {"max_new_tokens": 32, "threshold": 0.5}
    alone = [away.generate(question, **settings)[0].token_ids for question in QUESTIONS]
    assert [one.token_ids for one in away.generate(QUESTIONS, **settings)] == alone


def test_a_server_that_is_killed_comes_back_and_all_answers_are_right(server, away):
    settings = {"max_new_tokens": 48, "threshold": 0.5}
    expected = [one.token_ids for one in away.generate(QUESTIONS, **settings)]
    found = []
    asking = threading.Thread(target=lambda: found.extend(away.generate(QUESTIONS, **settings)))
    asking.start()
    time.sleep(1.5)
    assert asking.is_alive()
    server.kill()
    server.start()
    asking.join(200)
    assert [one.token_ids for one in found] == expected


def test_another_target_is_refused(server, folded, here, tmp_path):
    """As a folder whose rows are another probe's."""
    place, verifier, _ = folded
    other = tmp_path / "verifier"
    save(other, verifier, here.target, json.loads((place / "verifier" / "verifier.json").read_text()))
    record = json.loads((other / "verifier.json").read_text())
    for check in record["checks"]:
        check["confidences"] = [1 - one for one in check["confidences"]]
    (other / "verifier.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is not the target of the verifier"):
        Engine.from_pretrained(server.url, here.target, other, draft_tokenizer=here.tokenizer)
    with pytest.raises(ValueError, match="serves tiny, not 'large'"):
        Engine.from_pretrained(server.url.replace("tiny", "large"))


def test_a_plain_server_tells_likelihoods_and_one_without_rows_or_a_prefix_cache_is_refused(server, folded, here):
    source, port = Path(here.target.config.name_or_path), free_port()
    server.kill()  # two of them do not fit beside each other
    (folded[0] / "plain").symlink_to(source)
    other = Vllm(folded[0] / "plain", port, "--no-enable-prefix-caching", "--max-model-len", "128")
    try:
        other.wait()
        with pytest.raises(ValueError, match="start it with --enable-prefix-caching"):
            Engine.from_pretrained(other.url)
    finally:
        other.kill()
    other = Vllm(folded[0] / "plain", port, "--max-model-len", "128")
    try:
        other.wait()
        with pytest.raises(ValueError, match="has no rows of a folded verifier.*python -m parse fold"):
            Engine.from_pretrained(other.url, here.target, folded[0] / "verifier", draft_tokenizer=here.tokenizer)
        model = RemoteModel.connect(other.url)
        draft, needs = folded[2][1], Needs(token_logprobs=True)
        written = Written(draft.ids, True)
        told = [
            run(one.open(draft.context_ids).verify([], written, draft.ends, needs)).log_prob
            for one in (model, here.models["target"])
        ]
        assert len(told[0]) == len(draft.ids) + 1
        assert torch.allclose(*told, atol=1e-2)
        with pytest.raises(ValueError, match="larger --max-model-len"):
            run(model.label_scores([1] * 120, [[1] * 10], ((5,), (6,))))
    finally:
        other.kill()
    server.start()
    server.wait()
