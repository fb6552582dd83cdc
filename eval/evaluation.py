"""The evaluation of a run: every method on the same prompts, what was found, and where it is written."""

from __future__ import annotations

import json
from typing import Any

import torch

from eval import parity
from eval.baselines import TransformersGenerate
from eval.checks import verifier_of_kind
from eval.judges import Agreement, asked_by
from eval.measure import summarize
from eval.methods import KINDS, Outcome, compare, loads_of, methods_of, parts_of, settings_of
from eval.prompts import prompts_of
from eval.properties import measure_pair
from eval.report import console_table, csv_table, failures, html_report, pair_table
from eval.sentences import requests, sentence
from eval.tasks import Task, load_task
from eval.verifier_metrics import loss_at
from eval.verifier_report import read_report
from parse import Engine
from parse.local.model import LocalModel
from parse.prompts import opens_thinking
from parse.remote.model import RemoteModel, cached_share
from recipes import strict
from recipes.files import write_text
from recipes.machine import environment, hardware, process_memory
from recipes.pair import load_engine
from recipes.schema import Recipe, RecipeError, to_dict

Outcomes = dict[str, list[Outcome]]  # by method


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Measure the run, write what was found into its folder and show it."""
    if recipe.eval.threads:
        torch.set_num_threads(recipe.eval.threads)
    draft, verifier = parts_of(recipe)
    report = read_report(verifier) if verifier else None
    promised = report["max_accuracy_loss"] if report else recipe.verifier.max_accuracy_loss
    task, engine = load_task(recipe.task, to_dict(recipe.data)), _ready(recipe)
    checks = parity.compare(engine, recipe)
    for check in checks:
        if check.difference:
            print(f"warning: {check.name} {check.difference}; what was trained is not what is served")
    calibration = engine.verifier.calibration if engine.verifier else None
    thresholds = calibration.thresholds if calibration else {}
    before = _metrics(engine)
    sizes = {role: _size(role, engine) for role in engine.models}
    found = _compared(recipe, task, engine, thresholds)
    cached = cached_share(before, _metrics(engine))
    tables = {at_once: _summarized(task, engine, outcomes, promised) for at_once, outcomes in found.items()}
    first = loads_of(recipe)[0]
    outcomes = found[first]
    summary: dict[str, Any] = {
        "name": recipe.name,
        "task": {"name": recipe.task, "about": task.about},
        "models": sizes,
        "draft": draft and str(draft),
        "verifier": verifier and str(verifier),
        "hardware": hardware(),
        "process_memory_gib": process_memory(),
        "servers": engine.served,
        "prefix_cache_share": cached,  # of the target's tokens, where it is on a server
        "judge": _judge(recipe, engine, task),
        "lookahead": recipe.engine.lookahead,
        "max_accuracy_loss": promised,
        "threshold": thresholds.get(recipe.engine.policy),
        "at_once": first,
        "methods": tables[first],
        "concurrency": [{"at_once": n, "methods": table} for n, table in tables.items() if n != first],
        "pair": None,
        "sweep": [],
        "parity": {check.name: check.text for check in checks},
    }
    _write(recipe, summary, outcomes, report)  # now, so that nothing is lost where what follows fails
    # which sentences of an answer are right is known, and the target's states are here
    if "draft" in outcomes and task.first_wrong and not engine.served:
        summary["pair"] = measure_pair(engine, task, outcomes["target"], outcomes["draft"])
    if "parse" in outcomes:
        summary["sweep"] = _sweep(engine, task, recipe, thresholds, outcomes, report)
    _write(recipe, summary, outcomes, report)
    _show(recipe, summary, tables)
    return summary


def _size(role: str, engine: Engine) -> dict[str, Any]:
    """A model's name, and what is known of its size where it is on this machine."""
    model = engine.models[role]
    size: dict[str, Any] = {"name": model.name, "parameters": None, "layers": None}
    if isinstance(model, LocalModel):
        size["parameters"] = model.runner.model.num_parameters()
        size["layers"] = getattr(model.runner.model.config.get_text_config(), "num_hidden_layers", None)
    return size


