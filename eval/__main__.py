"""Evaluation from the command line.

python -m eval RECIPE [section.key=value ...]   every method on the same prompts, end to end
python -m eval compare RUN RUN ...              evaluated runs side by side
python -m eval parity RECIPE                    what training saw against what the engine feeds
python -m eval plan RECIPE                      what the speed-up would be, from measured forward passes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path

from recipes.command import run_command

COMMANDS = ("compare", "parity", "plan")  # modules of this package with a `main`
LOGGED = ("accuracy", "speedup", "seconds_per_request", "accepted_fraction", "full_accept_rate")


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a run; the last line printed is one JSON object, also in `eval/summary.json`. Or another command."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        return int(import_module(f"eval.{words[0]}").main(words[1:]))
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Evaluate a recipe's run.",
        epilog=f"Other commands, each with --help: {', '.join(COMMANDS)}.",
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(words)
    return run_command(lambda folders: _main(options, folders))


def _main(options: argparse.Namespace, folders: list[Path]) -> int:
    from recipes.progress import quieten

    quieten()
    from eval.checks import check_models, check_prompts, check_speculation, verifier_of_kind
    from eval.evaluation import evaluate
    from eval.methods import KINDS, parts_of
    from eval.tasks import content_of_task
    from recipes.run import Run
    from recipes.schema import RecipeError, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    check_models(recipe)
    check_speculation(recipe)
    check_prompts(recipe, ["eval"])
    draft, verifier = parts_of(recipe)
    for part in (draft, verifier and verifier / "verifier.json"):
        if part and not part.exists():
            raise RecipeError(
                f"{part} is not there: run `accelerate launch -m train {options.recipe}` first, or name other folders "
                "as eval.draft and eval.verifier"
            )
    for name in recipe.eval.methods or ():
        if name in KINDS:
            verifier_of_kind(recipe, KINDS[name])
    folders.append(recipe.folder)
    with Run(recipe, content_of_task) as run:
        run.check_outputs()
        if verifier and not recipe.eval.verifier and not run.is_done("verifier"):
            run.say(f"note: the verifier in {verifier} was made with another recipe, data or models")
        started = time.time()
        summary = evaluate(recipe)
        run.record("eval", time.time() - started, {"methods": summary["methods"]})
        figures = {f"{row['name']}/{key}": row[key] for row in summary["methods"] for key in LOGGED}
        run.log("eval", {key: value for key, value in figures.items() if value is not None})
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
