"""Many requests at once: each answer is what it is alone, whatever runs beside it, comes late or is cancelled."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parse import Engine
from parse.local.runner import ModelRunner
from parse.scheduler import Call, Cancelled, Scheduler, run, run_together
from parse.verifiers import Likelihood
from tests.conftest import runners_of
from tests.test_engine import PROMPT

PROMPTS = [PROMPT, "the fig", "tea ; tea", "list : #1 egg lima 9 ; #2 rope cairo 1 ."]
WAYS = [
    {"threshold": 0.05},
    {"threshold": 1.1, "max_new_tokens": 9},
    {"threshold": 0.0, "horizon": 5},
    {"method": "target", "lookahead": 3},
    {"method": "draft"},
    {"threshold": 0.05, "policy": "longest", "temperature": 1.0, "seed": 2},
    {"threshold": 0.05, "handback": "never"},
]


@pytest.fixture(scope="module")
def engine(target, draft, tokenizer):
    return Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=3, compile=False)


@pytest.fixture(scope="module")
def alone(engine):
    """The answer to a request when nothing else runs."""
    known = {}

    def answer(number, way):
        if (number, way) not in known:
            known[number, way] = engine.generate(PROMPTS[number], **{"max_new_tokens": 18, **WAYS[way]})[0].token_ids
        return known[number, way]

    return answer


REQUEST = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, len(WAYS) - 1),
    st.integers(0, 12),  # the step before which it comes
    st.none() | st.integers(0, 12),  # how many steps later it is cancelled
    st.booleans(),  # whether it is streamed
)


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUEST, min_size=1, max_size=7), max_running=st.integers(1, 4))
def test_an_answer_does_not_depend_on_what_runs_beside_it(engine, alone, requests, max_running):
    scheduler, tasks, step = Scheduler(max_running), {}, 0
    while len(tasks) < len(requests) or not all(task.done for task in tasks.values()):
        for index, (number, way, comes, cancelled, streamed) in enumerate(requests):
            if comes == step:
                settings = engine.settings(**{"max_new_tokens": 18, **WAYS[way]})
                answer = engine._start(*engine._encoded(PROMPTS[number]), settings)
                tasks[index] = scheduler.submit(answer.answer(), watched=streamed)
            if cancelled is not None and step == comes + cancelled:
                scheduler.cancel(tasks[index])
        scheduler.step()
        assert len(scheduler._running) <= max_running
        step += 1
    for index, (number, way, _, cancelled, _) in enumerate(requests):
        try:
            assert tasks[index].result.token_ids == alone(number, way)
        except Cancelled:
            assert cancelled is not None
    assert all(runner.cache.window.rows == len(runner._free) for runner in runners_of(engine).values())


def test_eight_threads_share_one_batch(engine, alone, monkeypatch):
    """All threads' requests run together, streamed or not, and each thread gets its own answer."""
    jobs = [(number, way) for number in range(len(PROMPTS)) for way in range(len(WAYS))] * 2
    expected = [alone(*job) for job in jobs]
    widths, forward = [], type(engine.models["target"].runner).forward
    noting = lambda self, passes, alone=None: widths.append(len(passes)) or forward(self, passes, alone)
    monkeypatch.setattr(type(engine.models["target"].runner), "forward", noting)

    def ask(index):
        number, way = jobs[index]
        options = {"max_new_tokens": 18, **WAYS[way]}
        if index % 3 == 0:
            return "".join(engine.stream(PROMPTS[number], **options))
        return engine.generate(PROMPTS[number], **options)[0].token_ids

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(len(jobs))))
    for index, ids in enumerate(expected):
        assert found[index] == (engine.tokenizer.decode(ids) if index % 3 == 0 else ids)
    assert max(widths) > 1