def _metrics(engine: Engine) -> str:
    """The figures of the target's server; none where it is on this machine."""
    target = engine.models["target"]
    return target.metrics() if isinstance(target, RemoteModel) else ""


def _ready(recipe: Recipe) -> Engine:
    """The engine with the draft and the verifier that are evaluated, warmed up.

    Raises:
        RecipeError: where the verifier is not calibrated for these settings.
    """
    section = recipe.engine
    engine = load_engine(recipe, *parts_of(recipe), section.compile)
    if engine.verifier:
        assert engine.verifier.calibration is not None  # it was saved with one
        try:
            engine.verifier.calibration.threshold(section.policy, section.handback, section.horizon, engine.segments)
        except ValueError as error:
            raise RecipeError(f"engine: {error}") from error
    if section.compile is not False:
        engine.warm_up(max(loads_of(recipe)))
    return engine


def _compared(recipe: Recipe, task: Task, engine: Engine, thresholds: dict[str, float]) -> dict[int, Outcomes]:
    """What each method answered, by the number of requests at once."""
    prompts = [prompt for _, prompt in prompts_of(recipe, task, "eval").prompts]
    methods = settings_of(recipe, thresholds, methods_of(recipe, engine, prompts))
    others: dict[str, Engine | TransformersGenerate] = {
        name: TransformersGenerate(engine, assisted=name == "assisted")
        for name in methods.keys() & {"generate", "assisted"}
    }
    if "speculation" in methods and recipe.eval.speculation_draft:
        others["speculation"] = _speculating(engine, recipe)
    for name in methods.keys() & KINDS.keys():
        others[name] = engine.judged_by(verifier_of_kind(recipe, KINDS[name]))
    found, agreement = {}, _agreement(recipe, engine, task)
    for at_once in (loads := loads_of(recipe)):
        # transformers allows assisted generation one request at a time, which is in the first table
        some = {name: how for name, how in methods.items() if at_once == loads[0] or name != "assisted"}
        what = "methods" if at_once == 1 else f"methods, {at_once} at once"
        warmup = max(recipe.eval.warmup, at_once if at_once > 1 else 0)
        found[at_once] = compare(engine, task, prompts, some, warmup, what, agreement, at_once, others)
    return found


def _agreement(recipe: Recipe, engine: Engine, task: Task) -> Agreement | None:
    """Who compares answers, by the threshold of the labels; None where the task checks them itself."""
    if task.checks:
        return None
    return Agreement(engine, 0, asked_by(recipe, engine), float(_noise(recipe).get("threshold", 0.5)))


def _noise(recipe: Recipe) -> dict[str, Any]:
    """How far labels can be trusted, as the stage `rollouts` measured it; empty where it did not."""
    labels = recipe.rollouts_folder / "labels.json"
    return dict(json.loads(labels.read_text())) if labels.is_file() else {}


def _judge(recipe: Recipe, engine: Engine, task: Task) -> dict[str, Any] | None:
    """Who compares answers with the target's own, and how often wrongly; None where the task checks them itself."""
    if task.checks:
        return None
    server, noise = recipe.rollouts.judge, _noise(recipe)
    by = f"{server.model or recipe.target} at {server.url}" if server else engine.models["target"].name
    errors = {key: noise.get(key) for key in ("threshold", "same_called_different", "different_called_same")}
    return {"by": by, **errors}


def _summarized(task: Task, engine: Engine, outcomes: Outcomes, promised: float) -> list[dict[str, Any]]:
    facts = task, opens_thinking(engine.tokenizer), promised
    return [summarize(name, some, outcomes["target"], *facts) for name, some in outcomes.items()]


def _write(recipe: Recipe, summary: dict[str, Any], outcomes: Outcomes, verifier: dict[str, Any] | None) -> None:
    folder = recipe.folder / "eval"
    folder.mkdir(exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "summary.csv", csv_table(summary))
    write_text(folder / "report.html", html_report(summary, outcomes, verifier, _origin(recipe, summary)))
    write_text(folder / "transcripts.jsonl", _transcripts(outcomes))


