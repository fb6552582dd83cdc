"""The report of a verifier stage: every line told apart, on paper, on a phone, by the colour-blind."""

import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.verifier_metrics import Draft, Scored, measure
from eval.verifier_report import RULES, console_table, html_report, line_styles

RULE_NAMES = [f"{rule} {scope}" for rule in ("mean", "lowest") for scope in ("segment", "prefix")]
TRAINED = ["prompt", "probe", "adapter"]
KINDS = [*(f"{free} {rule}" for free in ("likelihood", "divergence") for rule in RULE_NAMES), *TRAINED]


def scored(noise: float, drafts: int = 40) -> list[Scored]:
    """Drafts of six cuts with a verifier that errs as the noise says."""
    rng = random.Random(0)
    rows = []
    for number in range(drafts):
        right = rng.randint(0, 6)
        valid = [k < right for k in range(6)]
        confidences = [min(max((0.8 if ok else 0.2) + rng.gauss(0, noise), 0), 1) for ok in valid]
        draft = Draft([1], list(range(60)), list(range(10, 61, 10)), True, valid, number=number)
        rows.append(Scored(draft, confidences))
    return rows


def report(kinds: list[str], chosen: str = "probe") -> tuple[dict, dict[str, list[Scored]]]:
    """What the stage knows, of made-up verdicts."""
    tested = {kind: scored(0.05 + 0.05 * i) for i, kind in enumerate(kinds)}
    figures = {kind: measure(rows, 0.5) | {"milliseconds_per_cut": 1.0} for kind, rows in tested.items()}
    sizes = {"n_prompts": 40, "n_prefixes": 240, "max_accuracy_loss": 0.01}
    return {"kinds": figures, "chosen": chosen, **sizes}, tested


def pictures(page: str) -> list[ElementTree.Element]:
    """The page's SVGs."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def look(shape: ElementTree.Element) -> tuple[str, str, str]:
    return shape.get("stroke"), shape.get("stroke-dasharray"), shape.get("stroke-width")


def distinct(kinds: list[str]) -> bool:
    styles = line_styles(kinds)
    assert list(styles) == kinds
    return len({(style.colour, style.dash) for style in styles.values()}) == len(kinds)


def test_the_eleven_kinds_are_told_apart():
    assert len(KINDS) == 11
    assert distinct(KINDS)
    styles = line_styles(KINDS)
    for family in ("likelihood", "divergence"):  # a hue for each family, dashes for its rules
        rules = [styles[kind] for kind in KINDS if kind.startswith(family)]
        assert len({style.colour for style in rules}) == 1
        assert all(style.dash for style in rules)
    rule_colours = {styles[kind].colour for kind in KINDS if " " in kind}
    alone = [styles[kind] for kind in TRAINED]
    assert len({style.colour for style in alone} | rule_colours) == 5
    assert all(style.dash == "" for style in alone)
    assert min(style.width for style in alone) > max(styles[kind].width for kind in KINDS if " " in kind)


@pytest.mark.parametrize(
    "kinds",
    [
        [f"kind{i}" for i in range(30)],
        [f"rule {i}" for i in range(30)],
        [f"{family} {i}" for i in range(6) for family in "abcde"],
        [*(f"a {i}" for i in range(15)), *(f"kind{i}" for i in range(15))],
    ],
)
def test_thirty_kinds_are_told_apart(kinds):
    assert len(kinds) == 30
    assert distinct(kinds)
    colours = [style.colour for style in line_styles(kinds).values()]
    assert max(colours.count(colour) for colour in colours) <= 2 * RULES


@given(st.lists(st.text("ab ", min_size=1, max_size=5), unique=True, max_size=40))
def test_any_kinds_are_told_apart(kinds):
    assert distinct(kinds)


def test_the_legend_shows_each_lines_own_style():
    page = html_report("a run", *report(KINDS))
    *legend, roc, reliable, use = pictures(page)
    names = re.findall(r"</svg>([^<]+)</li>", page)
    assert names == [kind + (" (saved)" if kind == "probe" else "") for kind in KINDS]
    looks = [look(swatch[0]) for swatch in legend]
    assert len(set(looks)) == 11
    for picture in (roc, reliable, use):
        lines = picture.findall("polyline")
        assert [line.findtext("title") for line in lines] == KINDS
        assert [look(line) for line in lines] == looks
        assert all(line.get("points") for line in lines)


def test_the_axes_are_named_and_all_is_within_the_picture():
    pages = pictures(html_report("a run", *report(KINDS)))[-3:]
    axes = [[text.text for text in picture.findall("text")][-2:] for picture in pages]
    assert axes == [
        ["invalid cuts accepted", "valid cuts accepted"],
        ["confidence", "share of valid cuts"],
        ["accuracy lost", "draft tokens accepted"],
    ]
    for picture in pages:
        _, _, width, height = map(float, picture.get("viewBox").split())
        for line in picture.findall("polyline"):
            for point in line.get("points").split():
                x, y = map(float, point.split(","))
                assert 0 < x < width
                assert 0 < y < height
        for text in picture.findall("text"):
            assert float(text.get("x") or 16) < width
            assert float(text.get("y") or 16) < height


class _Boxes(HTMLParser):
    """Which elements stand around the tables, and what is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.around: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.around += self.open
        self.open.append(dict(attrs).get("class") or "")
        self.fetched += [name for name, _ in attrs if name in ("src", "href")] + [tag] * (tag in ("script", "link"))


