"""What an experiment is: the typed recipe, the run folder, and the recipes themselves."""

from importlib.util import find_spec
from pathlib import Path

_found = find_spec("parse")
if _found is None or not (Path(_found.origin or "").parent / "layout.py").is_file():
    raise ImportError(
        f"`import parse` finds {_found.origin if _found else 'nothing'}, not this project's package: another "
        "distribution is called parse too. Remove it (`pip uninstall parse`), install this project "
        "(`pip install -e .`), or run from the project's folder."
    )
