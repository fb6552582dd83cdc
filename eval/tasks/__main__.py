"""python -m eval.tasks TASK OUT [--rows N]: a task's prompts as rows of a JSONL file, as one writes one's own.

Each row names its split: of ten rows four are for the draft's answers, three for the verifier, two for its threshold
and one for tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from eval.tasks import TASKS, draw_prompts, load_task
from recipes.files import write_text

SHARES = {"answers": 0.4, "train": 0.3, "calibration": 0.2, "test": 0.1}


def main(arguments: list[str] | None = None) -> int:
    """Write the rows."""
    parser = argparse.ArgumentParser(prog="python -m eval.tasks", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--rows", type=int, default=3000, help="how many prompts, of all splits (default: 3000)")
    options = parser.parse_args(arguments)
    if options.rows < 10:
        parser.error(f"--rows is {options.rows}: give 10 or more, of which each split has one")
    task, seen, lines = load_task(options.task), set[str](), list[str]()
    for seed, (split, share) in enumerate(SHARES.items()):
        for prompt in draw_prompts(task, split, round(share * options.rows), seed):
            if str(prompt) not in seen:
                seen.add(str(prompt))
                lines.append(json.dumps({"prompt": prompt, "split": split}) + "\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, "".join(lines))
    print(f"{len(lines)} prompts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
