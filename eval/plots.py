"""Plots as SVG that takes its colours from the page, so that one picture serves light, dark and paper.

Matplotlib draws with colours that stand for others: they are replaced by the page's variables (`page.css`). Letters
stay letters, so that they can be searched and keep the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from eval.methods import WHAT

SIZE = 4.6, 3.7  # inches: on a phone's width letters keep the size that they have here
INK, FAINT = "#010101", "#020202"
COLOURS = tuple(f"#0300{i:02x}" for i in range(9))  # --c0, --c1 ... of the page, told apart by the colour-blind
MARKERS = "osD^vP*Xh<>pd"
PHASES = {"draft": 4, "verify": 7, "target": 0, "other": 2}  # of Stats.seconds, and their colours
IN_TURN = (0, 7, 4, 2, 5, 6, 3, 8, 1)  # colours of kinds, neighbours as unlike as can be
LARGEST = 400.0  # points squared, of a mark that stands for all cuts
RULES = 4  # kinds that share a colour, at most, where their names begin with the same word
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "parse",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}

Row = Mapping[str, Any]
Curve = Sequence[Sequence[float]]  # pairs


class Picture(NamedTuple):
    """An SVG element, and a sentence or two that say what it shows."""

    svg: str
    caption: str


class LineStyle(NamedTuple):
    """How a kind's line is drawn."""

    colour: str
    dashes: tuple[float, ...]  # lengths of line and gap, points; none is solid
    width: float  # points
    marker: str  # empty is none


def speed_and_accuracy(rows: Sequence[Row], sweep: Sequence[Row], threshold: float | None) -> Picture:
    """The methods with their intervals, and PARSE over thresholds as a line, the calibrated one marked."""

    def draw(axes: Axes) -> None:
        if sweep:
            points = sorted((point["speedup"], point["accuracy"]) for point in sweep)
            line: Any = {"color": _colour("parse"), "linewidth": 1, "linestyle": ":", "marker": "."}
            line |= {"label": "parse, other thresholds"}
            axes.plot(*zip(*points, strict=True), **line)
        for row in rows:
            label = row["name"]
            if label == "parse" and threshold is not None:
                label = f"parse, calibrated ({threshold:.3g})"
            style: Any = {"fmt": _marker(row["name"]), "color": _colour(row["name"]), "label": label}
            style |= {"xerr": _error(row, "speedup"), "yerr": _error(row, "accuracy")}
            axes.errorbar(row["speedup"], row["accuracy"], elinewidth=0.8, markersize=5, **style)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel="times as fast as the target alone", ylabel="answers right", ylim=(None, 1.005))
        axes.set_xscale("log")
        _label_log(axes.xaxis, "x")

    caption = "Bars are 95% intervals."
    if sweep:
        timed = sweep[0]["n"]
        by = "by the verifier's labelled test prompts" if sweep[0]["by_labels"] else f"on {timed} prompts"
        caption += (
            f" The line is PARSE at other thresholds, timed on the first {timed} prompts, so that it need not meet the "
            f"calibrated point; what they lose or gain is {by}."
        )
    return _picture("Speed against accuracy", caption, draw)


def seconds_by_phase(rows: Sequence[Row]) -> Picture:
    """What a request's seconds go into, by method, as stacked bars."""

    def draw(axes: Axes) -> None:
        names = [row["name"] for row in reversed(rows)]
        ends = [0.0] * len(names)
        for phase, colour in PHASES.items():
            widths = [row["seconds"][phase] for row in reversed(rows)]
            axes.barh(names, widths, left=ends, color=COLOURS[colour], label=phase, height=0.7)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds in the engine per request")

    caption = "What writes and what judges: the draft writes, the target verifies what it wrote, the target writes on."
    return _picture("Seconds by phase", caption, draw)


def throughput(tables: Mapping[int, Sequence[Row]]) -> Picture:
    """Requests per second against the number of requests at once."""

    def draw(axes: Axes) -> None:
        for name in [row["name"] for row in next(iter(tables.values()))]:
            points = [
                (at_once, row["requests_per_second"])
                for at_once, rows in sorted(tables.items())
                for row in rows
                if row["name"] == name
            ]
            axes.plot(*zip(*points, strict=True), marker=_marker(name), color=_colour(name), label=name, markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(tables), map(str, sorted(tables)))
        _label_log(axes.yaxis)
        axes.set(xlabel="requests at once", ylabel="requests per second")

    return _picture(
        "Throughput against load", "Where a line comes nearer to the target's, the gain falls with load.", draw
    )


def error_places(row: Row) -> Picture:
    """In which tenth of the answer the verifier errs."""

    def draw(axes: Axes) -> None:
        kinds = (("accept", "wrong, accepted", -0.2, 4), ("reject", "right, rejected", 0.2, 0))
        for kind, label, shift, colour in kinds:
            counts = row[f"false_{kind}_places"]
            places = [n + 0.5 + shift for n in range(len(counts))]
            axes.bar(places, counts, width=0.4, color=COLOURS[colour], label=label)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xticks(range(0, 11, 2), [f"{10 * n}%" for n in range(0, 11, 2)])
        axes.set(xlabel="place of the cut in the answer", ylabel="cuts")

    caption = "PARSE's verdicts on these prompts, up to each draft's first wrong cut."
    return _picture("Where verdicts err", caption, draw)


