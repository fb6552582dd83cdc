"""The report of a verifier stage: every line told apart, on paper, on a phone, by the colour-blind."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.plots import RULES, line_styles
from eval.verifier_metrics import POINTS, Draft, Scored, _along, curves, loss_at, measure
from eval.verifier_report import console_table, html_report

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


def report(kinds: list[str], chosen: str = "probe") -> dict:
    """What the stage knows, of made-up verdicts."""
    tested = {kind: scored(0.05 + 0.05 * i) for i, kind in enumerate(kinds)}
    figures = {kind: measure(rows, 0.5) | {"milliseconds_per_cut": 1.0} for kind, rows in tested.items()}
    sizes = {"n_prompts": 40, "n_prefixes": 240, "max_accuracy_loss": 0.01}
    found = {kind: curves(rows) for kind, rows in tested.items()}
    return {"kinds": figures, "curves": found, "chosen": chosen, **sizes}


def distinct(kinds: list[str]) -> bool:
    styles = line_styles(kinds)
    assert list(styles) == kinds
    return len({(style.colour, style.dashes) for style in styles.values()}) == len(kinds)


def test_the_eleven_kinds_are_told_apart():
    assert len(KINDS) == 11
    assert distinct(KINDS)
    styles = line_styles(KINDS)
    for family in ("likelihood", "divergence"):  # a hue for each family, dashes for its rules
        rules = [styles[kind] for kind in KINDS if kind.startswith(family)]
        assert len({style.colour for style in rules}) == 1
        assert all(style.dashes for style in rules)
    rule_colours = {styles[kind].colour for kind in KINDS if " " in kind}
    alone = [styles[kind] for kind in TRAINED]
    assert len({style.colour for style in alone} | rule_colours) == 5
    assert all(style.dashes == () for style in alone)
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


def test_every_kind_stands_in_the_legend_of_every_picture():
    pictures = re.findall(r"<svg.*?</svg>", html_report("a run", report(KINDS)), re.S)
    assert [re.search('aria-label="([^"]+)"', picture)[1] for picture in pictures] == [
        "ROC",
        "Reliability",
        "Use",
    ]
    axes = [("invalid cuts accepted", "valid cuts accepted"), ("confidence", "share of valid cuts")]
    axes.append(("accuracy lost", "draft tokens accepted"))
    for picture, names in zip(pictures, axes, strict=True):
        words = re.findall(r"<text[^>]*>([^<]+)</text>", picture)
        rules = {kind for kind in KINDS if " " in kind}  # which state no confidence
        assert {*KINDS, *names} - {*words} == (rules if "confidence" in names else set())


def test_a_larger_dot_stands_for_more_cuts():
    """Reports of before have no shares, and no dots."""
    facts = report(["probe"])

    def widths(points: list[list[float]]) -> list[float]:
        facts["curves"]["probe"]["reliability"] = points
        dots = re.findall(r'<path d="([^"]+)"[^>]*fill-opacity', html_report("a run", facts))
        across = [[float(x) for x in re.findall(r"([\d.]+) [\d.]+", dot)] for dot in dots]
        return sorted({round(max(xs) - min(xs), 3) for xs in across})

    small, large = widths([[0.1, 0.2, 0.1], [0.9, 0.8, 0.9]])
    assert (large / small) ** 2 == pytest.approx(9, abs=0.01)  # areas
    assert widths([[0.2, 0.1], [0.8, 0.9]]) == []


def test_the_curves_are_few_points_from_end_to_end():
    rows = scored(0.3, drafts=100)
    found = curves(rows)
    assert found["roc"][0] == [0, 0]
    assert found["roc"][-1] == [1, 1]
    assert max(map(len, found.values())) <= POINTS
    for threshold, lost, accepted in found["use"]:
        figures = measure(rows, threshold)
        assert (lost, accepted) == pytest.approx((figures["accuracy_loss"], figures["accepted_fraction"]))
        assert loss_at(found["use"], threshold) == lost
    assert found["use"] == sorted(found["use"])
    (first, most, _), (second, _, _), *_ = found["use"]
    assert loss_at(found["use"], 0.0) == most
    assert loss_at(found["use"], (first + second) / 2) == most  # no less than is lost there
    assert loss_at(found["use"], 1.1) == found["use"][-1][1]


def test_a_kind_with_a_single_point_is_seen_and_one_with_nothing_to_measure_is_no_error():
    rows = [Scored(Draft([1], [1, 2], [2], True, [True], number=n), [1.0]) for n in range(4)]
    figures, found = measure(rows, 0.5) | {"milliseconds_per_cut": 1.0}, curves(rows)
    assert found == {"roc": [], "reliability": [[1.0, 1.0, 1.0]], "use": [[1.0, 0.0, 1.0]]}
    facts = {"kinds": {"probe": figures}, "curves": {"probe": found}, "chosen": "probe"}
    facts |= {"n_prompts": 4, "n_prefixes": 4, "max_accuracy_loss": 0.01}
    assert html_report("a run", facts).count("<svg") == 3


def test_a_report_of_before_there_were_curves_is_a_table():
    facts = report(KINDS)
    del facts["curves"]
    page = html_report("a run", facts)
    assert "<svg" not in page
    assert "likelihood mean prefix" in page


def test_a_name_is_text_and_no_markup():
    page = html_report("<i>run</i>", report(["<b>bold</b> & co", "probe"]))
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in page


def test_the_table_of_the_console_has_a_line_for_each_kind():
    facts = report(KINDS)
    lines = console_table(facts).splitlines()
    assert len(lines) == 1 + 11 + 1
    assert [line.split("   ")[0].strip() for line in lines[1:12]] == KINDS
    assert [line.split()[0] for line in lines if line.endswith("<- saved")] == ["probe"]


def test_the_learning_curve_stands_in_the_table_and_on_the_page():
    facts = report(["probe"])
    assert "More labelled prompts" not in html_report("a run", facts)
    facts["learning_curve"] = [{"prompts": n, "acceptable": n / 100, "loss": 1 / n} for n in (20, 80)]
    assert console_table(facts).splitlines()[-1].endswith("may accept: 20 prompts 20.0%, 80 prompts 80.0%")
    assert '<th scope="row">80</th><td>80.0%</td><td>0.013</td>' in html_report("a run", facts)


def test_a_curve_of_few_points_keeps_its_corner():
    """A thousand cuts of which all valid ones come first: thinned by their numbers, the curve would miss its corner."""
    x, y = np.array([0.0] * 1000 + [0.001, 1.0]), np.array([*np.linspace(0, 1, 1000), 1.0, 1.0])
    shown = _along(x, y)
    assert len(shown) <= POINTS
    assert (shown[0], shown[-1]) == (0, 1001)
    area = np.trapezoid(y[shown], x[shown])
    assert area == pytest.approx(np.trapezoid(y, x), abs=1e-3)
