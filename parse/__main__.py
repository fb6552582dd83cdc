"""python -m parse "a question" --run runs/quickstart: answer from a terminal, and show how."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parse.options import Parser, add_models, add_settings, count, message_of, quieten
from parse.sources import load

if TYPE_CHECKING:  # torch and transformers take seconds to import: `--help` and a mistyped option do not wait for them
    from parse.generation import Generation, Segment
    from parse.local.loading import Messages

COLOURS = {"kept": "32", "cut": "9;31", "target": "34", "faint": "2"}  # ANSI styles


def main(arguments: list[str] | None = None) -> int:
    """Answer prompts with the models of a run folder, or with those given; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["serve"]:
        from parse.server.command import main as serve

        return serve(words[1:])
    if words[:1] == ["fold"]:
        from parse.remote.fold import main as fold

        return fold(words[1:])
    given = vars(_parser().parse_args(words))
    try:
        prompts = _read_prompts(given)
        with warnings.catch_warnings():
            quieten()
            results = _answer(prompts, given)
        colour = sys.stdout.isatty() and "no_colour" not in given
        for prompt, result in zip(prompts, results, strict=True):
            if "json" in given:
                print(json.dumps({"prompt": prompt, **dataclasses.asdict(result)}))
            elif len(prompts) > 1:
                print(_heading(prompt, colour), transcript(result, colour), sep="\n", end="\n\n")
            else:
                print(transcript(result, colour))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 141  # as shells report it
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (message := message_of(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    """The command line. What is not given is not in its outcome: defaults are the run's and the engine's."""
    parser = Parser("python -m parse", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", default=[], help="questions, each asked as a user's turn")
    parser.add_argument(
        "--file", help='more, a line each: text, or JSON with "prompt" or "messages"; -: standard input'
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    parser.add_argument("--no-colour", action="store_true", help="default where the output is no terminal")
    add_models(parser)
    settings = add_settings(parser)
    settings.add_argument("--raw", action="store_true", help="prompts are the whole text that the models read")
    settings.add_argument("--batch-size", type=count, help="prompts that are answered at once")
    return parser


# prompts


def _read_prompts(given: dict[str, Any]) -> list[str | Messages]:
    """The prompts of the command line, then those of the file."""
    prompts: list[str | Messages] = [*given["prompts"]]
    source = given.get("file", None if prompts or sys.stdin.isatty() else "-")
    if source is not None:
        prompts += _read_file(source)
    if not prompts:
        raise ValueError("no prompt is given: name one, or --file FILE, or write some to standard input, one per line")
    for number, prompt in enumerate(prompts, 1):
        try:
            json.dumps(prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {number} is no valid Unicode text ({error.reason})") from error
    return prompts


def _read_file(source: str) -> list[str | Messages]:
    where = "standard input" if source == "-" else f"--file {source}"
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # and at no other character, which text may hold
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}; give a text file with one prompt per line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    return [_row(line, f"{where}, line {n}") for n, line in enumerate(map(str.strip, lines), 1) if line]


def _row(line: str, where: str) -> str | Messages:
    """A line's prompt: the line itself, or what stands in its JSON object."""
    if not line.startswith("{"):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} begins with {{ and is no JSON object: {error}") from error
    prompt = row.get("prompt", row.get("messages"))
    turns = "messages" in row and isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)
    if ("prompt" in row) == ("messages" in row) or not (turns or ("prompt" in row and isinstance(prompt, str))):
        raise ValueError(
            f'{where} must hold either "prompt", a text, or "messages", a list of turns with "role" and "content"; its '
            f"keys are {', '.join(row) or 'none'}"
        )
    return prompt  # type: ignore[no-any-return]


# the answer


def _answer(prompts: list[str | Messages], given: dict[str, Any]) -> list[Generation]:
    """Answer the prompts; all that is given is checked before a model is loaded."""
    engine, settings, _ = load(given)
    return engine.generate(prompts, **settings, **{name: given[name] for name in {"batch_size", "raw"} & given.keys()})


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


def _heading(prompt: str | Messages, colour: bool) -> str:
    words = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return _paint(f"> {words}", "faint", colour)


def _paint(text: str, style: str, colour: bool) -> str:
    return f"\033[{COLOURS[style]}m{text}\033[0m" if colour else text


if __name__ == "__main__":
    sys.exit(main())
