"""Whether an answer says what a reference says: the four checks that rows may name.

How something is spelled (case, Unicode forms, quotes, dashes, digits and their grouping, spaces) makes no difference.
`check_reference` refuses references that a check cannot use.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import regex

# Scripts that put no space between words; in Katakana a word is a run, in Hangul particles follow a word.
_UNSPACED, _KATAKANA, _HANGUL = r"\p{lb=SA}\p{Han}\p{Hiragana}", r"\p{Katakana}ー", r"\p{Hangul}"
_SPACED = rf"[\w--[_{_UNSPACED}{_KATAKANA}{_HANGUL}]]"  # letters, marks and digits of all other scripts


def contains(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer, as whole words.

    - Numbers are whole: 5 is not in 5.5, 1,500, -5, 1/5, 10:05, 2024-05-05, x^5 or 5th, but it is in "$5", "5%" and
      "5-10". Grouping is spelling (1,500 is 1500); other ways to write a value (1500.00) are not: `same_number`
      compares values.
    - A space between a number and %, °, a currency sign or a common unit's symbol is spelling: 5km is "5 km", and holds
      5. Other letters after a digit belong to its word (5k, 3D, 90s).
    - In scripts without spaces between words any place will do, so that 京都 is in 東京都. A word of Katakana is a run
      of it; particles may follow a word of Hangul.
    - Hyphens and apostrophes part words ("Lima's"); C is not in C++ or C#.
    """
    answer, reference = _words(answer), _words(reference)
    words = r"\s".join(map(regex.escape, reference.split()))
    pattern = _not_joined(reference[0], left=True) + words + _not_joined(reference[-1], left=False)
    numbers, own = _numbers(answer), [(number.start, number.end) for number in _numbers(reference)]
    for match in regex.finditer(rf"(?V1){pattern}", answer, overlapped=True):
        start, end = match.span()
        touched = [(n.start - start, n.end - start) for n in numbers if n.start < end and n.end > start]
        if touched == own:  # the numbers of the reference stand there whole, and no others
            return True
    return False


def equal(answer: str, reference: str) -> bool:
    """Whether answer and reference are the same words, punctuation included."""
    return _words(answer).split() == _words(reference).split()


def same_number(answer: str, reference: str) -> bool:
    """Whether the last numbers of both have the same value, exactly.

    - 1,234.5 and 1.234,5 are the same; so are 1 234, 1'234 and 1_234. One comma or point before three digits is read as
      in English: 1,234 is grouped and 1.234 is not. Any other single comma is a decimal one (3,5); those of 1,2,3 part
      a list.
    - 3/4, 1 1/2, 1½, 1e3, 2*10^5 and their LaTeX (\\frac{3}{4}) are values. -3 is negative; 5-10 holds 5 and 10.
    - 50% is 1/2 and also 50, and 2 million is 2000000 and also 2, since a question may ask for either; k, K, M, B and
      bn directly after a number (1.2M) scale it too. Where both sides name a unit, as 50% and 0.5% do, it counts.
    - Times, ratios, versions and dates (10:30, 3:1, 1.2.3, 1/2/2024), three or more whole numbers joined by hyphens
      (2024-01-05), powers of other bases than 10 and digits after a letter (B12) are no numbers, and neither are words
      (twelve).
    """
    given, right = ([n.values for n in _numbers(_spelled(text)) if n.values][-1:] for text in (answer, reference))
    if not given or not right:
        return False
    units = len(given[0]) == len(right[0]) == 2
    return given[0][1] == right[0][1] if units else not set(given[0]).isdisjoint(right[0])


def same_mathematics(answer: str, reference: str) -> bool:
    """Whether the last formula of both is the same, by the library math-verify; what takes it too long is not.

    A reference without delimiters ($...$, \\boxed{...}) is a formula as a whole; of one with `####` what follows it is.
    An answer says its formula between delimiters, or ends with a number. Words, as in \\text{Evelyn}, are formulas too.
    """
    return _stopped_in_time(_verified, answer, reference)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "contains": contains,
    "equal": equal,
    "number": same_number,
    "math": same_mathematics,
}


