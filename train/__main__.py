"""accelerate launch -m train RECIPE [stage ...] [section.key=value ...] [--dry-run]"""

from __future__ import annotations

import argparse
import sys
import time


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe's stages; returns the exit status."""
    parser = argparse.ArgumentParser(prog="accelerate launch -m train", description="Run the stages of a recipe.")
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("rest", nargs="*", metavar="stage | section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, run nothing")
    options = parser.parse_args(arguments)

    from train.run import quieten

    quieten()
    from train.recipe import STAGES, RecipeError, check_models, load_recipe

    stages = [word for word in options.rest if "=" not in word]
    overrides = [word for word in options.rest if "=" in word]
    try:
        recipe = load_recipe(options.recipe, overrides)
        for stage in stages:
            if stage not in STAGES:
                raise RecipeError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        chosen = [stage for stage in STAGES if stage in (stages or recipe.stages)]
        if chosen != ["pretrain"]:
            check_models(recipe)
        if "distill" in chosen:
            from train.distill import trainer_config

            trainer_config(recipe)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(f"{options.recipe}: all checks passed; stages: {', '.join(chosen)}; folder: {recipe.folder}")
        return 0
    try:
        _run(recipe, chosen)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _run(recipe, chosen) -> None:  # type: ignore[no-untyped-def]
    import importlib

    from transformers import set_seed

    from train.run import Run

    with Run(recipe) as run:
        for stage in chosen:
            if stage != "pretrain" and run.is_done(stage):
                run.say(f"{stage}: done before, skipped")
                continue
            started = time.time()
            set_seed(recipe.seed)
            importlib.import_module(f"train.{stage}").run(recipe, run)
            run.say(f"{stage}: {time.time() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
