"""Stage 3 once more, after alignment: what the aligned draft answers, for the verifier that will meet its answers."""

from __future__ import annotations

from recipes.run import Run
from recipes.schema import Recipe
from train.rollouts import write_rollouts


def run(recipe: Recipe, run: Run) -> None:
    """Write `rollouts-aligned/`, as `train.rollouts` does."""
    write_rollouts(recipe, run, "relabel", run.path("align"))
