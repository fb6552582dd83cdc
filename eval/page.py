"""One self-contained HTML page (`templates/page.html`): sentences, tables with plots, transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from eval.plots import Picture

TEMPLATES = Path(__file__).parent / "templates"


class Part(NamedTuple):
    """A table of the page, with what explains it and the pictures after it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    marked: str | None = None  # the row that stands out, by its first cell
    terms: Mapping[str, str] | None = None
    pictures: Sequence[Picture] = ()
    folded: bool = False  # shown when it is asked for


def page(
    title: str,
    sentences: Sequence[str],
    parts: Sequence[Part],
    transcripts: Sequence[Mapping[str, Any]] = (),
    filters: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
    choice: str = "",
) -> str:
    """The page's HTML.

    Args:
        sentences: at the top; empty ones are left out.
        transcripts: `kinds`, the filters that show it; `title`, `prompt`, and `pieces` with `style` (kept, cut or
            written, the classes of `page.css`), `text` and `confidence`.
        filters: their words, by name.
        origin: how it was made: `facts`, pairs of words, and `recipe`, YAML.
        choice: how the transcripts were chosen, in words.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html").render(
        title=title,
        sentences=[*filter(None, sentences)],
        parts=parts,
        transcripts=transcripts,
        filters=filters or {},
        origin=origin,
        choice=choice,
    )
