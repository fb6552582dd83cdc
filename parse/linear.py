"""Linear layers over few rows on a CPU: the same products in an order that BLAS computes faster.

A layer is x @ W.T with x [R, in] and W [out, in]. For the few rows of a decoding step all the time goes into reading
W, and BLAS reads it poorly so: one row runs on one thread, and 2 to 16 rows take 1.1 to 3.4 times as long as W @ x.T
does. So for few rows we compute (W @ x.T).T, and for one row in blocks of W, one a thread. Nothing is copied but the
result. Measured with MKL on 2 cores: a decoding step of SmolLM2 takes 0.66 of its time for one text, 0.63 for 4, 0.85
for 16.

In a compiled step one row is written as a sum of products, for which the compiler makes a loop of its own, fused with
what stands around it: a step of 12 layers of 128 takes 0.6 of its time. With more rows a compiled layer stays as it is
(W @ x.T gained nothing there), as do all layers on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd

import torch
from torch import Tensor, nn

FEW = 16  # rows


class _FewRows(nn.Linear):
    """A linear layer of few rows; any number is right."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        x = input.reshape(-1, self.in_features)  # [R, in]
        if not torch.compiler.is_compiling():
            product = self._by_blas(x)
        elif len(x) == 1:
            product = (self.weight * x).sum(-1)  # [out, in] to [out]
        else:
            return super().forward(input)
        output = product.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def _by_blas(self, x: Tensor) -> Tensor:
        """x @ W.T: [R, in] to [R, out]."""
        blocks = gcd(self.out_features, torch.get_num_threads()) if len(x) == 1 else 1
        if blocks == 1:
            return torch.mm(self.weight, x.t()).t()  # [R, out]
        weight = self.weight.view(blocks, -1, self.in_features)  # [blocks, out / blocks, in]
        return torch.bmm(weight, x.t().expand(blocks, -1, -1)).view(1, -1)  # [1, out]


def linears(model: nn.Module) -> list[nn.Linear]:
    """A model's plain float32 linear layers on a CPU: none that is built upon another, quantised, or split up."""
    return [module for module in model.modules() if type(module) is nn.Linear and _is_plain(module.weight)]


def _is_plain(weight: Tensor) -> bool:
    """Whether BLAS reads it: quantised and distributed weights are tensors of their own types."""
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"


@contextmanager
def few_rows(layers: Sequence[nn.Linear], rows: int) -> Iterator[None]:
    """Within, these layers compute as is best for so many rows; all others who hold the model find it as it was."""
    if rows > FEW:
        yield
        return
    for layer in layers:
        layer.__class__ = _FewRows
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