def test_the_page_fits_a_phone_and_needs_nothing_else():
    page = html_report("a run", *report(KINDS))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert ".plots svg { max-width: 100%; height: auto }" in page
    assert ".wide { overflow-x: auto }" in page
    boxes = _Boxes()
    boxes.feed(page)
    assert "wide" in boxes.around
    assert not boxes.fetched


def test_a_kind_with_a_single_point_is_seen_and_one_with_nothing_to_measure_is_no_error():
    rows = [Scored(Draft([1], [1, 2], [2], True, [True], number=n), [1.0]) for n in range(4)]
    figures = measure(rows, 0.5) | {"milliseconds_per_cut": 1.0}
    facts = {"kinds": {"probe": figures}, "chosen": "probe", "n_prompts": 4, "n_prefixes": 4, "max_accuracy_loss": 0.01}
    roc, reliable, _ = pictures(html_report("a run", facts, {"probe": rows}))[-3:]
    assert roc.find("polyline").get("points") == ""  # all cuts are valid
    line = reliable.find("polyline")
    assert len(line.get("points").split()) == 2
    assert line.get("stroke-linecap") == "round"


def test_a_name_is_text_and_no_markup():
    kinds = ["<b>bold</b> & co", "probe"]
    page = html_report("<i>run</i>", *report(kinds))
    assert "<b>" not in page
    assert "<i>" not in page
    assert pictures(page)[-1].findall("polyline")[0].findtext("title") == kinds[0]


def test_the_table_of_the_console_has_a_line_for_each_kind():
    facts, _ = report(KINDS)
    lines = console_table(facts).splitlines()
    assert len(lines) == 1 + 11 + 1
    assert [line.split("   ")[0].strip() for line in lines[1:12]] == KINDS
    assert [line.split()[0] for line in lines if line.endswith("<- saved")] == ["probe"]


def test_the_learning_curve_stands_in_the_table_and_on_the_page():
    facts, tested = report(["probe"])
    assert "More labelled prompts" not in html_report("a run", facts, tested)
    facts["learning_curve"] = [{"prompts": n, "acceptable": n / 100, "loss": 1 / n} for n in (20, 80)]
    assert console_table(facts).splitlines()[-1].endswith("may accept: 20 prompts 20.0%, 80 prompts 80.0%")
    assert "<tr><td>80</td><td>80.0%</td><td>0.013</td></tr>" in html_report("a run", facts, tested)
