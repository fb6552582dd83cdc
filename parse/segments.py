"""Where an answer may be cut: the prefix ends at which the target gives a verdict.

A segmenter is written as `"sentence"`, `"line"`, or a number of tokens, the same in recipes, in
`verifier.json` and in the engine. Ends are token counts: prefix `e` is `ids[:e]`. They depend on
the text alone, so that training and engine cut alike, and any end is correct; a better one only
saves work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from parse.models import text_of

Segmenter = str | int

_CLOSERS = {"sentence": re.compile(r"[.!?…。！？][\"'”’)\]]*$|\n$"), "line": re.compile(r"\n$")}  # noqa: RUF001
_CONTEXT = 8  # tokens decoded before a candidate, enough for any character and closing quote


def check_segmenter(segmenter: Segmenter) -> None:
    """Raise ValueError unless `segmenter` is "sentence", "line" or a positive number of tokens."""
    if isinstance(segmenter, bool) or not (segmenter in _CLOSERS or (isinstance(segmenter, int) and segmenter > 0)):
        raise ValueError(
            f'segments={segmenter!r} is not a segmenter: use "sentence", "line" or a positive number of tokens'
        )


def cut(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter = "sentence") -> list[int]:
    """Prefix ends of a draft: strictly increasing, the last one `len(ids)`; empty for no tokens.

    Args:
        ids: the draft's N tokens without its end-of-sequence token, in the target's vocabulary.
        tokenizer: the target's.
        segmenter: "sentence", "line", or a number of tokens.
    """
    check_segmenter(segmenter)
    if isinstance(segmenter, int):
        ends = list(range(segmenter, len(ids), segmenter))
    else:
        candidates = _closing_tokens(tokenizer, segmenter)
        ends = [k + 1 for k in range(len(ids) - 1) if ids[k] in candidates and _ends_here(ids, k, tokenizer, segmenter)]
    return [*ends, len(ids)] if ids else []


def ends_segment(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter = "sentence") -> bool:
    """Whether a text that is still being written may be cut behind its last token.

    The next token is not known yet: a sentence closer counts as the end of its sentence.
    """
    if isinstance(segmenter, int):
        return len(ids) >= segmenter
    if not ids or ids[-1] not in _closing_tokens(tokenizer, segmenter):
        return False
    return bool(_CLOSERS[segmenter].search(text_of(ids[-_CONTEXT:], tokenizer)))


def _ends_here(ids: Sequence[int], k: int, tokenizer: PreTrainedTokenizerBase, segmenter: str) -> bool:
    """Whether the text up to token k closes a segment and the next token starts a new word."""
    start = max(0, k + 1 - _CONTEXT)
    text = text_of(ids[start : k + 1], tokenizer)
    following = text_of(ids[start : k + 2], tokenizer)[len(text) :]
    if not following.strip():  # blank space belongs to the segment before it
        return False
    return bool(_CLOSERS[segmenter].search(text)) and (text.endswith("\n") or following[0].isspace())


@lru_cache(maxsize=16)
def _closing_tokens(tokenizer: PreTrainedTokenizerBase, segmenter: str) -> frozenset[int]:
    """Tokens whose own text can close a segment; a quick sieve before any decoding in context."""
    texts = [text_of([i], tokenizer) for i in range(len(tokenizer))]
    return frozenset(i for i, text in enumerate(texts) if _CLOSERS[segmenter].search(text))
