"""Compiled passes: one graph without breaks a bucket of shapes, the same answers, and never in the way."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from eval.methods import compile_in_two
from parse import Engine
from parse.layout import pack
from parse.local.ahead import ANY, _place, trace
from parse.local.compiled import WIDE, Compiled
from parse.local.runner import ModelRunner, Pass
from parse.local.sequence import CachedSequence
from parse.verifiers import Likelihood, PromptVerifier
from recipes.pair import load_engine
from recipes.schema import load_recipe
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


def compiled_runner(model, counter, as_on_gpu=False, patience=0.0, wide=False) -> ModelRunner:
    compiled = Compiled(model, patience, counter)
    compiled.graph = as_on_gpu
    compiled.pays["wide"] = as_on_gpu or wide
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
        runner.compiled = Compiled(runner.model, 0.0, counters[role])
        runner.compiled.graph = as_on_gpu
        runner.compiled.pays["wide"] = as_on_gpu or role == "target"
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
    for role, runner in runners_of(compiled).items():
        if as_on_gpu:
            assert counters[role].graphs <= 4  # packed passes and steps, of one text and of many
        else:
            assert counters[role].graphs == len(runner.compiled.kept)


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_a_text_is_written_on_behind_the_last_key_of_a_bucket(as_on_gpu):
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


@pytest.mark.parametrize("kind", ["counted", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_cache_that_grows_needs_no_other_graph_on_a_cpu(kind):
    """600 tokens: ten times more keys at the end, and buffers that were enlarged twice."""
    model, counter = random_model("llama", 60), Counter()
    backend = {"counted": counter, "inductor": "inductor"}[kind]
    model.config.max_position_embeddings = 1024
    mine, plain = CachedSequence(compiled_runner(model, backend)), CachedSequence(ModelRunner(model))
    for context in (mine, plain):
        context.read(list(range(5, 45)))
    ids = [i % 50 + 5 for i in range(560)]
    for token in ids:
        mine.read([token])
    plain.read(ids)
    torch.testing.assert_close(mine.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)
    assert_same_cache(mine, plain)
    assert len(mine.runner.compiled.kept) == 1
    assert counter.graphs == (kind != "inductor")


def test_a_graph_is_made_for_a_number_of_threads():
    model, counter, before = random_model("llama", 60), Counter(), torch.get_num_threads()
    context = CachedSequence(compiled_runner(model, counter))
    context.read([5, 6, 7])
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            context.read([8])
    finally:
        torch.set_num_threads(before)
    assert counter.graphs == 2


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


def test_nothing_is_compiled_before_a_step_has_taken_its_patience():
    model, counter = random_model("llama", 60), Counter()
    context = CachedSequence(compiled_runner(model, counter, patience=1e9))
    context.read([5, 6, 7])
    context.write(5)
    assert not counter.graphs
    context.runner.compiled.patience = sum(context.runner.compiled._waited.values())
    context.write(2)
    assert counter.graphs == 1


def test_what_does_not_pay_is_left_alone(monkeypatch):
    model = random_model("llama", 60)
    compiled = Compiled(model)
    assert compiled.shape(1, 1, 70) == (1, 0)
    assert compiled.shape(5, 1, 70) == (16, 0)
    assert compiled.shape(1, 20, 70) == WIDE
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


@pytest.mark.parametrize(("layers", "as_on_gpu"), [(1, False), (2, False), (1, True)])
def test_steps_of_few_layers_on_a_cpu_attend_in_loops_and_nobody_else_does(layers, as_on_gpu, monkeypatch):
    """Grouped heads, texts of several lengths, an idle one."""
    monkeypatch.setattr("parse.local.compiled.DEEP", 2)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, vocab_size=60, **sizes)
    model, counter = AutoModelForCausalLM.from_config(config).eval(), Counter()
    runners = compiled_runner(model, counter, as_on_gpu), ModelRunner(model)
    outputs = []
    for runner in runners:
        contexts = [CachedSequence(runner) for _ in range(3)]
        for context, length in zip(contexts, (9, 2, 5), strict=True):
            context.read(range(length))
        if runner is runners[0]:
            counter.operations.clear()  # of prompts
        outputs.append([o.logits for o in runner.forward([Pass(runner, c.row, [7]) for c in contexts[1:]])])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    fused = any("scaled_dot_product" in operation for operation in counter.operations)
    assert counter.operations
    assert fused == (layers == 2 or as_on_gpu)


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


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        pytest.param(name, texts, marks=() if name in KINDS and texts == 1 else pytest.mark.slow)
        for name in ARCHITECTURES
        for texts in ((1, 3) if name in KINDS else (1,))
    ],
)
def test_on_a_cpu_steps_are_traced_on_every_architecture(name, texts):
    model, counter = shallow(name), Counter()
    runners = compiled_runner(model, counter), ModelRunner(model)
    prompts = [list(range(5, 18 - i)) for i in range(texts)]
    for _ in range(3):
        outputs = []
        for runner in runners:
            contexts = [CachedSequence(runner) for _ in prompts]
            runner.forward([Pass(runner, c.row, ids) for c, ids in zip(contexts, prompts, strict=True)])
            for token in (7, 9):
                outputs += [o.logits for o in runner.forward([Pass(runner, c.row, [token]) for c in contexts])]
            for context in contexts:
                context.close()
        for mine, plain in zip(outputs[: 2 * texts], outputs[2 * texts :], strict=True):
            torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)
    assert counter.graphs == len(runners[0].compiled.kept) == 1


@pytest.mark.parametrize(
    ("name", "deep"),
    [
        ("llama", False),
        *[pytest.param(name, False, marks=pytest.mark.slow) for name in sorted(KINDS - {"llama"})],
        *[pytest.param(name, True, marks=() if name in KINDS else pytest.mark.slow) for name in ARCHITECTURES],
    ],
)
def test_on_a_cpu_wide_passes_are_one_graph_of_any_size_on_every_architecture(name, deep):
    """Prompts and packed passes, alone and together; of deep models, each of the layers that do the same made once."""
    model, counter = shallow(name), Counter()
    mine, plain = compiled_runner(model, counter, wide=True), ModelRunner(model)
    mine.compiled._deep = deep
    for runner in (mine, plain):
        runner.forward([Pass(runner, runner.open(), [5, 6])])  # tells what a layer keeps
    layout = pack(list(range(30, 50)), [5, 20], [20, 21], past=5)
    everything = range(len(layout.ids))
    for texts, with_states in ((1, False), (3, True)):
        outputs = []
        for runner in (mine, plain):
            runner.cache.truncate(0, 0)
            rows = [0, *(runner.open() for _ in range(1, texts))]
            read = [Pass(runner, row, list(range(7, 12 + row))) for row in rows]
            outputs += [output.logits for output in runner.forward(read)]
            for row in rows:
                runner.cache.truncate(5, row)
            packed = [Pass(runner, row, layout.ids, layout, everything, with_states) for row in rows]
            for output in runner.forward(packed):
                outputs += [output.logits, *output.states]
            for row in rows[1:]:
                runner.close(row)
        half = len(outputs) // 2
        for ours, theirs in zip(outputs[:half], outputs[half:], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert counter.graphs == len(mine.compiled.kept) == 1  # two of the layers are the same
    assert any("embedding" in operation for operation in counter.operations) != deep  # a layer, or all of the model


def test_a_library_is_kept_under_all_that_it_depends_on(monkeypatch):
    """Not the weights, nor the folder of the sources; but all that the code is made of, and for."""

    def place(model, dtype=torch.float32):
        return _place(trace(model.to(dtype), lambda model, x: model(x), (torch.zeros(2, 3, dtype=dtype),), ({0: ANY},)))

    linear = torch.nn.Linear
    transposed = linear(3, 4)
    transposed.weight = torch.nn.Parameter(torch.zeros(3, 4).t())
    same = place(linear(3, 4))
    assert place(linear(3, 4)) == same
    others = [linear(3, 5), linear(3, 4, bias=False), transposed, torch.nn.Sequential(linear(3, 4), torch.nn.ReLU())]
    places = [*(place(model) for model in others), place(linear(3, 4), torch.bfloat16)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    places.append(place(linear(3, 4)))
    assert len({same, *places}) == 1 + len(places)

    def fed(weight):
        return _place(trace(linear(1, 1), lambda _, x, w: x @ w, (torch.zeros(2, 3), weight), ({0: ANY}, {})))

    assert fed(torch.zeros(3, 3)) != fed(torch.zeros(3, 3).t())


@pytest.mark.slow
def test_a_library_is_made_once_and_reads_the_weights_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made = set()
    for seed in (0, 1):
        model = random_model("llama", 60, seed=seed)
        mine, plain = (CachedSequence(runner) for runner in (compiled_runner(model, "inductor"), ModelRunner(model)))
        for change in range(2):
            with torch.no_grad():
                model.get_output_embeddings().weight += change
            for context in (mine, plain):
                context.rollback(0)
                context.read([5, 6, 7])
                context.read([8])
            torch.testing.assert_close(mine.last_logits, plain.last_logits, atol=1e-4, rtol=1e-4)
        assert len(mine.runner.compiled.kept) == 1
        (library,) = (tmp_path / "parse").iterdir()
        made.add(library.stat().st_mtime_ns)
    assert len(made) == 1  # the second model found what the first one had made


@pytest.mark.slow
def test_really_compiled_passes_give_the_same_words(draft, tokenizer, capsys):
    target = random_model("llama", len(tokenizer))
    plain = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=False)
    compiled = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4, compile=True)
    compiled.models["target"].runner.compiled._deep = True
    for method in ("target", "draft", "parse"):
        assert compiled.generate(PROMPTS[0], 20, method=method)[0].token_ids == (
            plain.generate(PROMPTS[0], 20, method=method)[0].token_ids
        )
    said = capsys.readouterr().err
    assert said.count("compiling") == said.count("... compiled") == 4  # steps and wide passes of both


@pytest.mark.slow
def test_an_evaluation_finds_what_a_process_beside_it_has_compiled(shallow_pair, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    recipe = load_recipe("recipes/quickstart.yaml", [f"target={tmp_path / 'target'}", f"runs={tmp_path}"])
    for model, folder in zip(shallow_pair, (tmp_path / "target", recipe.draft_folder), strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    engine = load_engine(recipe, recipe.draft_folder, compile=True)
    compile_in_two(recipe, engine, PROMPTS[0])
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/parse").iterdir()}
    assert len(made) == 4  # steps and wide passes of both
    assert not engine.models["draft"].runner.compiled.kept  # those of the draft not here
    for method in ("draft", "target", "draft"):
        engine.generate(PROMPTS[0], 4, method=method)
    assert all(len(runner.compiled.kept) == 2 for runner in runners_of(engine).values())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/parse").iterdir()} == made
