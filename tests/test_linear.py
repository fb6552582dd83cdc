"""Linear layers over few rows: the same products, for as long as the engine asks for them, and for nobody else."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parse.local import linear
from parse.local.linear import FEW, few_rows, install
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
    install(layer)
    torch.set_num_threads(threads)
    try:
        with few_rows():
            output = layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert output.shape == (*leading, out)


def test_whoever_else_holds_the_model_finds_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a pass of this thread alone, also where it fails; a copy of the model computes with its own weights."""
    layer, asked, by_blas = nn.Linear(2, 2), list[int](), linear._by_blas
    monkeypatch.setattr(linear, "_by_blas", lambda weight, x: asked.append(threading.get_ident()) or by_blas(weight, x))
    install(layer)
    install(layer)
    layer(torch.zeros(1, 2))
    assert not asked
    with few_rows():
        other = threading.Thread(target=layer, args=(torch.zeros(1, 2),))
        other.start()
        other.join()
        layer(torch.zeros(1, 2))
        copied = copy.deepcopy(layer)
        with torch.no_grad():
            copied.weight += 1
        torch.testing.assert_close(copied(torch.ones(1, 2)), layer(torch.ones(1, 2)) + 2)
        with pytest.raises(RuntimeError, match="invalid for input|shape|size"):
            layer(torch.zeros(1, 3))  # of another width
    assert set(asked) == {threading.get_ident()}
    asked.clear()
    layer(torch.zeros(1, 2))
    assert not asked
    assert type(layer) is nn.Linear


def test_a_model_that_was_saved_whole_is_read_where_no_engine_is(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    install(layer)
    torch.save(layer, tmp_path / "layer")
    read = torch.load(tmp_path / "layer", weights_only=False)
    torch.testing.assert_close(read(torch.ones(1, 2)), layer(torch.ones(1, 2)))
    assert read.forward.__func__ is nn.Linear.forward


class _Other(nn.Linear):
    pass


class _Quantised(torch.Tensor):
    """A weight of a type of its own, as torchao's and DTensor are."""


def test_layers_and_weights_of_other_kinds_stay_themselves() -> None:
    plain, quantised, wrapped = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(_Quantised))
    wrapped.forward = lambda x: x  # type: ignore[method-assign]
    others = [quantised, _Other(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, dtype=torch.bfloat16)]
    install(nn.Sequential(*others, wrapped, plain))
    assert "forward" in vars(plain)
    assert not any("forward" in vars(layer) for layer in others)
    assert wrapped(3) == 3


def test_layers_of_few_rows_use_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wide pass the head alone: it reads what logits are asked for."""
    runner, asked, by_blas = ModelRunner(random_model("llama", 80)), list[int](), linear._by_blas
    monkeypatch.setattr(linear, "_by_blas", lambda weight, x: asked.append(len(x)) or by_blas(weight, x))
    count, row = sum("forward" in vars(layer) for layer in runner.model.modules()), runner.open()
    for width, expected in ((FEW + 1, [3]), (1, [1] * count), (FEW, [*[FEW] * (count - 1), 3])):
        asked.clear()
        runner.forward([Pass(runner, row, list(range(1, width + 1)), keep=range(min(width, 3)))])
        assert asked == expected
