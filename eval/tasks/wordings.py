"""What a text says of a place: which values of which attributes, in the many wordings that people use.

Each value has a list of patterns; a text states every value of which one matches. Values that mean the same are one:
a rating of "5 out of 5" is a "high" one, and "less than £20" is "cheap". The patterns were written by reading people's
descriptions, and hold none of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

NAMES = (
    "The Wrestlers, The Punter, The Cricketers, The Phoenix, The Mill, The Eagle, The Vaults, Fitzbillies, Wildwood, "
    "Cocum, The Waterman, The Golden Palace, Green Man, Blue Spice, Giraffe, Cotto, Aromi, Browns Cambridge, "
    "The Cambridge Blue, Clowns, Alimentum, Taste of Cambridge, The Plough, Travellers Rest Beefeater, "
    "Midsummer House, Strada, Zizzi, Bibimbap House, Loch Fyne"
).split(", ")
NEAR = (
    "Raja Indian Cuisine, Burger King, Crowne Plaza Hotel, Rainbow Vegetarian Café, Café Sicilia, "
    "Express by Holiday Inn, The Portland Arms, All Bar One, Café Rouge, The Sorrento, Café Brazil, Ranch, Clare Hall, "
    "Avalon, The Bakers, The Rice Boat, Café Adriatic"
).split(", ")
MISSPELT = {  # and shortened: as people write them
    "Browns Cambridge": r"brown'?s?(?: cambridge)?",
    "Travellers Rest Beefeater": r"travell?er'?s?'? rest(?: beefeater)?s?",
    "Fitzbillies": r"fitzbill?i?es",
    "The Cricketers": r"cricket(?:e?er)?s?",
    "The Wrestlers": r"wrestlers?",
    "The Vaults": r"vaults?",
    "The Punter": r"punters?",
    "The Waterman": r"waterm[ae]n",
    "The Phoenix": r"ph?(?:oe|eo)nix",
    "Crowne Plaza Hotel": r"crowne? plaza(?: hotel)?",
    "Raja Indian Cuisine": r"rajah?(?:'s)?(?: indian)?(?: (?:cuisine|restaurant))?",
    "Rainbow Vegetarian Café": r"rainbow(?: vegetarian)?(?: cafes?)?",
    "Express by Holiday Inn": r"express(?: by)?(?: the)? holiday inn|holiday inn(?: express)?",
    "Burger King": r"burger ?king",
    "The Sorrento": r"sorr?ento",
    "Café Sicilia": r"caff?e sicilia|sicilia cafe",
    "Café Brazil": r"cafe brazil|brazil cafe",
}

Patterns = Mapping[str, re.Pattern[str]]


def _any(values: Mapping[str, Sequence[str]]) -> Patterns:
    return {value: re.compile("|".join(patterns)) for value, patterns in values.items()}


def _named(names: Sequence[str]) -> Patterns:
    """The patterns of names, the longest first; an article counts as part of one."""
    patterns = {}
    for name in sorted(names, key=len, reverse=True):
        words = [re.escape(word) for word in plain(name).split() if word != "the"]
        spelt = MISSPELT.get(name, "[ -]?".join(words))
        patterns[name] = re.compile(rf"(?:\bthe )?\b(?:{spelt})\b")
    return patterns


def plain(text: str) -> str:
    """Lower case, without accents and quotation marks, with one space between words."""
    letters = unicodedata.normalize("NFD", text.lower().replace("\u2019", "'").replace("\u2013", "-"))
    letters = re.sub(r"(?<!\w)'|'(?!\w)|[\"\u201c\u201d]", "", letters)
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


_NAMES, _NEAR = _named(NAMES), _named(NEAR)
_TYPE = _any(
    {
        "coffee shop": [r"\bcoffee\b", r"\bcafes?\b"],
        "pub": [r"\bpubs?\b", r"\bbar\b", r"\btavern\b"],
        "restaurant": [r"\brest[aeu]+r[aeu]+nts?\b", r"\bresturant\b"],
    }
)
_EATING = re.compile(r"eatery|bistro|diner|dining|place to eat")  # a restaurant, or any other place
_FOOD = _any(
    {
        "Chinese": [r"\bchinese?\b"],
        "English": [r"\benglish\b", r"\bbritish\b"],
        "Japanese": [r"\bjapanese\b", r"\bsushi\b"],
        "French": [r"\bfrench\b"],
        "Italian": [r"\bitalian\b", r"\bpasta\b", r"\bpizza\b"],
        "Fast food": [r"\bfast[ -]?foods?\b"],
        "Indian": [r"\bindian?\b"],
    }
)
_AREA = _any(
    {
        "riverside": [r"\briver ?-?(?:side|bank|front)?\b", r"\bby the water", r"\bwaterfront"],
        "city centre": [
            r"\b(?:city|town)[ -]?(?:centre|center|central)\b",
            r"\b(?:centre|center|heart|middle)(?: of)?(?: the)?(?: city| town)",
            r"\bcentral(?:ly)?\b",
            r"\bdowntown\b",
            r"\bin the (?:centre|center)\b",
            r"\bin (?:the )?city\b(?! of)",
            r"\bcity area\b",
        ],
    }
)
_PRICED = r"pric(?:e|es|ed|ing)(?: range)?"
_POUNDS = r"(?:£|l|\$|gbp)? ?"
_PRICE = _any(
    {
        "low": [
            r"\bcheap(?:er|ly|est)?\b",
            r"inexpensive",
            r"affordabl",
            r"economical",
            r"\bbudget\b",
            r"bargain",
            r"good value",
            r"\blow(?:er|ly|est)?[ -]*(?:in )?(?:food )?(?:cost|pric)",
            r"\blow (?:range|end) price",
            rf"\b(?:less|lower|under|below|cheaper|maximum of|up to|no more)(?: than)? ?{_POUNDS}(?:20|twenty)\b",
            r"\b20(?: pounds)? or less",
            r"not (?:too |very )?expensive",
            rf"{_PRICED}(?: is| are|:)?(?: very| quite| relatively| pretty)? low\b(?![ -]\w*[ -]?rat)",
        ],
        "middle": [
            r"moderate(?:ly)?(?! (?:customer |consumer )?rat)",
            r"\bmid[ -]?(?:range|price|priced|level)",
            r"medium",
            r"modest",
            r"reasonabl[ey]",
            r"fair(?:ly)? pric",
            r"average(?:ly)?[ -](?:in )?(?:pric|cost\b)",
            r"20 ?(?:-|to|and|through) ?£? ?25",
            rf"{_PRICED}(?: is| are|:| of| at| in)*(?: an?| the)? ?average",
        ],
        "high": [
            r"\b(?:high|higher|highly|upper|premium|upscale)[ -]*(?:end )?(?:in )?(?:food )?(?:cost|pric|range)",
            r"\bexpensive\b",
            r"costly",
            r"pricey",
            r"high[ -]end\b",
            rf"(?:more|over|above|greater|higher|upwards|starting|start|from|minimum|least|exceed\w*)"
            rf"(?: than| of| at| from)? ?(?:a )?(?:price of |cost of |average of )?{_POUNDS}(?:30|thirty)\b",
            r"\b30 ?(?:\+|or more|and up|plus|and above|and over)",
            rf"{_PRICED}(?: is| are|:)?(?: very| quite| on the| rather| a bit| pretty| somewhat| fairly)* high"
            r"(?!(?:ly)?[ -]*(?:customer |consumer )?rat)",
        ],
    }
)
_SCORES = {"1": "low", "one": "low", "3": "middle", "three": "middle", "5": "high", "five": "high"}
_SCORE = re.compile(r"\b(1|one|3|three|5|five)(?: stars?)?[ -]*(?:out of|/|of|over)[ -]*(?:5|five)(?:[ -]*stars?)?\b")
_STARS = re.compile(r"\b(1|one|3|three|5|five)[ -]*stars?\b")
_WHO = r"(?:customer|costumer|consumer|user|visitor|guest|service|quality|star|overall)s?"
_JUDGED = r"(?:rat(?:e|es|ed|ing|ings)\b|review\w*|scores?\b|satisfaction|rank\w*|approv\w*)"
_VERY = r"(?:very|quite|relatively|pretty|rather|just|only|about|consistently|highly)"
_IS = rf"{_JUDGED}(?: (?:is|are|was|of|as|being|at|it))?:?(?: an?)?(?: {_VERY})? "
_RATING = _any(
    {
        "low": [
            rf"\blow(?:er|ly|est)?[ -]*(?:{_WHO} )*{_JUDGED}",
            rf"{_IS}low\b",
            r"\bpoor(?:ly)?\b",
            r"\bbad(?:ly)?\b",
            r"terribl",
            r"negative",
            r"\blow customer",
        ],
        "middle": [
            rf"\baverage(?:ly)?[ -]*(?:{_WHO} )*{_JUDGED}",
            rf"{_IS}average\b",
            rf"(?:decent|moderate|mediocre|mixed|fair|ok|okay)(?:ly)? (?:{_WHO} )*{_JUDGED}",
            r"\baverage customer",
            r"customers?[^.,]{0,25} average\b",
        ],
        "high": [
            rf"\b(?:high|highly|higher|highest|excellent|great|good|top|best|positive|outstanding|superb|fantastic)"
            rf"[ -]*(?:{_WHO} )*{_JUDGED}",
            rf"{_IS}(?:high|excellent|good|great|well)",
            r"\bhighly[ -](?:recommend|regard|acclaim|praise|thought|esteem|satisf)\w*",
            r"well[ -](?:rated|reviewed|liked|regarded|received|loved|recommended)",
            r"top[ -](?:notch|quality)",
            r"\bhigh customer",
            r"customers? (?:love|rate it high)",
        ],
    }
)
_NOT_WELL = re.compile(
    rf"(?:\bnot|n't) (?:been |have |got )?(?:a )?(?:very |so |too )?(?:well|highly|good|high)[^.,]{{0,12}}? "
    rf"(?:{_JUDGED}|received|regarded)"
)
_CHILDREN = r"(?:child(?:ren)?s?|kids?|famil(?:y|ies)|all ages)"
_NOT = r"(?:not|no|non|\w+n't|isnt|arent|doesnt|dont|nor|never|neither|cannot|without)"
_UNFRIENDLY = re.compile(
    "|".join(
        [
            rf"\b{_NOT}\b[^.,;]{{0,45}}?\b{_CHILDREN}\b",
            r"\bun ?(?:family|child|kid)",
            rf"{_CHILDREN}(?: ?'?s)? unfriendly",
            r"\badults?\b",
            rf"{_CHILDREN}[^.]{{0,30}}\b(?:not|aren't|isn't|never)\b(?: \w+){{0,3}} "
            r"(?:allow|welcom|friendl|permitt|recommend|cater|suit|appropriate|accept|advis|encourag)",
            rf"{_CHILDREN} (?:is |are )?(?:not\b|unwelcome)",
            r"\b(?:family|kid|child|children)s? (?:friendly)? ?(?:is|:)? ?no\b",
            rf"unfriendly|{_CHILDREN} free\b",
            r"\bmature\b",
            r"(?:keep|leave) the (?:kids|children)",
        ]
    )
)
_FRIENDLY = re.compile(rf"\b{_CHILDREN}\b")


def stated(text: str) -> dict[str, set[str]]:
    """The values that a text states of each attribute of `eval.tasks.restaurants`."""
    rest = plain(text)
    said: dict[str, set[str]] = {}
    for attribute, names in (("near", _NEAR), ("name", _NAMES)):  # the neighbours first: one is a café, one Indian
        said[attribute] = set()
        for name, pattern in names.items():
            rest, count = pattern.subn(" @ ", rest)
            said[attribute] |= {name} if count else set()
    for attribute, values in (("type", _TYPE), ("food", _FOOD), ("area", _AREA)):
        said[attribute] = {value for value, pattern in values.items() if pattern.search(rest)}
    if not said["type"] and _EATING.search(rest):
        said["type"] = {"any"}
    said["family"] = _family(rest)
    said["rating"], rest = _scores(rest)
    rest, disliked = _NOT_WELL.subn(" @ ", rest)
    said["rating"] |= {"low"} if disliked else set()
    prices = [(value, match.span()) for value, pattern in _PRICE.items() for match in pattern.finditer(rest)]
    said["price"] = {value for value, _ in prices}
    for value, pattern in _RATING.items():
        starts = [match.start() for match in pattern.finditer(rest)]
        if any(not any(begin <= start < end for _, (begin, end) in prices) for start in starts):
            said["rating"].add(value)
    return said


def _family(text: str) -> set[str]:
    """ "yes", "no", both or neither: what is not said to be unfriendly to children, and names them, is friendly."""
    text, unfriendly = _UNFRIENDLY.subn(" ", re.sub(r"[-_]", " ", text))
    return ({"no"} if unfriendly else set()) | ({"yes"} if _FRIENDLY.search(text) else set())


def _scores(text: str) -> tuple[set[str], str]:
    """Ratings out of five or in stars, and the text without them."""
    found = {_SCORES[match[1]] for pattern in (_SCORE, _STARS) for match in pattern.finditer(_SCORE.sub(" ", text))}
    found |= {_SCORES[match[1]] for match in _SCORE.finditer(text)}
    return found, _STARS.sub(" @ ", _SCORE.sub(" @ ", text))
