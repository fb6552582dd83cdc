"""One self-contained HTML page (`templates/page.html`): sentences, tables with plots, transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = {  # sorts of transcripts
    "all": "all",
    "false-accept": "wrong drafts accepted",
    "rejected": "drafts rejected",
    "slow": "the slowest",
    "wrong": "wrong answers",
}


class Part(NamedTuple):
    """A table of the page, with what explains it and the plots after it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    ours: str | None = None  # the row that stands out, by its first cell
    terms: Mapping[str, str] | None = None
    plots: Sequence[str] = ()
    folded: bool = False  # shown when it is asked for


def page(
    title: str,
    sentences: Sequence[str],
    parts: Sequence[Part],
    transcripts: Sequence[dict[str, Any]] = (),
    made: dict[str, Any] | None = None,
) -> str:
    """A page of these parts."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    room = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    kinds = {kind for one in transcripts for kind in one["kinds"]}
    return room.get_template("page.html").render(
        title=title,
        sentences=[*filter(None, sentences)],
        tables=parts,
        transcripts=transcripts,
        filters={key: label for key, label in FILTERS.items() if key in kinds},
        made=made,
    )
