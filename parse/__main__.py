"""python -m parse "a question" --run runs/quickstart: answer from a terminal, and show how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from parse.answer import METHODS, Generation, Segment
from parse.engine import Engine

COLOURS = {"kept": "32", "cut": "9;31", "target": "34", "faint": "2"}  # ANSI styles


def main(arguments: list[str] | None = None) -> int:
    """Answer a prompt with the models of a run folder, or with those given; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m parse", description=__doc__)
    parser.add_argument("prompt", help="the question, asked as a user's turn")
    parser.add_argument("--run", help="a run folder, such as runs/quickstart: its target, draft and verifier")
    parser.add_argument("--target", help="path or hub id; default: the run's")
    parser.add_argument("--draft", help="path or hub id; default: the run's")
    parser.add_argument("--verifier", help='a folder, "prompt" or "likelihood"; default: the run\'s')
    parser.add_argument("--threshold", type=float, help="default: the verifier's own, calibrated")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--method", choices=METHODS, default="parse")
    parser.add_argument("--no-colour", action="store_true", help="default where the output is no terminal")
    options = parser.parse_args(arguments)
    try:
        target, draft, verifier = _parts(options)
        engine = Engine.from_pretrained(target, draft, verifier)
        result = engine.generate(
            options.prompt, options.max_new_tokens, threshold=options.threshold, method=options.method
        )[0]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    colour = sys.stdout.isatty() and not options.no_colour
    print(transcript(result, colour))
    return 0


def _parts(options: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """Target, draft and verifier: what is given, else what the run folder holds."""
    target, draft, verifier = options.target, options.draft, options.verifier
    if options.run:
        folder = Path(options.run)
        if not (folder / "recipe.yaml").is_file():
            raise FileNotFoundError(
                f"--run {options.run}: no recipe.yaml there; `make quickstart` makes runs/quickstart"
            )
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        target = target or recipe["target"]
        aligned = "align" in recipe["stages"]
        draft = draft or str(folder / ("draft-lora" if aligned else "draft"))
        verifier = verifier or str(folder / "verifier")
    if not target:
        raise ValueError("give --run FOLDER, or --target with --draft and --verifier")
    return target, draft, verifier


def transcript(result: Generation, colour: bool) -> str:
    """The answer with its history: what was accepted, rejected and repaired, and each cut's confidence.

    Without colour, rejected text stands in [-brackets-] and the target's in {+braces+}.
    """
    lines = [_line(segment, colour) for segment in result.segments]
    stats = result.stats
    seconds = sum(stats.seconds.values())
    summary = (
        f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted, {stats.target_tokens} by the "
        f"target, {stats.rounds} rounds, {seconds:.2f} s, {result.finish_reason}"
    )
    return "\n".join([*lines, "", result.text, "", _paint(summary, "faint", colour)])


def _line(segment: Segment, colour: bool) -> str:
    style = "target" if segment.source == "target" else "kept" if segment.accepted else "cut"
    confidence = "     " if segment.confidence is None else f"{segment.confidence:5.2f}"
    text = segment.text.strip()
    if not colour:
        text = {"kept": text, "cut": f"[-{text}-]", "target": f"{{+{text}+}}"}[style]
    return f"{_paint(confidence, 'faint', colour)}  {segment.source:6s}  {_paint(text, style, colour)}"


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\033[{COLOURS[style]}m{text}\033[0m" if colour else text


if __name__ == "__main__":
    sys.exit(main())
