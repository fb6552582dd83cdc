"""What only a GPU can show: CUDA graphs, compiled layers, FlexAttention's kernel, models on two devices."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from parse import Engine
from parse.layout import pack
from parse.local.model import LocalModel
from parse.local.runner import Pass
from parse.local.sequence import CachedSequence
from parse.verifiers import Likelihood, PromptVerifier
from tests.conftest import MODELS, runners_of
from tests.test_batch import PROMPTS, assert_same_answers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PAIR = MODELS / "ledger-target", MODELS / "ledger-draft"


def load(**options) -> Engine:
    return Engine.from_pretrained(*PAIR, "prompt", dtype=torch.float32, **{"compile": False, **options})


@pytest.fixture(scope="module")
def plain() -> Engine:
    return load()


@pytest.fixture(scope="module")
def compiled() -> Engine:
    return load(compile=True)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("ways", [{"threshold": 0.5}, {"method": "target"}, {"threshold": 0.5, "lookahead": 3}])
def test_cuda_graphs_and_compiled_layers_give_the_same_answers(plain, compiled, ways, batch_size):
    expected = plain.generate(PROMPTS, 40, batch_size=batch_size, **ways)
    for _ in range(2):  # the second time graphs are replayed
        assert_same_answers(compiled.generate(PROMPTS, 40, batch_size=batch_size, **ways), expected)
    for role, runner in runners_of(compiled).items():
        assert runner.cache.recorded or (role, ways) == ("draft", {"method": "target"})
        assert all(runner.compiled.pays.values())  # no compilation failed


def test_heads_that_share_keys_attend_as_they_do_uncompiled():
    """The shipped models have a key for each head; here four share one."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3", **sizes, head_dim=64, num_hidden_layers=3, vocab_size=200)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).cuda().eval()
    outputs = []
    for local in (LocalModel.of(model, None, compile=True), LocalModel.of(model, None)):
        local.warm_up(3)
        runner = local.runner
        contexts = [CachedSequence(runner) for _ in range(3)]
        for context, length in zip(contexts, (40, 90, 7), strict=True):
            context.read(list(range(5, 5 + length)))
        layout = pack(list(range(30, 80)), [9, 50], [20, 21], past=40)
        keep = range(len(layout.ids))
        logits = runner.forward([Pass(runner, contexts[0].row, layout.ids, layout, keep, with_states=True)])[0].logits
        runner.cache.truncate(90, contexts[0].row)
        steps = runner.forward([Pass(runner, context.row, [9]) for context in contexts])
        outputs.append([logits, *(step.logits for step in steps)])
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


def test_a_graph_is_recorded_again_where_its_buffers_grow(plain, compiled):
    """From 256 keys to more than there is room for, and for more texts than there are rows."""
    for prompts, limit in ((PROMPTS[:1], 230), (PROMPTS, 300), (PROMPTS[:2], 20)):
        mine, theirs = (
            engine.generate(prompts, limit, method="target", batch_size=len(prompts)) for engine in (compiled, plain)
        )
        assert_same_answers(mine, theirs)


def test_steps_of_a_target_with_flex_attention_are_recorded_too(plain):
    """With dense masks: block masks pay for wide passes only."""
    flexible = load(attention="flex", compile=True)
    assert_same_answers(flexible.generate(PROMPTS, 40, threshold=0.5), plain.generate(PROMPTS, 40, threshold=0.5))
    assert flexible.models["target"].runner.compiled.pays == {"steps": True, "wide": False}
    assert flexible.models["target"].runner.cache.recorded


def test_flex_attention_gives_the_same_answers():
    mine = load(attention="flex").generate(PROMPTS, 40, threshold=0.5)
    assert_same_answers(mine, load().generate(PROMPTS, 40, threshold=0.5))


def test_draft_and_target_on_different_devices():
    apart = load(draft_options={"device_map": {"": "cpu"}})
    assert apart.draft.device.type == "cpu"
    assert apart.target.device.type == "cuda"
    for ways in ({"threshold": 0.5}, {"threshold": 0.5, "lookahead": 3}, {"method": "draft"}):
        assert_same_answers(apart.generate(PROMPTS, 40, **ways), load().generate(PROMPTS, 40, **ways))


def test_a_gpus_verdicts_are_a_cpus():
    on_cpu = Engine.from_pretrained(*PAIR, "prompt", device="cpu")
    prompt = on_cpu.encode(PROMPTS[0])
    draft = on_cpu.encode("#1 fig")[:2] + list(range(20, 40))
    ends = [5, 12, len(draft)]
    assert isinstance(on_cpu.verifier, PromptVerifier)
    torch.testing.assert_close(
        load().verify(prompt, draft, ends), on_cpu.verify(prompt, draft, ends), atol=1e-3, rtol=1e-3
    )


def test_bfloat16_is_the_default_on_a_gpu():
    engine = Engine.from_pretrained(*PAIR, "likelihood")
    assert engine.target.dtype == torch.bfloat16
    assert isinstance(engine.verifier, Likelihood)
    assert engine.generate(PROMPTS[0], 20)[0].token_ids
