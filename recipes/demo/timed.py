"""Training for so many minutes: the loop that every part of making the shipped pair uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recipes.progress import progress_bar

WARM_UP = 100  # steps
DECAY = 0.4  # share of the time, at the end, over which the learning rate falls
LEAST = 0.02  # of the learning rate, at the very end

Losses = Callable[[float], dict[str, Tensor]]  # share of the time that is over -> the next batch's losses by name


def train_for(title: str, minutes: float, rate: float, modules: Sequence[nn.Module], losses: Losses) -> None:
    """Train what is trainable in the modules on the sum of the losses, for at least one step."""
    optimizers = _optimizers(modules, rate)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    started, step, done = time.time(), 0, 0.0
    with progress_bar(title, total=round(minutes * 60)) as bar:
        while done < 1:
            for group in groups:
                group["lr"] = rate * min(1, (step + 1) / WARM_UP) * max(LEAST, min(1, (1 - done) / DECAY))
            parts = losses(done)
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, seconds = step + 1, time.time() - started
            done = seconds / (minutes * 60)
            bar.update(min(int(seconds), bar.total) - bar.n)
            bar.set_postfix({"step": step, **{k: f"{v.item():.3f}" for k, v in parts.items()}}, refresh=False)


def _optimizers(modules: Sequence[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases.

    GPT-2's layers keep matrices transposed in a class of their own; Muon does not mind.
    """
    named = {id(p): (name, p) for m in modules for name, p in m.named_parameters() if p.requires_grad}
    embeds = ("emb", "wte", "wpe")
    inner = [p for name, p in named.values() if p.ndim == 2 and not any(part in name for part in embeds)]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
