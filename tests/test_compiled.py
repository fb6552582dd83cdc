"""Compiled passes: one graph without breaks a bucket of shapes, the same answers, and never in the way."""

import warnings
from itertools import chain, repeat
from threading import Thread, get_ident

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parse import Engine
from parse.layout import pack
from parse.local.compiled import WIDE, Compiled
from parse.local.model import LocalModel
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.verifiers import Likelihood, PromptVerifier
from tests.conftest import random_model, runners_of
from tests.test_architectures import ARCHITECTURES, make
from tests.test_batch import PROMPTS, assert_same_answers
from tests.test_cache import assert_same_cache

KINDS = {"llama", "gemma 3", "gpt-2", "deepseek v3"}  # so different from each other that the others can wait
MIXED = {"qwen2, windows in some layers", "gemma 2", "gemma 3", "deepseek v3", "gpt-oss"}  # layers of two kinds


class Counter:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs, self.operations = 0, set()

    def __call__(self, graph, inputs, **_):
        self.graphs += 1
        self.operations |= {str(node.target) for node in graph.graph.nodes}
        return graph


def shallow(name):
    """As few layers as there are when two of them do the same, for tracing takes long."""
    return make(name, num_hidden_layers=3 if name in MIXED else 2)


def compiled_runner(model, counter, as_on_gpu=False, warm=True) -> ModelRunner:
    """A runner that compiles whatever form of a pass comes first, as within a warm-up, where `warm`."""
    compiled = Compiled(model, counter)
    compiled.graph, compiled._warming = as_on_gpu, get_ident() if warm else None
    compiled.pays["wide"] = as_on_gpu
    return ModelRunner(model, frozenset([1]), compiled)


@pytest.fixture(scope="module")
def shallow_pair(tokenizer):
    """Target and draft of a layer each."""
    return random_model("llama", len(tokenizer), layers=1), random_model("gpt2", len(tokenizer), layers=1, seed=1)


def engines(target, draft, tokenizer, verifier, as_on_gpu=False):
    """The same engine without and with compiled passes, and the counters of its models' graphs."""
    pair = [Engine(target, tokenizer, draft, tokenizer, verifier, segments=4, compile=False) for _ in range(2)]
    counters = {}
    for role, runner in runners_of(pair[1]).items():
        counters[role] = Counter()
        runner.compiled = compiled_runner(runner.model, counters[role], as_on_gpu).compiled
    return *pair, counters


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_as_on_a_gpu_layers_are_compiled_once_on_every_architecture(name):
    """No graph breaks, one graph a kind of layer for packed passes of any size and one for steps, equal logits."""
    model, counter = shallow(name), Counter()
    runners = compiled_runner(model, counter, True), ModelRunner(model, frozenset([1]))
    mine, plain = (CachedSequence(runner) for runner in runners)
    for context in (mine, plain):
        context.read(list(range(5, 18)))
    for n, ends in ((20, [5, 20]), (18, [4, 9]), (21, [21])):
        layout = pack(list(range(30, 30 + n)), ends, [20, 21], past=13)
        outputs = [
            context.runner.forward([Pass(context.runner, context.row, layout.ids, layout, range(len(layout.ids)))])[0]
            for context in (mine, plain)
        ]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
        for context in (mine, plain):
            context.runner.cache.truncate(13 + n, context.row)
            context.ids = list(range(13 + n))
            context.last_logits = None
            context.read([7])
            context.write(4)
        assert mine.ids == plain.ids
        torch.testing.assert_close(mine.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)
        assert_same_cache(mine, plain)
        for context in (mine, plain):
            context.rollback(13)
    kinds = 2 if name == "deepseek v3" else 1  # of layers; a window is in the mask
    assert counter.graphs == 2 * kinds  # of packed passes and of steps


def test_as_on_a_gpu_states_are_those_of_a_plain_pass():
    """Though a pass that was asked for them leaves hooks within the layers, which no compiler can read."""
    model, counter = make("qwen3 moe"), Counter()
    outputs = []
    for runner in (compiled_runner(model, counter, True), ModelRunner(model)):
        runner.forward([Pass(runner, runner.open(), [5, 6])])
        layout = pack(list(range(30, 50)), [5, 20], [20, 21], past=2)
        wide = runner.forward([Pass(runner, 0, layout.ids, layout, with_states=True)])[0]
        runner.cache.truncate(2)
        outputs.append((wide, runner.forward([Pass(runner, 0, [9], with_states=True)])[0]))
    for mine, plain in zip(*outputs, strict=True):
        tensors = [[output.logits, *output.states] for output in (mine, plain)]
        torch.testing.assert_close(*tensors, atol=1e-4, rtol=1e-4)
        assert len(mine.states) == 4
    assert counter.graphs == 2


