"""python -m eval RECIPE [section.key=value ...]: every method on the same prompts, end to end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.command import run_command

if TYPE_CHECKING:
    from parse import Engine
    from recipes.schema import Recipe

LOGGED = ("accuracy", "speedup", "seconds_per_request", "accepted_fraction", "full_accept_rate")


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a run; the last line printed is one JSON object, also in `eval/summary.json`."""
    parser = argparse.ArgumentParser(prog="python -m eval", description="Evaluate a recipe's run.")
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda folders: _main(options, folders))


def _main(options: argparse.Namespace, folders: list[Path]) -> int:
    from recipes.progress import quieten

    quieten()
    from eval.checks import check_models, check_prompts, check_speculation
    from eval.tasks import content_of_task
    from recipes.run import Run
    from recipes.schema import RecipeError, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    check_models(recipe)
    check_speculation(recipe)
    check_prompts(recipe, ["eval"])
    draft, verifier = recipe.evaluated
    for part in (draft, verifier / "verifier.json"):
        if not part.exists():
            raise RecipeError(
                f"{part} is not there: run `accelerate launch -m train {options.recipe}` first, or name other folders "
                "as eval.draft and eval.verifier"
            )
    folders.append(recipe.folder)
    with Run(recipe, content_of_task) as run:
        run.check_outputs()
        if not recipe.eval.verifier and not run.is_done("verifier"):
            run.say(f"note: the verifier in {run.path('verifier')} was made with another recipe, data or models")
        started = time.time()
        summary = _evaluate(recipe)
        run.record("eval", time.time() - started, {"methods": summary["methods"]})
        figures = {f"{row['name']}/{key}": row[key] for row in summary["methods"] for key in LOGGED}
        run.log("eval", {key: value for key, value in figures.items() if value is not None})
    print(json.dumps(summary))
    return 0


def _evaluate(recipe: Any) -> dict[str, Any]:
    import torch

    from eval.measure import summarize
    from eval.methods import compare, settings_of
    from eval.prompts import prompts_of
    from eval.properties import measure_pair
    from eval.report import console_table, html_report, pair_table, requests
    from eval.tasks import load_task
    from parse.prompts import opens_thinking
    from recipes.files import write_text
    from recipes.machine import hardware
    from recipes.pair import load_engine
    from recipes.schema import RecipeError, to_dict

    if recipe.eval.threads:
        torch.set_num_threads(recipe.eval.threads)
    task = load_task(recipe.task, to_dict(recipe.data))
    draft, verifier = recipe.evaluated
    engine = load_engine(recipe, draft, verifier, recipe.engine.compile)
    section, calibration = recipe.engine, engine.need_verifier().calibration
    assert calibration is not None
    try:
        calibration.threshold(section.policy, section.handback, section.horizon)
    except ValueError as error:
        raise RecipeError(f"engine: {error}") from error
    thresholds = calibration.thresholds
    prompts = [prompt for _, prompt in prompts_of(recipe, task, "eval").prompts]
    methods = settings_of(recipe, thresholds)
    labels = recipe.rollouts_folder / "labels.json"
    noise = json.loads(labels.read_text()) if labels.is_file() else {}
    agreement = noise.get("threshold", 0.5)  # where the target compares answers: as it labelled them
    if recipe.engine.compile is not False:
        engine.warm_up(max(recipe.eval.concurrency))
    engines = {}
    if "speculation" in methods and recipe.eval.speculation_draft:
        engines["speculation"] = _speculating(engine, recipe)
    opened = opens_thinking(engine.tokenizer)
    tables: dict[int, list[dict[str, Any]]] = {}
    found = {}
    for at_once in recipe.eval.concurrency:
        what = "methods" if at_once == 1 else f"methods, {at_once} at once"
        warmup = max(recipe.eval.warmup, at_once if at_once > 1 else 0)
        found[at_once] = compare(engine, task, prompts, methods, warmup, what, agreement, at_once, engines)
        tables[at_once] = [
            summarize(name, found[at_once][name], found[at_once]["target"], task, opened) for name in methods
        ]
    first = recipe.eval.concurrency[0]
    outcomes, rows = found[first], tables[first]
    pair = None
    if "draft" in outcomes and task.first_wrong:  # it is known which sentences of an answer are right
        pair = measure_pair(engine, task, outcomes["target"], outcomes["draft"])
    sweep = _sweep(engine, task, recipe, methods, outcomes, agreement) if "parse" in outcomes else []
    summary = {
        "name": recipe.name,
        "draft": str(draft),
        "verifier": str(verifier),
        "hardware": hardware(),
        "threshold": thresholds[recipe.engine.policy],
        "at_once": first,
        "methods": rows,
        "concurrency": [{"at_once": n, "methods": table} for n, table in tables.items() if n != first],
        "pair": pair,
        "sweep": sweep,
        "sweep_prompts": recipe.eval.sweep_prompts,
    }
    folder = recipe.folder / "eval"
    folder.mkdir(exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "report.html", html_report(summary, outcomes))
    write_text(folder / "transcripts.jsonl", _transcripts(outcomes))
    if pair:
        print(f"\nthe pair of models, on {len(prompts)} test prompts\n{pair_table(pair)}")
    for at_once, table in tables.items():
        title = "" if list(tables) == [1] else f"{requests(at_once)}, {len(prompts)} prompts\n"
        print(f"\n{title}{console_table(table)}")
    print(f"\nreport: {folder / 'report.html'}\n", flush=True)
    return summary


def _speculating(engine: Engine, recipe: Recipe) -> Engine:
    """The engine's target with another draft."""
    from parse import Engine

    other = Engine.from_pretrained(
        engine.target,
        recipe.eval.speculation_draft,
        tokenizer=engine.tokenizer,
        segments=recipe.segments,
        compile=recipe.engine.compile,
    )
    other.models["target"] = other.pair.target = engine.models["target"]  # compiled once
    return other


def _sweep(
    engine: Any, task: Any, recipe: Any, methods: dict[str, Any], outcomes: Any, agreement: float
) -> list[dict[str, Any]]:
    """PARSE at other thresholds, on the first prompts: speed-up and accuracy of each."""
    from eval.methods import compare

    count = recipe.eval.sweep_prompts
    confidences = sorted(
        segment.confidence
        for outcome in outcomes["parse"]
        for segment in outcome.generation.segments
        if segment.confidence is not None
    )
    if not count or not confidences:
        return []
    quantiles = [confidences[int(q * (len(confidences) - 1))] for q in (0.05, 0.2, 0.5, 0.8)]
    variants = {f"parse {t:.4f}": methods["parse"] | {"threshold": t} for t in sorted({0.0, *quantiles})}
    ran = compare(
        engine,
        task,
        [o.prompt for o in outcomes["parse"][:count]],
        {"target": methods["target"], **variants},
        0,
        "thresholds",
        agreement,
        recipe.eval.concurrency[0],
    )
    baseline = sum(o.seconds for o in ran.pop("target"))
    return [
        {
            "threshold": variants[name]["threshold"],
            "speedup": baseline / sum(o.seconds for o in some),
            "accuracy": sum(o.right for o in some) / len(some),
        }
        for name, some in ran.items()
    ]


def _transcripts(outcomes: Any) -> str:
    import dataclasses

    lines = []
    for name, some in outcomes.items():
        for outcome in some:
            record = {
                "method": name,
                "prompt": outcome.prompt,
                "right": outcome.right,
                "seconds": outcome.seconds,
            }
            record |= dataclasses.asdict(outcome.generation)
            lines.append(json.dumps(record) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
