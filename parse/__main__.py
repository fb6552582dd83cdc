"""python -m parse "a question" --run runs/quickstart: answer from a terminal, and show how."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from parse.sources import MODEL, OPTIONS, VERIFIER, find, read_recipe, without_code

if TYPE_CHECKING:  # torch and transformers take seconds to import: `--help` and a mistyped option do not wait for them
    from parse.generation import Generation, Segment
    from parse.local.loading import Messages

EXPECTED = (OSError, ValueError, RuntimeError, ImportError)  # what libraries raise for what users can mend
COLOURS = {"kept": "32", "cut": "9;31", "target": "34", "faint": "2"}  # ANSI styles


def main(arguments: list[str] | None = None) -> int:
    """Answer prompts with the models of a run folder, or with those given; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    try:
        prompts = _read_prompts(given)
        with warnings.catch_warnings():
            _quieten()
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
        if (message := _message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `python -m parse --help` tells what is allowed\n")


def _parser() -> _Parser:
    """The command line. What is not given is not in its outcome: defaults are the run's and the engine's."""
    parser = _Parser("python -m parse", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", default=[], help="questions, each asked as a user's turn")
    parser.add_argument(
        "--file", help='more, a line each: text, or JSON with "prompt" or "messages"; -: standard input'
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    parser.add_argument("--no-colour", action="store_true", help="default where the output is no terminal")
    models = parser.add_argument_group("models")
    models.add_argument("--run", help="a run folder, such as runs/quickstart: its models and settings")
    models.add_argument("--target", help=f"{MODEL}; default: the run's")
    models.add_argument("--draft", help="like --target")
    models.add_argument("--verifier", help=f"{VERIFIER}; default: the run's")
    models.add_argument("--segments", type=_value, help="where an answer may be cut: sentence, line or every N tokens")
    models.add_argument("--compile", action="store_true", help="compile passes first where that pays: for many prompts")
    settings = parser.add_argument_group("settings", "as of Engine.generate; default: the run's, else the engine's")
    settings.add_argument("--method", help="parse, target (alone) or draft (alone)")
    settings.add_argument("--threshold", type=float, help="accept confidences at or above it; default: as calibrated")
    settings.add_argument("--policy", help="first_fail, longest or whole")
    settings.add_argument("--handback", help="segment or never")
    settings.add_argument("--horizon", type=_value, help="tokens of a draft, segment, or none for no limit")
    settings.add_argument("--lookahead", type=int, help="tokens that the draft proposes while the target writes")
    settings.add_argument("--max-new-tokens", type=int)
    settings.add_argument("--temperature", type=float, help="0 is greedy")
    settings.add_argument("--top-k", type=int)
    settings.add_argument("--top-p", type=float)
    settings.add_argument("--seed", type=int, help="the same seed gives the same answer")
    settings.add_argument("--raw", action="store_true", help="prompts are the whole text that the models read")
    settings.add_argument("--batch-size", type=_count, help="prompts that are answered at once")
    return parser


def _value(text: str) -> int | str | None:
    """A number of tokens where it is one, None for "none", else the word."""
    try:
        return int(text)
    except ValueError:
        return None if text == "none" else text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1")
    return int(text)


def _quieten() -> None:
    """Keep the libraries' bars, and their notices for other programmers, away; what is left to say takes a line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _note


def _note(message: object, *_: object, **__: object) -> None:
    print(f"note: {_one_line(message)}", file=sys.stderr)


def _message(error: Exception) -> str | None:
    """What to say of an error that its user can mend; None for a fault of the program."""
    text = _one_line(error)
    memory = ("out of memory", "can't allocate memory", "MemoryError")
    if isinstance(error, MemoryError) or any(words in text for words in memory):
        return f"memory has run out: lower --batch-size or --max-new-tokens, or use smaller models ({text[:200]})"
    return text if isinstance(error, EXPECTED) else None


def _one_line(words: object) -> str:
    return " ".join(str(words).split())


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
    recipe = read_recipe(Path(given["run"])) if "run" in given else {}

    from parse.generation import Settings
    from parse.segments import check_segmenter

    names = {field.name for field in dataclasses.fields(Settings)}
    of_run = {"max_new_tokens"} if given.get("method") in ("target", "draft") else names  # alone: without rounds
    section = recipe.get("engine", {})
    chosen = {name: section[name] for name in of_run & section.keys()}
    chosen |= {name: given[name] for name in names & given.keys()}
    try:
        settings = Settings(**chosen)
    except TypeError as error:
        raise ValueError(f"a setting among {chosen} is of the wrong type: {error}") from error
    segments = given.get("segments")
    if segments is not None:
        check_segmenter(segments)
    needed = {"target": True, "draft": settings.method != "target" or settings.lookahead > 0}
    needed["verifier"] = settings.method == "parse"
    parts: dict[str, Any] = {part: find(part, given, recipe) for part, need in needed.items() if need}
    parts |= {name: without_code(section.get(name)) for name in OPTIONS}

    from parse.engine import Engine

    try:
        engine = Engine.from_pretrained(**parts, segments=segments, compile=given.get("compile"))
    except Exception as error:  # of whatever kind a library raises for a file that it cannot read
        named = ", ".join(parts[part] for part, need in needed.items() if need)
        kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        raise ValueError(f"{named}: loading fails: {kind}{error}") from error
    return engine.generate(prompts, **chosen, **{name: given[name] for name in {"batch_size", "raw"} & given.keys()})


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
