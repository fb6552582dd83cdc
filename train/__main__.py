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
    options = parser.parse_intermixed_args(arguments)

    from train.run import quieten

    quieten()
    from train.checks import check_all
    from train.recipe import STAGES, RecipeError, load_recipe

    stages = [word for word in options.rest if "=" not in word]
    overrides = [word for word in options.rest if "=" in word]
    try:
        recipe = load_recipe(options.recipe, overrides)
        for stage in stages:
            if stage not in STAGES:
                raise RecipeError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        chosen = _in_order(recipe, stages)
        need = check_all(recipe, chosen) if chosen != ["pretrain"] else 0
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(f"{options.recipe}: all checks passed; stages: {', '.join(chosen)}; {_estimate(recipe, need)}")
        return 0
    try:
        _run(recipe, chosen, need)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        if (advice := _advice(error)) is None:
            raise
        print(f"error: {error}\n{advice}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _advice(error: BaseException) -> str | None:
    """What to do where memory or the disk has run out; None for any other error."""
    import errno

    import torch

    kept = "What is finished is kept, and the same command goes on from there."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: make room, or move the run folder and set runs to its new place. {kept}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return (
            "Memory has run out: lower the stage's batch_size (answers, rollouts) or "
            "trainer.per_device_train_batch_size with gradient_accumulation_steps, turn trainer.gradient_checkpointing "
            f"on, or spread the target (engine.target_options: {{device_map: auto}}). {kept}"
        )
    return None


def _in_order(recipe, stages) -> list[str]:  # type: ignore[no-untyped-def]
    """The stages to run; where the draft is aligned, "relabel" comes in front of the verifier by itself."""
    from train.recipe import STAGES, RecipeError

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

    from train.run import Run

    with Run(recipe) as run:
        if need and not all(run.is_done(stage) for stage in chosen):
            run.say(_estimate(recipe, need))
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