def test_as_on_a_gpu_other_numbers_of_texts_need_no_other_graph():
    """A size that a compiler takes for a number compiles again for each count of texts."""
    model, counter = make("qwen3"), Counter()
    runner = compiled_runner(model, counter, True)
    contexts = [CachedSequence(runner) for _ in range(16)]
    for count in (16, 8, 5, 2):
        prompts = [Pass(runner, c.row, [5, 6, 7]) for c in contexts[:count]]
        runner.forward(prompts)
        for _ in range(2):
            runner.forward([Pass(runner, c.row, [9]) for c in contexts[:count]])
    assert counter.graphs == 2  # wide passes and steps of many texts
    runner.forward([Pass(runner, contexts[3].row, [5, 6])])  # one text, not in the first row
    assert counter.graphs == 3


def test_as_on_a_gpu_steps_of_a_model_with_flex_attention_take_dense_masks():
    model, counter = make("qwen3"), Counter()
    model.set_attn_implementation("flex_attention")
    mine, plain = (
        CachedSequence(compiled_runner(model, counter, True)),
        CachedSequence(ModelRunner(make("qwen3"), frozenset([1]))),
    )
    mine.runner.compiled.pays["wide"] = False
    with torch.compiler.set_stance("force_eager"):
        mine.read(list(range(5, 18)))
    plain.read(list(range(5, 18)))
    for context in (mine, plain):
        context.read([7])
    assert mine.write(5) == plain.write(5)
    assert counter.graphs == 1
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    ("ways", "as_on_gpu"),
    [
        pytest.param({"threshold": 0.05}, False, marks=pytest.mark.slow),
        ({"threshold": 0.05, "horizon": 7, "lookahead": 3}, False),
        pytest.param({"threshold": 0.05, "temperature": 1.0, "seed": 3}, False, marks=pytest.mark.slow),
        ({"threshold": 1.1}, False),
        ({"method": "draft"}, False),
        pytest.param({"threshold": 0.05, "horizon": 7}, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_engines_answer_the_same_alone_and_in_batches(shallow_pair, tokenizer, ways, as_on_gpu):
    plain, compiled, counters = engines(*shallow_pair, tokenizer, PromptVerifier.of(tokenizer), as_on_gpu)
    expected = plain.generate(PROMPTS, 30, batch_size=1, **ways)
    for batch_size in (1, 5):
        assert_same_answers(compiled.generate(PROMPTS, 30, batch_size=batch_size, **ways), expected)
    assert counters["draft"].graphs
    assert all(counter.graphs <= 8 for counter in counters.values())  # see `_form`


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_a_text_is_written_on_after_the_last_key_of_a_bucket(as_on_gpu):
    model = random_model("llama", 60)
    mine, alone = (
        CachedSequence(compiled_runner(model, Counter(), as_on_gpu)),
        CachedSequence(ModelRunner(model, frozenset([1]))),
    )
    for context in (mine, alone):
        context.read([i % 50 + 5 for i in range(254)])  # buckets end at 256 keys, and on a CPU at 320
    stop = lambda ids: len(ids) == 20
    assert mine.write(80, stop=stop) == alone.write(80, stop=stop)
    assert mine.write(80) == alone.write(80)
    assert mine.ids == alone.ids


def test_one_text_writes_on_while_another_waits():
    """Steps that follow each other leave the idle text where it is, at the end of the room that there is for keys."""
    model = random_model("llama", 60)
    runner = compiled_runner(model, Counter())
    runner.eos_ids = frozenset()
    waiting, writing = CachedSequence(runner), CachedSequence(runner)
    long = [i % 50 + 5 for i in range(440)]  # of 512
    waiting.read(long)
    writing.read([5, 6, 7])
    alone = CachedSequence(ModelRunner(model))
    alone.read([5, 6, 7])
    assert writing.write(100) == alone.write(100)
    waiting.read([9])
    alone.rollback(0)
    alone.read([*long, 9])
    torch.testing.assert_close(waiting.last_logits, alone.last_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_a_text_that_no_longer_writes_alone_stops_there(tokens):
    """After any token, also between recorded steps that follow each other, and its next token is what it would be."""
    model, prompt = random_model("llama", 60), [5, 6, 7]
    runner = compiled_runner(model, Counter())
    runner.eos_ids = frozenset()
    plain = CachedSequence(ModelRunner(model))
    plain.read(prompt)
    expected = plain.write(20).ids
    row, answers = runner.open(), chain([True] * tokens, repeat(False))
    (first,) = runner.forward([Pass(runner, row, prompt, more=19)])
    (output,) = runner.forward([Pass(runner, row, [int(first.logits.argmax())], more=19)], lambda: next(answers))
    assert [*output.written, int(output.logits.argmax())] == expected[1 : 2 + tokens]


@settings(max_examples=5, deadline=None)
@given(texts=st.lists(st.lists(st.integers(2, 59), min_size=1, max_size=40), min_size=1, max_size=6))
def test_any_texts_are_stepped_as_each_alone(texts):
    model = random_model("gpt2", 60)
    runner = compiled_runner(model, Counter())
    contexts = [CachedSequence(runner) for _ in texts]
    runner.forward([Pass(runner, c.row, ids) for c, ids in zip(contexts, texts, strict=True)])
    outputs = runner.forward([Pass(runner, c.row, [7]) for c in contexts[::2]])
    for i, (context, ids) in enumerate(zip(contexts, texts, strict=True)):
        alone = CachedSequence(ModelRunner(model))
        alone.read(ids if i % 2 else [*ids, 7])  # the others were idle, and hold what they held
        assert_same_cache(context, alone)
        if i % 2 == 0:
            torch.testing.assert_close(outputs[i // 2].logits[-1], alone.last_logits, atol=1e-4, rtol=1e-4)


def test_two_models_with_the_same_code_do_not_take_each_others_graphs():
    counter = Counter()  # one backend for both, as in earnest
    runners = []
    for seed in (0, 1):
        model = random_model("llama", 60, seed=seed)
        runners.append(compiled_runner(model, counter))
        mine, plain = CachedSequence(runners[-1]), CachedSequence(ModelRunner(model))
        for context in (mine, plain):
            context.read([5, 6, 7])
            context.read([8])
        torch.testing.assert_close(mine.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)
    assert counter.graphs == 2


def test_a_compiler_that_fails_is_warned_of_once_and_done_without(capsys):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler here")

    model = random_model("llama", 60)
    mine, plain = CachedSequence(compiled_runner(model, broken)), CachedSequence(ModelRunner(model))
    mine.read([5, 6, 7])
    plain.read([5, 6, 7])
    with pytest.warns(UserWarning, match=r"cannot be compiled here: it runs without: .*no C\+\+ compiler here") as seen:
        written = mine.write(6)
    assert written == plain.write(6)
    assert len([w for w in seen if "cannot be compiled" in str(w.message)]) == 1


def test_as_on_a_gpu_steps_are_recorded_where_the_compiler_fails():
    def broken(*_, **__):
        raise RuntimeError("no Triton here")

    model = random_model("llama", 60)
    mine, plain = (
        CachedSequence(compiled_runner(model, broken, True)),
        CachedSequence(ModelRunner(model, frozenset([1]))),
    )
    for context in (mine, plain):
        context.read([5, 6, 7])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert mine.write(6) == plain.write(6)
        for context in (mine, plain):
            context.read([8, 9])
        assert mine.write(270) == plain.write(270)  # into the next bucket
    (said,) = [str(warning.message) for warning in seen if "Triton" in str(warning.message)]
    assert "its steps are recorded as they are: " in said
    assert len(mine.runner.cache.recorded) == 1  # that of the buffers that there are
    assert mine.runner.compiled.pays == {"steps": True, "wide": True}


@pytest.mark.slow
def test_really_compiled_passes_give_the_same_words(draft, tokenizer, capsys):
    target = random_model("llama", len(tokenizer))
    plain = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=False)
    compiled = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=True)
    for method in ("target", "draft", "parse"):
        assert compiled.generate(PROMPTS[0], 20, method=method)[0].token_ids == (
            plain.generate(PROMPTS[0], 20, method=method)[0].token_ids
        )
    said = capsys.readouterr().err
    assert said.count("compiling") == said.count("... compiled") == 2


def test_what_does_not_pay_is_left_alone(monkeypatch):
    model = random_model("llama", 60)
    compiled = Compiled(model)
    assert compiled.shape(1, 1, 70) == (1, 0)
    assert compiled.shape(5, 1, 70) == (5, 0)
    assert compiled.shape(1, 20, 70) is None
    compiled = compiled_runner(model, Counter(), as_on_gpu=True).compiled
    assert compiled.shape(3, 20, 280) == WIDE
    assert compiled.shape(2, 1, 280) == (2, 512)
    assert compiled.shape(1, 1, 70) == (1, 256)
    compiled.pays["steps"] = False
    assert compiled.shape(1, 1, 70) is None
    assert compiled.shape(3, 20, 280) == WIDE
    monkeypatch.setattr("parse.local.compiled.LARGEST", 1000)
    for width in (1, 20):
        assert Compiled(model).shape(1, width, 70) is None  # bound by memory


def test_nothing_is_compiled_while_a_request_is_answered(shallow_pair, tokenizer):
    """Whatever shapes come, before the warm-up and after it."""
    target, draft = shallow_pair
    plain = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=False)
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=None)
    counters = {}
    for role, runner in runners_of(engine).items():
        counters[role] = Counter()
        runner.compiled = compiled_runner(runner.model, counters[role], warm=False).compiled
    seen = []
    for at_once in (None, 1, 4):
        if at_once:
            engine.warm_up(at_once)
        seen.append([counter.graphs for counter in counters.values()])
        for batch_size in (1, 2, 5):
            answers = engine.generate(PROMPTS, 20, batch_size=batch_size, threshold=0.05)
            assert_same_answers(answers, plain.generate(PROMPTS, 20, batch_size=1, threshold=0.05))
        assert seen[-1] == [counter.graphs for counter in counters.values()]
    assert seen[0] == [0, 0]
    assert all(0 < one < many for one, many in zip(seen[1], seen[2], strict=True))


def test_as_on_a_gpu_requests_of_any_length_find_their_layers_compiled(shallow_pair, tokenizer):
    """A step reads all keys of a bucket, and its buffers have room for more, or just for these."""
    target, _ = shallow_pair
    counter = Counter()
    engine = Engine(target, tokenizer, compile=None)
    engine.models["target"].runner.compiled = compiled_runner(target, counter, True, warm=False).compiled
    engine.warm_up(3)
    graphs = counter.graphs
    assert graphs
    for prompts in (PROMPTS[:1], [" ".join(PROMPTS * 9)], [" ".join(PROMPTS * 2)] * 2, PROMPTS):
        engine.generate(prompts, 20, method="target", raw=True)
    assert engine.models["target"].runner.cache.recorded
    assert counter.graphs == graphs


def test_warm_ups_of_several_threads_wait_for_each_other(shallow_pair, tokenizer):
    """Each used to hold a model and to wait for the other's."""
    engine = Engine(*(part for model in shallow_pair for part in (model, tokenizer)), compile=None)
    for runner in runners_of(engine).values():
        runner.compiled = compiled_runner(runner.model, Counter(), warm=False).compiled
    threads = [Thread(target=model.warm_up, args=(4,), daemon=True) for model in engine.models.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads)
    assert all(runner.compiled.forms for runner in runners_of(engine).values())


def test_a_compiler_that_fails_at_a_warm_up_leaves_steps_as_they_were(shallow_pair, tokenizer, capsys):
    """The first pass that it meets is a wide one."""

    def broken(*_, **__):
        raise RuntimeError("no C++ compiler here")

    engine = Engine(shallow_pair[0], tokenizer, compile=None)
    compiled = engine.models["target"].runner.compiled = compiled_runner(shallow_pair[0], broken, warm=False).compiled
    with pytest.warns(UserWarning, match="it runs without"):
        engine.warm_up()
    assert compiled.pays == {"steps": False, "wide": False}
    assert not compiled.forms


def test_no_prompt_is_no_first_request(shallow_pair, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(LocalModel, "warm_up", lambda self, at_once: asked.append(at_once))
    engine = Engine(shallow_pair[0], tokenizer, compile=True)
    for prompts in ([], PROMPTS[:1], PROMPTS[:1], PROMPTS[:3], PROMPTS[:1], PROMPTS):
        engine.generate(prompts, 2, method="target")
    assert asked == [1, 3]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        pytest.param(name, texts, marks=() if name in KINDS and texts == 1 else pytest.mark.slow)
        for name in ARCHITECTURES
        for texts in ((1, 3) if name in KINDS else (1,))
    ],
)
def test_on_a_cpu_steps_are_compiled_on_every_architecture(name, texts):
    """As one graph, between prompts and packed passes that are not."""
    model, counter = shallow(name), Counter()
    runners = compiled_runner(model, counter), ModelRunner(model)
    prompts = [list(range(5, 18 - i)) for i in range(texts)]
    outputs = []
    for runner in runners:
        contexts = [CachedSequence(runner) for _ in prompts]
        runner.forward([Pass(runner, c.row, [5, 6]) for c in contexts])  # tells what a layer keeps
        for context in contexts:
            runner.cache.truncate(0, context.row)
        runner.forward([Pass(runner, c.row, ids) for c, ids in zip(contexts, prompts, strict=True)])
        layouts = [pack(list(range(30, 50)), [5, 20], [20, 21], past=len(ids)) for ids in prompts]
        packed = [
            Pass(runner, c.row, layout.ids, layout, range(len(layout.ids)), with_states=True)
            for c, layout in zip(contexts, layouts, strict=True)
        ]
        for output in runner.forward(packed):
            outputs += [output.logits, *output.states]
        for context, ids in zip(contexts, prompts, strict=True):
            runner.cache.truncate(len(ids) + 20, context.row)
        for token in (7, 9):
            outputs += [o.logits for o in runner.forward([Pass(runner, c.row, [token]) for c in contexts])]
    half = len(outputs) // 2
    for mine, plain in zip(outputs[:half], outputs[half:], strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)
    assert counter.graphs == 1
