"""Files and folders that are whole or not there, with the rights that the user's umask gives."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def replace_folder(old: Path, new: Path) -> None:
    """Put a folder in the place of another, which goes when the new one is there."""
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.is_dir():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def set_rights(folder: Path) -> None:
    """Give all files of a folder the rights that the umask allows: libraries save weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in files_in(folder):
        path.chmod(0o666 & ~umask)


def files_in(folder: Path) -> list[Path]:
    """All files of a folder, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