@pytest.mark.parametrize("event", ["comes", "is cancelled"])
def test_a_request_ends_a_long_step_where_it(engine, alone, monkeypatch, event):
    """Who writes alone writes many tokens in a step; not to its end where somebody comes or goes meanwhile."""
    scheduler, forward, steps = engine.scheduler, ModelRunner._run, []
    start = lambda number: engine._start(
        *engine._encoded(PROMPTS[number]), engine.settings(max_new_tokens=18, method="target")
    )
    writing, others = scheduler.submit(start(1).answer()), []

    def counting(self, passes, *rest):
        steps.append(len(passes))
        if len(steps) == 5:
            scheduler.cancel(writing) if event == "is cancelled" else others.append(scheduler.submit(start(0).answer()))
        return forward(self, passes, *rest)

    monkeypatch.setattr(ModelRunner, "_run", counting)
    while len(steps) < 5:  # a step for the prompt, then one in which it writes on
        scheduler.step()
    assert len(steps) == 5
    if event == "is cancelled":
        assert writing.done
        return
    assert scheduler.wait(writing).token_ids == engine.generate(PROMPTS[1], 18, method="target")[0].token_ids
    assert scheduler.wait(others[0]).token_ids == engine.generate(PROMPTS[0], 18, method="target")[0].token_ids
    assert max(steps) == 2


def test_a_request_that_there_is_no_room_for_ends_no_step():
    scheduler, answers = Scheduler(max_running=1), []

    class Asking(Adder):
        def forward(self, works, alone=None):
            scheduler.submit(counting(self, 7, 1))
            answers.append(alone())
            scheduler.max_running = 2
            answers.append(alone())
            return super().forward(works)

    scheduler.submit(counting(Asking(), 0, 1))
    scheduler.step()
    assert answers == [True, False]


def test_who_is_done_within_a_step_makes_room_for_who_waits():
    """Also before the step ends: another runner's batch, which comes later in it, does not make them wait."""
    scheduler, answers = Scheduler(max_running=2), []

    class Asking(Adder):
        def forward(self, works, alone=None):
            answers.append(alone and alone())
            return super().forward(works)

    runners = Adder(), Asking()
    for runner in (*runners, runners[0]):  # the third waits
        scheduler.submit(counting(runner, 0, 1))
    scheduler.step()
    assert answers == [False]


async def failing(work, error):
    await work
    raise error


class Adder:
    """Runs work that is a number: all numbers plus one."""

    def __init__(self):
        self.batches = []

    def forward(self, works, alone=None):
        self.batches.append([work.number for work in works])
        if any(work.number < 0 for work in works):
            raise ValueError("a negative number")
        return [work.number + 1 for work in works]


class Number:
    def __init__(self, runner, number):
        self.runner, self.number = runner, number

    def __await__(self):
        return (yield self)


async def counting(runner, start, count):
    for _ in range(count):
        start = await Number(runner, start)
    return start


def test_one_that_fails_leaves_the_others_as_they_are():
    adder, scheduler = Adder(), Scheduler()
    good = scheduler.submit(counting(adder, 0, 3))
    bad = scheduler.submit(failing(Number(adder, 5), KeyError("mine")))
    assert scheduler.wait(good) == 3
    assert bad.done
    with pytest.raises(KeyError, match="mine"):
        bad.result  # noqa: B018
    assert adder.batches == [[0, 5], [1], [2]]
    with pytest.raises(ValueError, match="negative"):
        run(counting(adder, -1, 2))


def test_what_fails_among_many_stops_the_rest_of_them():
    adder, ended = Adder(), []

    async def noted(index):
        try:
            return await counting(adder, -1 if index == 1 else index, 4)
        finally:
            ended.append(index)

    with pytest.raises(ValueError, match="negative"):
        list(run_together(map(noted, range(5)), at_once=2))
    assert sorted(ended) == [0, 1]  # the others never began


def test_a_call_elsewhere_holds_nobody_up():
    """A request that waits for a server does so beside the passes of the others; its error is raised where it waits."""
    adder, scheduler = Adder(), Scheduler()
    with ThreadPoolExecutor(2) as threads:

        async def calling(seconds, fails=False):
            future = threads.submit(lambda: time.sleep(seconds) or (1 / 0 if fails else "answered"))
            try:
                return await Call(future)
            except ZeroDivisionError:
                return "failed"

        slow, wrong = scheduler.submit(calling(0.3)), scheduler.submit(calling(0.01, fails=True))
        quick = scheduler.submit(counting(adder, 0, 5))
        assert scheduler.wait(quick) == 5
        assert not slow.done
        assert (scheduler.wait(slow), scheduler.wait(wrong)) == ("answered", "failed")


