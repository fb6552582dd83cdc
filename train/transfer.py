"""python -m train.transfer RECIPE ROLLOUTS ...: a run's verifier on the labelled drafts of other models.

A threshold's promise holds for drafts of the kind that it was calibrated on. How far it travels is measured here: the
verifier of the recipe's run, at its own threshold, on the test prompts of other runs' `rollouts`, each beside the
threshold that these drafts' own calibration would give.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from train.command import run_command


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each folder of rollouts, and all figures as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m train.transfer", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, whose run holds the verifier")
    parser.add_argument("rollouts", nargs="+", type=Path, help="folders that the stage `rollouts` of other runs wrote")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")
    options = parser.parse_args(arguments)
    return run_command(lambda _: _main(options))


def _rollouts(folder: Path) -> Any:
    """The data set of a folder.

    Raises:
        RecipeError: where there is none, or it is an old one.
    """
    from datasets import load_from_disk

    from train.recipe import RecipeError

    try:
        rows = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"{folder} is no data set of rollouts: {error}") from error
    if missing := {"split", "number", "met", "valid"} - set(rows.column_names):
        raise RecipeError(f"{folder} lacks {', '.join(sorted(missing))}: run the stage `rollouts` of that run again")
    return rows


def _main(options: argparse.Namespace) -> int:
    from eval.judged import measure
    from train.calibration import thresholds
    from train.models import load_engine
    from train.recipe import RecipeError, load_recipe
    from train.verifier import labelled, score_all

    recipe = load_recipe(options.recipe, options.overrides)
    _, folder = recipe.evaluated
    engine = load_engine(recipe, None, folder)
    verifier, section, promise = engine.need_verifier(), recipe.engine, recipe.verifier.max_accuracy_loss
    found: dict[str, Any] = {}
    for place in options.rollouts:
        drafts = labelled(_rollouts(place), promise)
        if not drafts["calibration"] or not drafts["test"]:
            raise RecipeError(
                f"{place} holds no drafts of calibration and test prompts: name the rollouts of a verifier"
            )
        drafts["held_out"] = []
        scores = score_all(engine, {verifier.kind: verifier}, drafts)[verifier.kind]
        own = thresholds(scores["calibration"], promise, section.handback)[section.policy]
        figures = {
            name: measure(scores["test"], at, section.policy)
            for name, at in (("here", own), ("there", verifier.threshold))
        }
        found[str(place)] = figures["there"] | {"own_threshold": figures["here"]}
        there = figures["there"]
        print(
            f"{place}: AUC {there['auc']:.3f}; at the verifier's own threshold {there['accepted_fraction']:.1%} of the "
            f"tokens are accepted (who knows the labels: {there['oracle_accepted_fraction']:.1%}), "
            f"{there['accuracy_loss']:.2%} of the prompts lost, {promise:.2%} promised; calibrated on these drafts: "
            f"{figures['here']['accepted_fraction']:.1%}, {figures['here']['accuracy_loss']:.2%}"
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
