"""What files hold, as hex digests: so a stage knows its inputs and its outputs by content, not by name or date.

The digest of a large file is kept in a small index and made anew only where the file's size or date has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from parse.local.loading import base_of
from recipes.files import files_in

LARGE = 2**24  # bytes
MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".py"}  # what loading a model reads
CONTENT = {".arrow", ".safetensors", ".jinja"}  # of a stage's outputs, what later stages read


class Digests:
    """Digests of files, with an index of the large ones where a file is given for it."""

    def __init__(self, index: Path | None = None) -> None:
        self._path = index
        self._known: dict[str, Any] = {}
        if index is None:
            return
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is there to save time alone
            self._known = dict(json.loads(index.read_text()))

    def of_file(self, path: Path) -> str:
        """The sha256 of a file's bytes."""
        stat, key = path.stat(), str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if isinstance(known, list) and known[:2] == stamp:
            return str(known[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stat.st_size >= LARGE and self._path is not None:
            self._known[key] = [*stamp, digest]
            if self._path.parent.is_dir():
                self._path.write_text(json.dumps(self._known))
        return digest

    def of_folder(self, folder: Path) -> dict[str, str]:
        """The digest of every file in a folder, by its path in there."""
        return {path.relative_to(folder).as_posix(): self.of_file(path) for path in files_in(folder)}

    def of_model(self, source: str) -> str:
        """A model's folder by what loading it reads; a model of the hub by its revision."""
        folder = Path(source)
        if not folder.is_dir():
            return str(extract_commit_hash(cached_file(source, "config.json"), None) or source)
        files = [self.of_file(path) for path in files_in(folder) if path.suffix in MODEL_FILES]
        base = base_of(source)
        return of_values(files if base == source else [*files, self.of_model(base)])


def content_of(wrote: dict[str, str]) -> str:
    """The digest of what later stages read of a stage's files: data and weights, no reports and no times."""
    return of_values(f"{name} {digest}" for name, digest in sorted(wrote.items()) if Path(name).suffix in CONTENT)


def of_values(values: Iterable[Any]) -> str:
    """The digest of plain data."""
    return hashlib.sha256(json.dumps(list(values), sort_keys=True).encode()).hexdigest()
