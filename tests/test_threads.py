"""Calls from several threads wait for each other and are right; whoever stops listening leaves no room taken."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from parse import Engine
from parse.local.locks import lock_of, others_idle
from parse.threads import in_thread
from parse.verifiers import Likelihood
from tests.conftest import runners_of
from tests.test_engine import PROMPT

PROMPTS = [PROMPT, "the fig", "tea ; tea", "list : #1 egg lima 9 ; #2 rope cairo 1 ."]
WAYS = [{"threshold": 0.05}, {"threshold": 1.1}, {"method": "target", "lookahead": 3}, {"threshold": 0.0, "horizon": 5}]


@pytest.fixture
def engine(target, draft, tokenizer):
    return Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3, compile=False)


def test_four_threads_get_the_answers_of_one(engine):
    jobs = [(prompt, ways) for prompt in PROMPTS for ways in WAYS] * 3
    ask = lambda job: engine.generate(job[0], 24, **job[1])[0].token_ids
    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        together = list(threads.map(ask, jobs))
        streamed = list(threads.map(lambda job: "".join(engine.stream(job[0], max_new_tokens=24, **job[1])), jobs))
        batches = list(threads.map(lambda ways: engine.generate(PROMPTS, 24, **ways), WAYS))
    assert together == alone
    assert streamed == [engine.tokenizer.decode(ids) for ids in alone]
    for ways, batch in zip(WAYS, batches, strict=True):
        assert [result.token_ids for result in batch] == [ask((prompt, ways)) for prompt in PROMPTS]


def test_two_engines_on_the_same_models_do_not_disturb_each_other(target, draft, tokenizer):
    """Passes change a model while they run: whoever shares it waits, whichever engine asks."""
    engines = [Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=3, compile=False) for _ in range(2)]
    alone = engines[0].generate(PROMPT, 24, threshold=0.02)[0].token_ids
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda i: engines[i % 2].generate(PROMPT, 24, threshold=0.02)[0].token_ids, range(16))
        assert all(ids == alone for ids in found)


def test_nothing_is_compiled_while_another_thread_uses_a_model(engine):
    used, done = threading.Event(), threading.Event()

    def use():
        with lock_of(engine.target):
            used.set()
            done.wait(20)

    thread = threading.Thread(target=use)
    thread.start()
    used.wait(20)
    with others_idle() as idle:
        assert not idle
    done.set()
    thread.join()
    with others_idle() as idle:
        assert idle
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(lock_of(engine.target).acquire, timeout=0.2).result()  # it waits for the compiler


def rows_in_use(engine):
    return [runner.cache.window.rows - len(runner._free) for runner in runners_of(engine).values()]


def test_abandoned_streams_give_their_rows_back(engine):
    for _ in range(3):
        pieces = engine.stream(PROMPT, max_new_tokens=24, threshold=0.05)
        next(pieces)
        del pieces
    for _ in range(3):
        engine.stream(PROMPT, max_new_tokens=24, threshold=0.05)  # never begun
    gc.collect()
    assert rows_in_use(engine) == [0, 0]
    assert [runner.cache.window.rows for runner in runners_of(engine).values()] == [1, 1]


@pytest.mark.parametrize(("prompts", "batch_size"), [(PROMPTS, 1), (PROMPTS, 4), (PROMPT, 1)])
def test_a_call_that_fails_gives_its_rows_back(engine, monkeypatch, prompts, batch_size):
    """Even while its traceback, and with it every frame of the call, is kept."""
    forward, calls = type(engine.models["target"].runner).forward, []

    def failing(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(engine.models["target"].runner), "forward", failing)
    with pytest.raises(KeyboardInterrupt) as kept:
        engine.generate(prompts, 24, threshold=0.05, batch_size=batch_size)
    assert rows_in_use(engine) == [0, 0]
    assert kept.tb is not None
    monkeypatch.undo()
    assert engine.generate(PROMPT, 24, method="target")[0].token_ids


def test_a_draft_of_other_tokens_stays_within_the_limit(smollm, target, tokenizer):
    """Its text may be more of the target's tokens than of its own."""
    model, real = smollm
    engine = Engine(model, real, target, tokenizer, Likelihood(), compile=False)
    engine.models["draft"].runner.eos_ids = frozenset()
    for limit in (1, 5, 24):
        result = engine.generate("Say something.", limit, method="draft")[0]
        assert 0 < len(result.token_ids) <= limit
        assert result.finish_reason == "length"
        assert real.decode(result.token_ids).startswith(result.text)


def test_a_call_in_a_thread_of_its_own_gives_what_it_gives():
    assert in_thread(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0)
    stopped = threading.Event()

    def endless():
        try:
            while True:
                stopped.wait(0.001)
        except SystemExit:
            stopped.set()

    with pytest.raises(TimeoutError):
        in_thread(endless, 0.01)
    assert stopped.wait(20)