def test_a_cancelled_request_has_no_result():
    scheduler, adder, ended = Scheduler(max_running=1), Adder(), []

    async def noted(index):
        try:
            return await counting(adder, index, 9)
        finally:
            ended.append(index)

    begun, waiting = (scheduler.submit(noted(index)) for index in range(2))
    scheduler.step()
    for task in (begun, waiting):
        scheduler.cancel(task)
        with pytest.raises(Cancelled):
            scheduler.wait(task)
    assert ended == [0]  # at once, and the other never began
    scheduler.step()
    assert adder.batches == [[0]]


def test_streams_that_take_turns_lose_nothing(engine, alone):
    """Whoever steps the scheduler may finish a stream that another one reads."""
    texts = [engine.tokenizer.decode(alone(number, 0)) for number in range(3)]
    streams = [engine.stream(PROMPTS[number], max_new_tokens=18, **WAYS[0]) for number in range(3)]
    shown = [next(stream) for stream in streams]
    shown[1] += "".join(streams[1])
    engine.generate(PROMPTS[3], 18, method="target")
    for index in (0, 2):
        shown[index] += "".join(streams[index])
    assert shown == texts


def test_too_long_a_text_fails_alone(engine):
    """The others of its batch are answered."""
    longest = engine.models["target"].context_length
    settings = engine.settings(method="target", max_new_tokens=18)  # the target reads both prompts at once
    good = engine.scheduler.submit(engine._start(*engine._encoded(PROMPT), settings).answer())
    with pytest.raises(ValueError, match=f"the model's context holds {longest}: shorten it"):
        engine.verify([5] * (longest - 2), [6] * 8, [4, 8])
    assert engine.scheduler.wait(good).token_ids == engine.generate(PROMPT, 18, method="target")[0].token_ids
    assert all(runner.cache.window.rows == len(runner._free) for runner in runners_of(engine).values())


class Interrupted(Adder):
    """Ctrl-C comes within its second batch, when a part of it is done."""

    def forward(self, works, alone=None):
        super().forward(works, alone)
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return [work.number + 1 for work in works]


def test_ctrl_c_amid_a_batch_leaves_no_half_done_work_behind():
    """What a batch has done nobody knows: its requests end, wherever they came from, and others go on."""
    broken, adder, scheduler = Interrupted(), Adder(), Scheduler()
    tasks = [scheduler.submit(counting(broken, number, 3)) for number in (0, 10)]
    other = scheduler.submit(counting(adder, 100, 3))
    with pytest.raises(KeyboardInterrupt):
        scheduler.wait(tasks[0])
    for task in tasks:
        with pytest.raises(Cancelled):
            scheduler.wait(task)
    assert scheduler.wait(other) == 103
    assert broken.batches == [[0, 10], [1, 11]]


def test_passes_and_calls_of_one_request_take_turns():
    """Two runners, and a request that goes from a pass to a call and back; a call that is cancelled fails its own."""
    adders, scheduler = (Adder(), Adder()), Scheduler()
    with ThreadPoolExecutor(1) as threads:

        async def mixed():
            number = await Number(adders[0], 1)
            number = await Call(threads.submit(lambda: number + 10))
            return await Number(adders[1], number)

        async def gone():
            future = Future()
            future.cancel()
            await Call(future)

        first, second, lost = (scheduler.submit(each) for each in (mixed(), counting(adders[1], 5, 6), gone()))
        assert scheduler.wait(second) == 11
        assert scheduler.wait(first) == 13
        with pytest.raises(CancelledError):
            scheduler.wait(lost)


def test_nobody_waits_while_all_others_wait_for_a_call():
    """What is submitted meanwhile runs, and what is cancelled meanwhile ends."""
    scheduler, call = Scheduler(), Future()

    async def asks():
        return await Call(call)

    async def asks_nothing():
        return 1

    def waits():
        with pytest.raises(Cancelled):
            scheduler.wait(asking)

    asking = scheduler.submit(asks())
    waiting = threading.Thread(target=waits)
    waiting.start()
    while not asking.wanted:
        time.sleep(0.001)
    assert scheduler.run(asks_nothing()) == 1
    scheduler.cancel(asking)
    waiting.join(5)
    assert asking.done
    assert call.cancelled()
