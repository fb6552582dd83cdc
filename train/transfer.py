"""python -m train.transfer RECIPE ROLLOUTS ...: a run's verifier on the labelled drafts of other models.

A threshold keeps its promise for drafts like those that it was calibrated on. This command measures what happens with
others: it applies the verifier of the recipe's run to the test prompts of other runs' `rollouts`, at the verifier's own
threshold and at one calibrated for those drafts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from recipes.command import run_command


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

    from recipes.schema import RecipeError

    try:
        rows = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(f"{folder} is no data set of rollouts: {error}") from error
    if missing := {"split", "number", "met", "valid"} - set(rows.column_names):
        raise RecipeError(f"{folder} lacks {', '.join(sorted(missing))}: run the stage `rollouts` of that run again")
    return rows


def _columns(figures: dict[str, float]) -> str:
    return f"{figures['accepted_fraction']:>10.1%}{figures['accuracy_loss']:>15.2%}"


def _main(options: argparse.Namespace) -> int:
    from eval.verifier_metrics import measure
    from recipes.pair import load_engine
    from recipes.schema import RecipeError, load_recipe
    from train.calibration import thresholds
    from train.verifier import labelled, score_all

    recipe = load_recipe(options.recipe, options.overrides)
    _, folder = recipe.evaluated
    engine = load_engine(recipe, None, folder)
    verifier, section, max_accuracy_loss = engine.need_verifier(), recipe.engine, recipe.verifier.max_accuracy_loss
    results: dict[str, Any] = {}
    for rollouts in options.rollouts:
        drafts = labelled(_rollouts(rollouts), max_accuracy_loss)
        if not drafts["calibration"] or not drafts["test"]:
            raise RecipeError(
                f"{rollouts} holds no drafts of calibration and test prompts: name the rollouts of a verifier"
            )
        scores = score_all(engine, {verifier.kind: verifier}, drafts, ["calibration", "test"])[verifier.kind]
        threshold = thresholds(scores["calibration"], max_accuracy_loss, section.handback)[section.policy]
        transferred = measure(scores["test"], verifier.threshold, section.policy)
        recalibrated = measure(scores["test"], threshold, section.policy)
        results[str(rollouts)] = transferred | {"recalibrated": recalibrated}
        print(
            f"{rollouts}: AUC {transferred['auc']:.3f}\n"
            f"  {'':34s}{'accepted':>10s}{'accuracy lost':>15s}\n"
            f"  {'the verifier as it is':34s}{_columns(transferred)}\n"
            f"  {'with a threshold for these drafts':34s}{_columns(recalibrated)}\n"
            f"  an oracle that knows the labels accepts {transferred['oracle_accepted_fraction']:.1%}; "
            f"{max_accuracy_loss:.2%} may be lost"
        )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
