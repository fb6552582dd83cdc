"""python -m train.people OUT [--data FOLDER | --target FOLDER | --mix FILE ...]: rows to teach the task `restaurants`.

Each row is a prompt of the task and, as its reference, an answer made of descriptions by people, out of the cleaned E2E
NLG data (CC BY-SA 4.0, see `eval.tasks.restaurants`): of a folder of its CSV files, or from the hub. With `--target`, a
model that was taught so answers instead: of two sampled answers the right paragraphs are kept, so that it learns which
of its ways to say things are right. With `--mix` the right paragraphs of such files are put together anew, with other
names and values, as often as one likes: a small model learns from them to find in a prompt what it has to say. The
task's own target and draft were made by all three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from eval.tasks import TASKS, draw_prompts
from eval.tasks.restaurants import best_of, people, retold, rows_of
from recipes.files import write_text
from recipes.progress import progress_bar

HUB = "tuetschek/e2e_nlg_cleaned"
TEMPERATURE = 0.6  # at which a target answers
SAMPLES = 2  # answers to each prompt
AT_ONCE = 64
APART = 1000  # added to the seed, so that the prompts are others than a run's


def main(arguments: list[str] | None = None) -> int:
    """Write the rows as JSONL."""
    parser = argparse.ArgumentParser(prog="python -m train.people", description=__doc__)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--data", type=Path, help=f"a folder of CSV files (mr, ref); else {HUB} from the hub")
    parser.add_argument("--target", type=Path, help="a model, or a LoRA, that answers in people's place")
    parser.add_argument("--mix", type=Path, nargs="+", default=[], help="files of rows whose paragraphs are mixed anew")
    parser.add_argument("--rows", type=int, default=16_000, help="rows, or prompts that the target is asked")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if sum(map(bool, (options.data, options.target, options.mix))) > 1:
        parser.error("give --data, --target or --mix, one of them")
    try:
        if options.target:
            found = _by_target(options.target, options.rows, options.seed)
        elif options.mix:
            found = retold(_answers_in(options.mix), options.rows, options.seed)
        else:
            found = people(_rows(options.data), options.rows, options.seed)
        lines = []
        with progress_bar("rows", total=options.rows) as bar:
            for prompt, answer in found:
                if answer is not None:
                    lines.append(json.dumps({"prompt": prompt, "reference": answer, "split": "answers"}) + "\n")
                bar.update()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, "".join(lines))
    return 0


def _rows(folder: Path | None) -> Iterable[Mapping[str, str]]:
    if folder is not None:
        return list(rows_of(folder))
    from datasets import load_dataset

    return load_dataset(HUB, split="train")  # type: ignore[no-any-return]


def _answers_in(files: Iterable[Path]) -> list[tuple[str, str]]:
    """The prompts and references of files that this command wrote."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    try:
        return [(row["prompt"], row["reference"]) for row in map(json.loads, lines)]
    except (KeyError, TypeError) as error:
        raise ValueError("--mix takes JSONL files of rows with `prompt` and `reference`, as --target writes") from error


def _by_target(target: Path, count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """Training prompts, and an answer to each of what the target says rightly; None where that is not all of it."""
    import torch

    from parse import Engine

    engine = Engine.from_pretrained(target, dtype=torch.bfloat16)
    prompts = [str(prompt) for prompt in draw_prompts(TASKS["restaurants"], "train", count, APART + seed)]
    for start in range(0, count, AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answers = [
            engine.generate(
                some, 256, method="target", batch_size=AT_ONCE, temperature=TEMPERATURE, seed=start + sample
            )
            for sample in range(SAMPLES)
        ]
        for prompt, *told in zip(some, *answers, strict=True):
            yield prompt, best_of(prompt, [answer.text for answer in told])


if __name__ == "__main__":
    sys.exit(main())
