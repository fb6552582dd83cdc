"""Where an answer may be cut: the prefix ends at which the target gives a verdict.

A segmenter is written as `"sentence"`, `"line"`, or a number of tokens, the same in recipes, in
`verifier.json` and in the engine. Ends are token counts: prefix `e` is `ids[:e]`. They depend on
the given text alone, so that training and engine cut alike, and any end is correct; a better one
only saves work. docs/segments.md says what is promised for each kind of text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache

import regex
from transformers import PreTrainedTokenizerBase

from parse.text import text_of

Segmenter = str | int

_CONTEXT = 16  # tokens: enough for a mark, what closes its sentence, and a character in bytes
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # the end of a text whose last character lacks bytes
_FLAGS = regex.VERBOSE | regex.MULTILINE | regex.VERSION1

# Words whose full stop ends no sentence; those whose full stop ends none before a number; and German nouns before
# which an ordinal's ends none. "approx." or "d. h." need no entry: before lower case no full stop ends a sentence.
_TITLES = """Mr Mrs Ms Mx Dr Prof Rev Hon Gen Sen Gov Capt Lt Col Sgt St Mt vs cf al Hr Hrn Frl bzw ca evtl ggf inkl
    vgl bspw sog Mme Mlle Sr Sra Srta Dra Ud Uds EE Sig Dott Dhr Mevr bijv ул им проф акад डॉ""".split()
_NUMBERED = """No Nos Nr Núm núm Fig Figs fig Eq Eqs Abb Tab Ch Chap Sec Vol vol Art art Kap Bd p pp pág cap рис стр
    гл ст Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec""".split()
_ORDINALS = "Jan Feb Mär Apr Mai Jun Jul Aug Sep Okt Nov Dez Jahr".split()

# Code and formulas, in which no sentence ends. What is not closed goes on: a fence to the end of the text, a displayed
# formula to an empty line, the rest to the end of the line. "$5" opens a formula only where the line closes it.
_LITERAL = regex.compile(
    r"""
      ^[ \t>]*+ (?:(?:[-*+]|\d+[.)])[ \t]+)?
      (?<fence>(?<ticks>`{3,}|~{3,}) (?s:.*?) (?: ^[ \t>]*(?P=ticks)[`~]*[ \t]*$ | \Z))
    | (?: \$\$ (?&shown) (?:\$\$|(?&broken)) | \\\[ (?&shown) (?:\\\]|(?&broken))
        | \\begin\{(?<name>(?:align|equation|gather|cases|split|array|.?matrix)\w*\*?)\}
          (?&shown) (?:\\end\{(?P=name)\}|(?&broken)))
    | `[^`\n]+(?:`|$) | \\\(.*?(?:\\\)|$)
    | (?<![\\\w])\$ (?: (?![\s\d$])(?:\\.|[^$\\\n])*+(?:\$|$|\\) | (?=\d)(?:\\.|[^$\\\n])*+(?<=\S)\$(?!\w))
    (?(DEFINE) (?<shown>(?:(?!\n[^\S\n]*\n)(?s:.))*?) (?<broken>(?=\n[^\S\n]*\n)|\Z))
    """,
    _FLAGS,
)

# A segment's end and the blank space after it, which is the segment's too. What follows may be unknown yet (`\Z`).
_LINE = regex.compile(r"(?<=\S)[^\S\n]*\n(?<blank>\s*)", _FLAGS)
_SENTENCE = regex.compile(
    r"""
      (?<![\p{STerm}…]) (?:
        (?<!\S) [.!?] (?=\s|\Z) (?![ \xa0\u202f]»)  # a mark that stands alone, as in tokenized text
      | (?: [\p{STerm}…]++ (?<![.!?…]|\uff0e(?=\d)) (?&closers)  # a mark of no other use, such as 。 and ।
          | (?! (?<= (?<!\w) (?:\L<titles> | (?!I)\p{Lu} | \p{L}\.\p{L})) \. (?!\.))  # Dr. or J. or U.S.
            (?! (?<= ^[ \t>*\#+•_(-]* (?:(?:\p{L}+[ ])?\d{1,3}(?:\.\d+){0,5}|\p{L}|[ivx]+)) \. (?!\.))  # 1. or Step 1.
            (?! (?<= (?<!\w)\L<numbered>) \.\s*\d | (?<= (?<!\w)\p{L}) \.\s?\p{L}\. | (?<=\d) \.[ ]\L<ordinals>)
            (?! (?<= \d | [./@\\_][!-~]{0,60}) [\p{STerm}…]++ (?&closers) (?!\s))  # 3.14 or www.: known by what follows
            [\p{STerm}…]++ (?! (?<=[.…]) (?&closers) [^\S\n]+ (?&openers) \p{SB=Lower})  # approx. or so... and
            (?! (?<=…|\.\.) (?&closers) \S)
            (?&closers) (?= \s | \Z | [\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}]))
        (?! [^\S\n]* (?:[\p{SB=SContinue}\p{Sm}--\p{Pd}] | \p{Pd}[^\S\n]*\p{SB=Lower}))  # "Oh!" — he said
        (?! (?<=["'\u2019”»」』]) [^\S\n]* (?:\p{SB=Lower} | と))  # "Oh!" he said
      ) (?<blank>\s*)
    | (?<=\S)[^\S\n]*\n(?<blank>\s*)
    | (?<=[[\p{Thai}\p{Lao}]--[ๆໆ]]) (?<blank>[^\S\n]+) (?=[[\p{Thai}\p{Lao}]--[ๆໆ]])  # unmarked: phrases
    (?(DEFINE)
      (?<closers>(?: [\p{Pe}\p{Pf}"'*_~] | [ ]?(?&emoji) | [ \xa0\u202f]»(?=\s) | \p{Pi}(?=\s|\Z))*+)
      (?<emoji>[\p{Extended_Pictographic}\p{RI}][\ufe0f\u200d\U0001F3FB-\U0001F3FF]*+)
      (?<openers>[\p{Ps}\p{Pi}"'*_¿¡]*)
    )
    """,
    _FLAGS,
    titles=_TITLES,
    numbered=_NUMBERED,
    ordinals=_ORDINALS,
)
_ENDS = {"sentence": _SENTENCE, "line": _LINE}

# Quick sieves for a text that is being written. The first is for the own text of its last token, or the one before;
# the second for the text of its last few.
_LAST = r"[\p{STerm}…\p{Pe}\p{Pf}\p{Pi}\"'*_~\s\p{Extended_Pictographic}\p{RI}\p{M}\p{Thai}\p{Lao}\ufffd]"
_SIEVE = regex.compile(rf"(?:{_LAST}|\A)\Z", _FLAGS)  # a space that stands alone may be lost
_NEAR = regex.compile(rf"[\p{{STerm}}…\n\p{{Thai}}\p{{Lao}}] {_LAST}*+ \S* \Z", _FLAGS)


def check_segmenter(segmenter: Segmenter) -> None:
    """Raise ValueError unless `segmenter` is "sentence", "line" or a positive number of tokens."""
    if isinstance(segmenter, bool) or not (segmenter in _ENDS or (isinstance(segmenter, int) and segmenter > 0)):
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
        ends = []
        text, lengths = _measured(ids, tokenizer)
        for start, stop in _ends(text, segmenter):
            length = lengths[bisect_right(lengths, stop) - 1]  # a cut stands between tokens only
            if start <= length < len(text):
                ends.append(bisect_left(lengths, length))
    return [*ends, len(ids)] if ids else []


def ends_segment(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, segmenter: Segmenter = "sentence") -> bool:
    """Whether a text that is still being written may be cut after its last token.

    The next token is not known yet: a mark counts as the end of its sentence, unless it follows a digit or an address,
    or the end is the space between Thai words. Those wait for the next character and are then cut after that one.
    """
    if isinstance(segmenter, int):
        return len(ids) >= segmenter
    if not any(token in _closing_tokens(tokenizer) for token in ids[-2:]):
        return False
    near = _last_text(ids, tokenizer)
    if near.endswith(_PARTIAL) or not _NEAR.search(near):
        return False
    before = len(ids) - 1  # without the last character, which may be several tokens
    while _last_text(ids[:before], tokenizer).endswith(_PARTIAL):
        before -= 1
    text, text_before = text_of(ids, tokenizer), text_of(ids[:before], tokenizer)
    since, position = max(0, len(text) - len(near)), len(text_before)
    if _may_end(text, len(text), segmenter, since):
        return True
    return _may_end(text, position, segmenter, since) and not _may_end(text_before, position, segmenter, since)


def _may_end(text: str, position: int, segmenter: str, since: int) -> bool:
    """Whether a segment may end at this character position; an end and its blank space begin at `since` at most."""
    return any(start <= position <= stop for start, stop in _ends(text, segmenter, since))


def _ends(text: str, segmenter: str, since: int = 0) -> Iterator[tuple[int, int]]:
    """Where segments end in a text, from position `since` on: where the blank space after each begins and ends."""
    if segmenter == "sentence":
        text = _LITERAL.sub(lambda m: regex.sub(r"\S" if m["fence"] else r"(?s).", "X", m[0]), text)
    return (match.span("blank") for match in _ENDS[segmenter].finditer(text, since))


def _measured(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The text of N tokens, and how many of its characters are whole after the first 0..N of them."""
    parts, lengths = [], [0]
    start = middle = 0  # the last two ends of a whole character: a decoder may need the token before
    known = ""  # the text between them
    for end in range(1, len(ids) + 1):
        near = text_of(ids[start:end], tokenizer)
        lengths.append(lengths[-1])
        if not near.endswith(_PARTIAL):
            parts.append(near[len(known) :])
            lengths[-1] += len(parts[-1])
            start, middle = middle, end
            known = text_of(ids[start:middle], tokenizer)
    return "".join(parts), lengths


def _last_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the last tokens, from a whole character on: some decoders lose all bytes after a broken one."""
    for count in range(_CONTEXT, _CONTEXT - 4, -1):
        text = text_of(ids[-count:], tokenizer)
        if not text.startswith(_PARTIAL):
            break
    return text


@lru_cache(maxsize=16)
def _closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens whose own text lets an end stand after them, or after the next token."""
    return frozenset(i for i in range(len(tokenizer)) if _SIEVE.search(text_of([i], tokenizer)))
