"""accelerate launch -m train RECIPE [stage ...] [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from recipes.command import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe's stages; returns the exit status."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m train", description="Run the stages of a recipe.")
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("rest", nargs="*", metavar="stage | section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, run nothing")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda folders: _main(options, folders))


def _main(options: argparse.Namespace, folders: list[Path]) -> int:
    from recipes.progress import quieten

    quieten()
    from recipes.schema import STAGES, RecipeError, load_recipe
    from train.checks import check_all

    stages = [word for word in options.rest if "=" not in word]
    recipe = load_recipe(options.recipe, [word for word in options.rest if "=" in word])
    for stage in stages:
        if stage not in STAGES:
            raise RecipeError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
    chosen = _in_order(recipe, stages)
    need = check_all(recipe, chosen)
    if options.dry_run:
        print(f"{options.recipe}: all checks passed; stages: {', '.join(chosen)}; {_estimate(recipe, need)}")
        return 0
    folders.append(recipe.folder)
    _run(recipe, chosen, need)
    return 0


def _in_order(recipe, stages) -> list[str]:  # type: ignore[no-untyped-def]
    """The stages to run; where the draft is aligned, "relabel" comes in front of the verifier by itself."""
    from recipes.schema import STAGES, RecipeError

    wanted = {*(stages or recipe.stages)}
    for stage in ("align", "relabel"):
        if stage in wanted and not recipe.aligned:
            raise RecipeError(f"stage {stage!r}: 'align' is not among the recipe's stages, so nothing uses it: add it")
    if "pretrain" in wanted and not recipe.pretrain:
        raise RecipeError("stage 'pretrain': the recipe has no section `pretrain`, so there is nothing to make: add it")
    if recipe.aligned and "verifier" in wanted:
        wanted.add("relabel")
    return [stage for stage in STAGES if stage in wanted]


def _estimate(recipe, need: int) -> str:  # type: ignore[no-untyped-def]
    from train.checks import size_of

    return f"run folder: {recipe.folder}, up to {size_of(need)} on the disk"


def _run(recipe, chosen, need: int) -> None:  # type: ignore[no-untyped-def]
    import importlib

    from transformers import set_seed

    from eval.tasks import content_of_task
    from recipes.run import Run

    with Run(recipe, content_of_task) as run:
        for stage in chosen:
            if stage != "pretrain":
                run.check_inputs(stage, others=chosen)
        if need and not all(run.is_done(stage) for stage in chosen if stage != "pretrain"):
            run.say(_estimate(recipe, need))
        for stage in chosen:
            if stage != "pretrain" and run.is_done(stage):
                run.say(f"{stage}: done before, skipped")
                continue
            started = time.time()
            set_seed(recipe.seed)
            importlib.import_module("recipes.demo.pretrain" if stage == "pretrain" else f"train.{stage}").run(
                recipe, run
            )
            run.forget_models()
            run.say(f"{stage}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
