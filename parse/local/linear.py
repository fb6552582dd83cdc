"""Linear layers over few rows on a CPU: the same products in an order that BLAS computes faster.

A layer is x @ W.T with x [R, in] and W [out, in]. For few rows much of the time goes into reading W, and BLAS reads it
poorly so: one row runs on one thread. So for few rows we compute (W @ x.T).T, and for one row in blocks of W, one a
thread. Nothing is copied but the result. Each layer looks at its own rows: in a packed pass the head has few.

In a compiled step one row is written as a sum of products, in GPT-2's layers too, for which the compiler makes a loop
of its own, fused with what stands around it; so are four rows where the loop, which reads the weight once a row, finds
it in a core's own cache. More rows stay as they are, as do all layers on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FEW = 64  # rows
SUMMED = 4  # rows of a compiled layer
NEAR = 2**18  # bytes of a weight that stays in a core's own cache


class _FewRows(nn.Linear):
    """A linear layer of few rows; any number is right."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        x = input.reshape(-1, self.in_features)  # [R, in]
        compiling = torch.compiler.is_compiling()
        if not _pays(self.weight, len(x)) if compiling else len(x) > FEW:
            return super().forward(input)
        product = (self.weight * x[:, None]).sum(-1) if compiling else self._by_blas(x)  # [R, out]
        output = product.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _by_blas(self, x: Tensor) -> Tensor:
        """x @ W.T: [R, in] to [R, out]."""
        blocks = gcd(self.out_features, torch.get_num_threads()) if len(x) == 1 else 1
        if blocks == 1:
            return torch.mm(self.weight, x.t()).t()  # [R, out]
        weight = self.weight.view(blocks, -1, self.in_features)  # [blocks, out / blocks, in]
        return torch.bmm(weight, x.t().expand(blocks, -1, -1)).view(1, -1)  # [1, out]


class _FewRowsTransposed(Conv1D):
    """The same for GPT-2's linear layers, whose weights are [in, out]; BLAS reads those well."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        rows = x.reshape(-1, self.nx)  # [R, in]
        if not torch.compiler.is_compiling() or not _pays(self.weight, len(rows)):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return (self.weight * rows[..., None]).sum(1).view(*x.shape[:-1], self.nf) + self.bias  # [R, in, out], summed


def _pays(weight: Tensor, rows: int) -> bool:
    """Whether a compiled layer is better written as sums of products: its loop reads the weight again for every row."""
    return rows == 1 or (rows <= SUMMED and weight.nbytes <= NEAR)


_QUICK: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _FewRows, Conv1D: _FewRowsTransposed}


def linears(model: nn.Module) -> list[nn.Module]:
    """A model's plain float32 linear layers on a CPU: none that is built upon another, quantised, or split up."""
    return [module for module in model.modules() if type(module) in _QUICK and _is_plain(module)]


def _is_plain(layer: nn.Module) -> bool:
    """Whether BLAS reads its weight: quantised and distributed ones are tensors of their own types."""
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


@contextmanager
def few_rows(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these layers compute few rows as is best; all others who hold the model find it as it was."""
    plain = [type(layer) for layer in layers]
    for layer, kind in zip(layers, plain, strict=True):
        layer.__class__ = _QUICK[kind]
    try:
        yield
    finally:
        for layer, kind in zip(layers, plain, strict=True):
            layer.__class__ = kind
