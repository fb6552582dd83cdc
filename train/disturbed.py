"""Disturbed copies of a draft: they err as the draft does, only more often.

A verifier must know the errors that the draft makes when it answers, and a good draft makes few of them. With noise on
its weights it still says what it finds most likely, but knows less well what that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LEVELS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # the noise's standard deviation over that of the matrix it is added to
TRIED = 32  # prompts by which a level is chosen
WRONG = 0.4  # of a copy's drafts, or more
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The model's weight matrices; none where any holds no plain numbers, as those of quantised models do not."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    return matrices if all(map(_is_plain, matrices)) else []


def _is_plain(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in PLAIN and not weight.is_meta


@contextmanager
def disturbed(model: nn.Module, level: float, seed: int) -> Iterator[None]:
    """Within, Gaussian noise lies on the model's matrices; after it they are what they were, to the bit.

    Args:
        level: the noise's standard deviation over that of each matrix.
        seed: which noise; levels of one seed are multiples of the same noise.
    """
    matrices = matrices_of(model)
    kept = [weight.detach().to("cpu", copy=True) for weight in matrices]
    try:
        with torch.no_grad():
            for index, weight in enumerate(matrices):
                source = torch.Generator().manual_seed(seed * 9973 + index)  # the same noise on every device
                noise = torch.randn(weight.shape, generator=source).to(weight.device)  # as the weight
                weight.add_((noise * (level * weight.float().std())).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(matrices, kept, strict=True):
                weight.copy_(before)
