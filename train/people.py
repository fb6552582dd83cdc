"""python -m train.people OUT [--data FOLDER] [--rows N]: people's descriptions of restaurants as rows of prompts.

Each row is a prompt of the task `restaurants` and, as its reference, an answer made of descriptions by people, out of
the cleaned E2E NLG data (CC BY-SA 4.0, see `eval.tasks.restaurants`): of a folder of its CSV files, or from the hub.
The task's own target and draft were first taught with such rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.tasks.restaurants import people, rows_of
from recipes.files import write_text
from recipes.progress import progress_bar

HUB = "tuetschek/e2e_nlg_cleaned"


def main(arguments: list[str] | None = None) -> int:
    """Write the rows as JSONL."""
    parser = argparse.ArgumentParser(prog="python -m train.people", description=__doc__)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--data", type=Path, help=f"a folder of CSV files (mr, ref); else {HUB} from the hub")
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        rows = _from_hub() if options.data is None else list(rows_of(options.data))
        lines = []
        with progress_bar("rows", total=options.rows) as bar:
            for prompt, answer in people(rows, options.rows, options.seed):
                lines.append(json.dumps({"prompt": prompt, "reference": answer, "split": "answers"}) + "\n")
                bar.update()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, "".join(lines))
    return 0


def _from_hub() -> Iterable[Mapping[str, str]]:
    from datasets import load_dataset

    return load_dataset(HUB, split="train")  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
