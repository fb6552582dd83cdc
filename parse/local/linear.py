"""Linear layers over few rows on a CPU: the same products in an order that BLAS computes faster.

A layer is x @ W.T with x [R, in] and W [out, in]. For few rows much of the time goes into reading W, and BLAS reads it
poorly so: one row runs on one thread. So for few rows we compute (W @ x.T).T, and for one row in blocks of W, one a
thread. Nothing is copied but the result. Each layer looks at its own rows: in a packed pass the head has few.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

FEW = 64  # rows
_passes = threading.local()  # `running` where this thread runs a pass of an engine


def install(model: nn.Module) -> None:
    """Let a model's plain float32 linear layers on a CPU compute few rows so within `few_rows`, and nowhere else.

    None that is built upon another, quantised, split up or wrapped by a library. Installing twice changes nothing.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and _is_plain(layer) and "forward" not in vars(layer):
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def _is_plain(layer: nn.Linear) -> bool:
    """Whether BLAS reads its weight: quantised and distributed ones are tensors of their own types."""
    weight: Any = layer.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


@contextmanager
def few_rows() -> Iterator[None]:
    """Within, in this thread, installed layers compute few rows as is best."""
    before = getattr(_passes, "running", False)
    _passes.running = True
    try:
        yield
    finally:
        _passes.running = before


def forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """[..., in] to [..., out]. By this name a pickled layer finds its class's own where it is read."""
    if torch.compiler.is_compiling() or not getattr(_passes, "running", False):
        return nn.Linear.forward(layer, input)
    x = input.reshape(-1, layer.in_features)  # [R, in]
    if len(x) > FEW:
        return nn.Linear.forward(layer, input)
    output = _by_blas(layer.weight, x).reshape(*input.shape[:-1], layer.out_features)
    return output if layer.bias is None else output + layer.bias


def _by_blas(weight: Tensor, x: Tensor) -> Tensor:
    """x @ W.T: [R, in] to [R, out]."""
    blocks = gcd(len(weight), torch.get_num_threads()) if len(x) == 1 else 1
    if blocks == 1:
        return torch.mm(weight, x.t()).t()  # [R, out]
    parts = weight.view(blocks, -1, weight.shape[1])  # [blocks, out / blocks, in]
    return torch.bmm(parts, x.t().expand(blocks, -1, -1)).view(1, -1)  # [1, out]