def verifier_curves(report: Row) -> list[Picture]:
    """ROC, reliability, and tokens accepted against accuracy lost, a line for each kind."""
    curves: Mapping[str, Mapping[str, Curve]] = report["curves"]
    styles = line_styles(list(curves))
    most = max(5 * report["max_accuracy_loss"], 0.05)
    alone = [kind for kind, style in styles.items() if style.marker] or list(styles)  # no rules, which state nothing

    def lines(axes: Axes, key: str, kinds: Collection[str] = styles.keys()) -> None:
        for kind in kinds:
            style = styles[kind]
            points = [point[-2:] for point in curves[kind][key]]
            options: Any = {"color": style.colour, "linewidth": style.width, "label": _plain(kind)}
            options |= {"linestyle": (0, style.dashes) if style.dashes else "-", "solid_capstyle": "round"}
            options |= {"marker": style.marker or ("." if len(points) == 1 else ""), "markersize": 4, "markevery": 0.15}
            axes.plot([x for x, _ in points], [y for _, y in points], **options)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(ylim=(0, 1.02))

    def roc(axes: Axes) -> None:
        lines(axes, "roc")
        axes.set(xlabel="invalid cuts accepted", ylabel="valid cuts accepted", xlim=(0, 1))

    def reliability(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as it should be")
        lines(axes, "reliability", alone)
        for kind in alone:
            marks = [point for point in curves[kind]["reliability"] if len(point) == 3]  # older reports have no shares
            sizes = [LARGEST * share for share, *_ in marks]
            x, y = [x for _, x, _ in marks], [y for *_, y in marks]
            axes.scatter(x, y, sizes, color=styles[kind].colour, alpha=0.35, linewidths=0)
        axes.set(xlabel="confidence", ylabel="share of valid cuts", xlim=(0, 1))

    def use(axes: Axes) -> None:
        axes.axvline(report["max_accuracy_loss"], color=INK, linewidth=0.8, linestyle=":", label="promised")
        lines(axes, "use")
        axes.set(xlabel="accuracy lost", ylabel="draft tokens accepted", xlim=(0, most))

    pictures = (
        ("ROC", "How well each kind tells valid cuts from invalid ones: the higher the line, the better.", roc),
        (
            "Reliability",
            "Whether a confidence of 80% is right in 80% of the cuts; a larger dot stands for more of them. Rules on "
            "the likelihood state no confidence.",
            reliability,
        ),
        ("Use", "What each kind accepts at thresholds that lose so much: the higher at the promise, the faster.", use),
    )
    return [_picture(*picture) for picture in pictures]


def line_styles(kinds: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each kind, no two with the same colour and dashes, however many there are.

    A kind by itself has a thick, solid line with marks. Kinds whose names begin with the same word, such as the rules
    on the target's likelihood, share a colour and differ by their dashes.
    """
    families: dict[str, list[str]] = {}
    for kind in kinds:
        families.setdefault(kind.partition(" ")[0], []).append(kind)
    groups = [family[i : i + RULES] for family in families.values() for i in range(0, len(family), RULES)]
    styles: dict[str, LineStyle] = {}
    taken: set[tuple[str, tuple[float, ...]]] = set()
    for index, group in enumerate(groups):
        colour, alone = COLOURS[IN_TURN[index % len(IN_TURN)]], len(group) == 1
        solid: list[tuple[float, ...]] = [()] if alone else []
        patterns = chain(solid, ((9, 3), (4, 3), (1.5, 3)), ((9, 3) + (2, 3) * n for n in count(1)))
        for kind in group:
            dashes = next(dashes for dashes in patterns if (colour, dashes) not in taken)
            taken.add((colour, dashes))
            marker = MARKERS[index % len(MARKERS)] if alone else ""
            styles[kind] = LineStyle(colour, dashes, 2.4 if alone else 1.4, marker)
    return {kind: styles[kind] for kind in kinds}


def _colour(method: str) -> str:
    """A method's colour, the same in every plot."""
    return COLOURS[list(WHAT).index(method) % len(COLOURS)]


def _marker(method: str) -> str:
    return MARKERS[list(WHAT).index(method) % len(MARKERS)]


def _error(row: Row, key: str) -> list[list[float]]:
    """How far the interval reaches to either side, as Matplotlib takes it."""
    low, high = row[f"{key}_ci95"]
    return [[max(row[key] - low, 0.0)], [max(high - row[key], 0.0)]]


def _label_log(axis: Axis, unit: str = "") -> None:
    """Numbers on a logarithmic axis, also where it does not reach from one power of ten to the next."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axis.set_minor_locator(NullLocator())


def _plain(text: str) -> str:
    """A label without what Matplotlib reads as mathematics, or as a label to be hidden."""
    return ("\u200b" + text if text.startswith("_") else text).replace("$", r"\$")


def _picture(title: str, caption: str, draw: Callable[[Axes], None]) -> Picture:
    """A figure with the legend under it."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize=10, loc="left")
        figure.legend(loc="outside lower left", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(_of_the_page(file.getvalue(), title), caption)


def _of_the_page(svg: str, title: str) -> str:
    """The SVG element with the page's colours, as wide as there is room, and with a name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups: every picture has the same
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box
    svg = f'<svg viewBox="{box[1]}" role="img" aria-label="{title}">' + svg[svg.index(">") + 1 :]
    for colour, variable in {INK: "currentColor", FAINT: "var(--faint)", "xlink:href": "href"}.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"#0300([\da-f]{2})", lambda found: f"var(--c{int(found[1], 16)})", svg)