def check_reference(check: str, reference: str) -> None:
    """Refuse a reference that a check cannot use.

    Raises:
        ValueError: for a reference that is blank, and so in any answer; for `number`, that holds no number; for `math`,
            that math-verify cannot read as a formula, that stands for a missing value (None), or that is a sentence.
    """
    if not _words(reference):
        raise ValueError("is blank, and every answer would be right: give the right answer, or none to any row")
    if check == "number" and not any(number.values for number in _numbers(_spelled(reference))):
        raise ValueError(
            f"is {reference!r}, which holds no number (times, dates and ratios are none): give one, or use "
            "data.check=contains"
        )
    if check == "math":
        if _words(reference) in ("n/a", "nan", "none", "null"):
            raise ValueError(f"is {reference!r}, a missing value: give the answer (the word itself is \\text{{...}})")
        formula = _formula(reference)
        try:  # most need no parsing, which takes milliseconds
            known = formula.count("{") == formula.count("}") and (
                bool(_PLAIN.fullmatch(_SPACE.sub("", formula))) or _stopped_in_time(_parses, reference)
            )
        except ImportError:
            return
        if not known:
            raise ValueError(f"is {reference!r}, in which math-verify finds no formula: write it as $...$")


# ------------------------------------------------------------------------------------------------------------- spelling

_SIBLINGS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4", "'")  # curly, prime, acute
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033«»", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")  # hyphens, en dash, minus signs
    | {"\u066b": ".", "\u066c": ",", "\u066a": "%"}  # of Arabic numbers
)
_UNIT = "[kcmnμ]?m|[kmμ]?g|[cm]?l|km/h|kmh|mph|h|min|ms|[kmgt]b|[kmg]?hz|k?wh?|ft|lbs?|oz|[ap]m"
_BEFORE_UNIT = regex.compile(rf"(?V1)(?<=\d)(?=[%‰°\p{{Sc}}]|(?:{_UNIT})(?!{_SPACED}))|(?<=\p{{Sc}})(?=\d)")


def _spelled(text: str) -> str:
    """A text in one spelling of its characters."""
    if text.isascii():
        return text
    text = regex.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])|(?<=№)(?=\d)", " ", text.translate(_SIBLINGS))
    text = regex.sub(r"[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^" + _nfkc(m[0]).replace("\u2212", "-"), text)
    text = regex.sub(r"(?<=\d)[₀-₉]+", r"_\g<0>", text)  # NFKC alone makes 11/2 of 1½, and 102 of 10² and 10₂
    text = regex.sub(r"[\p{Cf}\uFE0E\uFE0F]+", "", _nfkc(text).replace("\u2044", "/"))
    return regex.sub(r"\p{Nd}", lambda m: _digit(m[0]), text)


def _digit(character: str) -> str:
    """A decimal digit as 0 to 9; of a Unicode that is newer than Python's too, where ten follow each other."""
    value = unicodedata.decimal(character, None)
    if value is None:
        first = ord(character)
        while regex.match(r"\p{Nd}", chr(first - 1)):
            first -= 1
        value = (ord(character) - first) % 10
    return str(value)


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _words(text: str) -> str:
    """A text in one spelling of its words: case, spaces (lines stay apart), digit grouping, what makes words bold."""
    text = re.sub(r"(?<!\w)\*\*(?=\S)|(?<=\S)\*\*(?!\w)", "", _spelled(text))
    text = "\n".join(filter(None, (" ".join(line.split()) for line in re.split(r"[^\S ]", text))))
    text = _NUMBER.sub(lambda m: m[0].replace(m["value"], _decimal(m["value"]), 1) if m["value"] else m[0], text)
    text = text.casefold().replace("i\u0307", "i").replace("\u0131", "i")  # Turkish has four letters I
    return _BEFORE_UNIT.sub(" ", _nfkc(text))


def _not_joined(edge: str, left: bool) -> str:
    """What must not touch the first or last character of a word: a pattern that looks there."""
    if regex.match(rf"(?V1)[{_UNSPACED}]", edge):
        joined = []
    elif regex.match(rf"[{_KATAKANA}]", edge):
        joined = [rf"[{_KATAKANA}]"]
    elif regex.match(_HANGUL, edge):
        joined = [_HANGUL] if left else []
    elif regex.match(r"\p{Sm}", edge):
        joined = [_SPACED, r"\p{Sm}"]
    else:
        joined = [rf"{_SPACED}_*", r"[\^_]\{-?", r"\^-?"] if left else [rf"_*{_SPACED}", r"[+#]+(?!\w)"]
    if not left:
        joined.append(r"\p{M}")
    return "".join(rf"(?<!{pattern})" if left else rf"(?!{pattern})" for pattern in joined)


