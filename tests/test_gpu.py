"""What only a GPU can show: CUDA graphs, compiled packed passes, FlexAttention's kernel, models on two devices."""

import pytest
import torch

from parse import Engine
from parse.verifiers import Likelihood, Prompt
from tests.conftest import MODELS
from tests.test_batch import PROMPTS, assert_same_answers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PAIR = MODELS / "ledger-target", MODELS / "ledger-draft"


def load(**options) -> Engine:
    return Engine.from_pretrained(*PAIR, "prompt", dtype=torch.float32, **{"compile": False, **options})


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("ways", [{"threshold": 0.5}, {"method": "target"}, {"threshold": 0.5, "lookahead": 3}])
def test_cuda_graphs_give_the_same_answers(ways, batch_size):
    plain, compiled = load(), load(compile=True)
    for _ in range(2):  # the second time graphs are replayed
        mine = compiled.generate(PROMPTS, 40, batch_size=batch_size, **ways)
        assert_same_answers(mine, plain.generate(PROMPTS, 40, batch_size=batch_size, **ways))
    for reader in compiled.readers.values():
        assert reader.compiled._graphs or ways.get("method") == "target"
        assert all(reader.compiled.pays.values())  # no compilation failed


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
    assert isinstance(on_cpu.verifier, Prompt)
    torch.testing.assert_close(
        load().verify(prompt, draft, ends), on_cpu.verify(prompt, draft, ends), atol=1e-3, rtol=1e-3
    )


def test_bfloat16_is_the_default_on_a_gpu():
    engine = Engine.from_pretrained(*PAIR, "likelihood")
    assert engine.target.dtype == torch.bfloat16
    assert isinstance(engine.verifier, Likelihood)
    assert engine.generate(PROMPTS[0], 20)[0].token_ids
