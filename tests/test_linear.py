"""Linear layers over few rows: the same products, for as long as the engine asks for them, and for nobody else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from parse.local.linear import FEW, NEAR, _FewRows, few_rows, linears
from parse.local.runner import ModelRunner, Pass
from tests.conftest import random_model


@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 3),
)
def test_few_rows_give_the_same_products(leading: list[int], width: int, out: int, bias: bool, threads: int) -> None:
    layer, before = nn.Linear(width, out, bias), torch.get_num_threads()
    x = torch.randn(*leading, width)
    expected = layer(x)
    torch.set_num_threads(threads)
    try:
        with few_rows([layer]):
            output = layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert output.shape == (*leading, out)


@pytest.mark.parametrize("layer", [nn.Linear(24, 10), nn.Linear(24, 10, bias=False), Conv1D(10, 24)])
@pytest.mark.parametrize(("rows", "near", "loop"), [(1, 0, True), (4, NEAR, True), (4, 900, False), (5, NEAR, False)])
def test_a_compiled_layer_multiplies_a_row_or_four_in_a_loop_of_its_own(
    rows: int, near: int, loop: bool, layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One always; as many as four where the weight, here of 960 bytes, is small enough to be near."""
    monkeypatch.setattr("parse.local.linear.NEAR", near)
    x, seen = torch.randn(rows, 1, 24), list[str]()
    nn.init.normal_(layer.weight)
    expected = layer(x)

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph.forward

    with few_rows([layer]):
        torch.compiler.reset()  # what is compiled is named by its code, which all cases share
        output = torch.compile(lambda x: layer(x), backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert ("sum" in seen) == loop


def test_whoever_else_holds_the_model_finds_it_as_it_was() -> None:
    layer = nn.Linear(2, 2)

    def fail_within() -> None:
        with few_rows([layer]):
            assert isinstance(layer, nn.Linear)
            assert type(layer) is not nn.Linear
            layer(torch.zeros(1, 3))  # of another width

    with pytest.raises(RuntimeError, match="invalid for input|shape"):
        fail_within()
    assert type(layer) is nn.Linear


class _Other(nn.Linear):
    pass


class _Quantised(torch.Tensor):
    """A weight of a type of its own, as torchao's and DTensor are."""


def test_layers_and_weights_of_other_kinds_stay_themselves() -> None:
    plain, quantised = nn.Linear(2, 2), nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(_Quantised))
    others = [quantised, _Other(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, dtype=torch.bfloat16)]
    assert linears(nn.Sequential(*others, plain)) == [plain]


def test_layers_of_few_rows_use_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wide pass the head alone: it reads what logits are asked for."""
    runner, asked, by_blas = ModelRunner(random_model("llama", 80)), list[int](), _FewRows._by_blas
    monkeypatch.setattr(_FewRows, "_by_blas", lambda layer, x: asked.append(len(x)) or by_blas(layer, x))
    count, row = len(linears(runner.model)), runner.open()
    for width, expected in ((FEW + 1, [3]), (1, [1] * count), (FEW, [*[FEW] * (count - 1), 3])):
        asked.clear()
        runner.forward([Pass(runner, row, list(range(1, width + 1)), keep=range(min(width, 3)))])
        assert asked == expected
    assert type(runner.model.get_output_embeddings()) is nn.Linear