# -------------------------------------------------------------------------------------------------------------- numbers

_SCALES = {"thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALES |= {"万": 4, "萬": 4, "億": 8, "亿": 8}
_SUFFIXES = {"k": 3, "m": 6, "b": 9, "bn": 9}  # no small m, which is metres

_GROUPED = "|".join(
    rf"(?<!\d{mark})[1-9]\d{{0,2}}(?:{mark}\d{{3}}){{1,12}}(?!\d)(?:[.,]\d+)?"
    for mark in (r"\ ", "'", "_", r"\\,", r"\{,\}")
)
_VALUE = rf"""(?:  # digits with their grouping and decimals
      [1-9]\d{{0,2}}(?:,\d{{2,3}}){{0,12}},\d{{3}}(?!,?\d)(?:\.\d+)? | {_GROUPED}
    | [1-9]\d{{0,2}}(?:(?:\.\d{{3}}){{1,12}},\d+|(?:\.\d{{3}}){{2,12}})(?!\.?\d)
    | (?<!\d,)\d+,\d+(?!,?\d) | \d+\.\d+ | (?<![\w.)])\.\d+ | \d+
)"""
_LETTER = rf"[{_SPACED}--\d]"
_POWER = r"10\^\{?(?P<power>-?\d{1,3})\}?"

_NUMBER = regex.compile(
    rf"""(?xiV1)(?=[-.\d\\])(?:
    (?P<written>\d+[万萬億亿千百]\d[\d万萬億亿千百]*)  # no number that is read
    | (?P<written>(?<!\d-)\d+(?:-\d+){{2,}}(?![-.,:/]?\d))  # a date
    | (?<!{_LETTER}(?:_\{{?)?)(?<!\^\{{?-?)
      (?P<written>
        (?P<minus>(?<![{_SPACED}\)\]}}_-])-(?:\\?[$€£¥₹]\ ?)? | (?<=[=(<>≈]\ ?)-\ )?
        (?: (?P<whole>\d{{1,3}})\ (?P<top>\d{{1,3}})\ ?/\ ?(?P<bottom>\d{{1,3}})
          | (?:(?P<whole>\d{{1,3}})\ ?)?\\[dt]?frac\ ?
            (?:\{{(?P<top>{_VALUE})\}}\{{(?P<bottom>{_VALUE})\}} | (?P<top>\d)(?P<bottom>\d))
          | {_POWER}
          | (?P<value>{_VALUE})
            (?:e(?P<power>[+-]?\d{{1,3}}) | \ ?(?:[x\u00d7*·]|\\times|\\cdot)\ ?{_POWER} | \ ?/\ ?(?P<bottom>{_VALUE}))?
        )
        (?![.:/_]?\d|\^\{{?-?\w|e[+-]?\d)
      )
      (?:\ ?(?:(?P<percent>\\?%|per\ ?cent\b) | (?P<scale>(?:{"|".join(_SCALES)}))s?(?!{_LETTER}))
            | (?P<scale>(?-i:[kKMB]|bn))(?!{_SPACED}))?
    | (?P<written>\d+(?:[.:/_]?\d+|\^\{{?-?\d+)*))  # nor is this one
    """
)
_LONGEST = 1000  # characters of a number: more are no answer, and would be slow


@dataclass(frozen=True)
class _Number:
    """A number in a text."""

    start: int
    end: int  # of what is written, without its unit
    values: tuple[Fraction, ...]  # none where it is no single number; two where it has a unit: without and with it


def _numbers(text: str) -> list[_Number]:
    """The numbers of a text in one spelling."""
    return [_Number(m.start("written"), m.end("written"), _values(m)) for m in _NUMBER.finditer(text)]


def _values(match: Any) -> tuple[Fraction, ...]:
    whole, top, bottom, value, power = match.group("whole", "top", "bottom", "value", "power")
    if len(match["written"]) > _LONGEST or not (top or value or power):
        return ()
    number, under = (Fraction(_decimal(text or "1")) for text in (top or value, bottom))
    if not under:
        return ()
    number = number / under * Fraction(10) ** int(power or 0)
    if whole and number < 1:  # else the digits in front are another number
        number += int(whole)
    if match["minus"]:
        number = -number
    if match["percent"]:
        return number, number / 100
    if match["scale"]:
        return number, number * 10 ** (_SCALES | _SUFFIXES)[match["scale"].lower()]
    return (number,)


def _decimal(value: str) -> str:
    """Digits without their grouping, with a decimal point."""
    value = re.sub(r"\\,|\{,\}|[ '_]", "", value)
    if "," in value and "." in value:
        group, point = sorted(",.", key=value.rindex)
        return value.replace(group, "").replace(point, ".")
    if value.count(".") > 1 or re.fullmatch(r"[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}", value):
        return re.sub("[.,]", "", value)
    return value.replace(",", ".")


# ---------------------------------------------------------------------------------------------------------- mathematics

_DELIMITED = regex.compile(r"(?s)(?<!\\)\$.+?(?<!\\)\$|\\\(.+?\\\)|\\\[.+?\\\]|\\boxed\s*\{.+\}")
_COMMAND = regex.compile(r"\\\p{L}+(\{(?:[^{}]|(?1))*\})*")  # with its arguments
_PLAIN = regex.compile(  # some of the formulas that math-verify can read
    r"""(?x)\$(?:\\text\{\p{L}+\} | (?P<sum>-?+(?P<term>\d++(?:\.\d++)?+ | [a-zA-Z] | \\(?:pi|infty)(?!\p{L})
    | \\sqrt(?P<group>\{(?&sum)\}) | \\[dt]?frac(?&group){2} | \((?&sum)\))(?:[-+*/]?+(?&term)|\^(?&group))*+))\$"""
)
_SPACE = regex.compile(r" (?!\p{L}\$)")  # before a last letter it makes a unit of it: "C + m"
_TEXT = regex.compile(r"(?<!\S)\p{L}{3,}(?: \p{L}{3,})*(?!\S)")


def _stopped_in_time(call: Callable[..., bool], *texts: str) -> bool:
    """Call math-verify, which stops what takes long by signals: in a thread, by those of another process."""
    if threading.current_thread() is threading.main_thread():
        return call(*texts)
    return _process().submit(call, *texts).result()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _verified(answer: str, reference: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(_parsed(reference), parse(_readable(answer))))


def _parses(reference: str) -> bool:
    return any(not isinstance(found, str) for found in _parsed(reference))


@lru_cache(1024)
def _parsed(reference: str) -> list[Any]:
    from math_verify import parse

    known: list[Any] = parse(_formula(reference))
    return known


def _formula(reference: str) -> str:
    """A reference with its formula between delimiters.

    Raises:
        ValueError: for a sentence: who can say what in it is the answer?
    """
    reference = _readable(reference.rpartition("####")[2]).strip()
    if _DELIMITED.search(reference):
        return reference
    if len(regex.findall(r"\p{L}{2,}", _COMMAND.sub("", reference))) > 2:
        raise ValueError(
            f"is {reference!r}, a sentence: write formulas as $...$, words as \\text{{...}}, or use data.check=number"
        )
    if "{" not in reference:
        reference = _TEXT.sub(r"\\text{ \g<0> }", reference)
    return "$" + regex.sub(r"(?<!\\)\$", r"\\$", " ".join(reference.split()).rstrip(".")) + "$"


def _readable(text: str) -> str:
    """A text whose numbers math-verify reads as they are meant: it makes 501 of 1 500, 1 of 1 1/2, 1e of 1e3."""

    def plain(match: Any) -> str:
        mixed, grouped = match["whole"] and match["top"], regex.search(r"\\,|[ '_]", match["value"] or "")
        values = _values(match) if match["power"] or mixed or grouped else ()
        return match[0].replace(match["written"], str(values[0])) if values else str(match[0])

    return _NUMBER.sub(plain, _REPEATING.sub(_repeating, _spelled(text)))


_REPEATING = regex.compile(r"(?<!\d)(\d{0,40})\.(\d{0,40})\\(?:overline|bar|dot)\{(\d{1,40})\}")


def _repeating(match: Any) -> str:
    whole, fixed, period = match.groups()
    once, again = int((whole + fixed) or 0), int(whole + fixed + period)
    return rf"\frac{{{again - once}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"