def _origin(recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    """How the evaluation was made, for its page."""
    machine = environment()
    facts = [("machine", machine["hardware"]), ("commit", machine["git_commit"] or "unknown")]
    facts += [("Python", machine["python"]), ("process memory", f"{summary['process_memory_gib']:.1f} GiB at most")]
    facts += [(name, version) for name, version in machine["packages"].items() if version]
    facts += [(name, str(getattr(recipe, name))) for name in ("target", "task")]
    facts += [("on a server", name) for name in summary["servers"]]
    if (share := summary["prefix_cache_share"]) is not None:
        facts.append(("its prefix cache held", f"{share:.1%} of the tokens that it was given"))
    facts += [(name, summary[name]) for name in ("draft", "verifier") if summary[name]]
    return {"facts": facts, "recipe": strict.dump(to_dict(recipe))}


def _show(recipe: Recipe, summary: dict[str, Any], tables: dict[int, list[dict[str, Any]]]) -> None:
    prompts = summary["methods"][0]["n"]
    if summary["pair"]:
        print(f"\nthe pair of models, on {prompts} test prompts\n{pair_table(summary['pair'])}")
    for at_once, table in tables.items():
        title = "" if list(tables) == [1] else f"{requests(at_once)}, {prompts} prompts\n"
        print(f"\n{title}{console_table(table)}")
        for name, prompt, why in failures(table)[:10]:
            print(f"{name}: the request for prompt {prompt} failed: {why}")
        if len(failed := failures(table)) > 10:
            print(f"... and {len(failed) - 10} more requests, named in the report")
    if told := sentence(summary):
        print(f"\n{told}")
    print(f"\nreport: {recipe.folder / 'eval' / 'report.html'}\n", flush=True)


def _speculating(engine: Engine, recipe: Recipe) -> Engine:
    """The engine's target with another draft."""
    other = Engine.from_pretrained(
        engine.target,
        recipe.eval.speculation_draft,
        tokenizer=engine.tokenizer,
        segments=recipe.segments,
        compile=False if recipe.engine.compile is False else None,
    )
    if recipe.engine.compile is not False:
        other.models["draft"].warm_up(max(loads_of(recipe)))
    other.models["target"] = other.pair.target = engine.models["target"]
    return other


def _sweep(
    engine: Engine,
    task: Task,
    recipe: Recipe,
    thresholds: dict[str, float],
    outcomes: Outcomes,
    verifier: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """PARSE at other thresholds: speed-up, timed on the first prompts, and accuracy.

    Where the verifier's report says what thresholds lose of its labelled test prompts, the accuracy is that of the
    calibrated threshold and what another one loses more or less; else that of the prompts on which it was timed.
    """
    methods = settings_of(recipe, thresholds, ["target", "parse"])
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
        _agreement(recipe, engine, task),
        loads_of(recipe)[0],
    )
    baseline = sum(o.seconds for o in ran.pop("target"))
    use = []  # of the labelled test prompts, where they say what this policy keeps
    if verifier and verifier.get("policy") == recipe.engine.policy:
        use = verifier["curves"][verifier["chosen"]]["use"]
    calibrated = sum(o.right for o in outcomes["parse"]) / len(outcomes["parse"])
    points = []
    for name, some in ran.items():
        threshold = variants[name]["threshold"]
        accuracy = sum(o.right for o in some) / len(some)
        if use:
            change = loss_at(use, methods["parse"]["threshold"]) - loss_at(use, threshold)
            accuracy = min(max(calibrated + change, 0.0), 1.0)
        speedup = baseline / sum(o.seconds for o in some)
        point = {"threshold": threshold, "speedup": speedup, "accuracy": accuracy}
        points.append({**point, "by_labels": bool(use), "n": len(some)})
    return points


def _transcripts(outcomes: Outcomes) -> str:
    rows = [{"method": name, **outcome.record} for name, some in outcomes.items() for outcome in some]
    return "".join(json.dumps(row) + "\n" for row in rows)
