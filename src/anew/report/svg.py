"""Line charts as SVG text that follows the page's colours, dark or light.

    svg = line_chart("Validation loss", [Line("this run", points, "own-1")], unit="nats per token")

The charts are not drawn by matplotlib because its pictures cannot follow the page's colours, and
cannot show the values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from anew.report.templates import render

Points = list[tuple[float, float]]  # (x, y)

MOST_POINTS = 240  # of a line; more are indistinguishable at this width


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    `kind` is a class of page.css: own-1 to own-4, faint-1 to faint-4, context-1 to context-6, or
    level for one value at all x.
    """

    name: str
    points: Points
    kind: str = "own-1"


@dataclass(frozen=True)
class Whisker:
    """A projected value at x with its uncertainty.

    A band leads to it from `start`, the last known (x, value).
    """

    name: str
    x: float
    value: float
    plus_minus: float
    start: tuple[float, float]

    @property
    def ends(self) -> tuple[float, float]:
        return self.value - self.plus_minus, self.value + self.plus_minus


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most so many points, each the mean of neighbours; the last point is kept."""
    if len(points) <= most:
        return points
    size = len(points) / most
    edges = [round(i * size) for i in range(most + 1)]
    means = []
    for begin, end in pairwise(edges):
        x_values, y_values = zip(*points[begin:end], strict=True)
        means.append((fmean(x_values), fmean(y_values)))
    return [*means[:-1], points[-1]]


def smoothed(points: Points, share: float = 0.02) -> Points:
    """Return the moving mean over a share of the points, for the noisy losses of batches."""
    half = int(len(points) * share / 2)
    if half < 1:
        return points
    values = [y for _, y in points]
    sums = list(accumulate(values, initial=0.0))  # sums[i] is the sum of the first i values
    means = []
    for i, (x, _) in enumerate(points):
        low = max(0, i - half)
        high = min(len(points), i + half + 1)
        means.append((x, (sums[high] - sums[low]) / (high - low)))
    return means


def settled(points: Points, end: float) -> Points:
    """Return the points after the first tenth of a run, in which a loss falls from chance."""
    return [(x, y) for x, y in points if x >= 0.1 * end]


def short(value: float) -> str:
    """Return a number in a few characters: 1.2B, 300M, 15k, 0.003, 6e-4."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about so many round numbers between two values."""
    raw = (high - low) / about
    magnitude = 10 ** math.floor(math.log10(raw))
    steps = [factor * magnitude for factor in (1, 2, 2.5, 5, 10)]
    step = min((step for step in steps if step >= raw), default=10 * magnitude)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """The values of one axis from `low` to `high`, drawn from `begin` to `end` in SVG units."""

    low: float
    high: float
    begin: int
    end: int
    percent: bool = False

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def text(self, value: float) -> str:
        return f"{100 * value:.4g}%" if self.percent else short(value)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Return the places and texts of about so many round values."""
        values = ticks(self.low, self.high, about)
        return [(self.place(value), self.text(value)) for value in values]


def line_chart(
    title: str,
    lines: Sequence[Line],
    unit: str,
    whiskers: Sequence[Whisker] = (),
    skip_start: bool = False,
    percent: bool = False,
    wide: bool = False,
) -> str:
    """Return one chart over tokens, with its legend, as HTML; empty if no line has points.

    With `skip_start` the y axis need not show the first tenth of the run. `percent` labels values
    as percentages.
    """
    drawn = []
    for line in sorted(lines, key=_drawing_order):
        points = [(x, y) for x, y in thinned(line.points) if math.isfinite(y)]
        if points:
            drawn.append(Line(line.name, points, line.kind))
    levels = [line for line in drawn if line.kind == "level"]
    curves = [line for line in drawn if line.kind != "level"]
    if not curves:
        return ""
    width = 1000 if wide else 480  # in SVG units, as the places below
    x_values = [x for line in curves for x, _ in line.points]
    x_high = max([*x_values, *(whisker.x for whisker in whiskers)])
    x_axis = Axis(0.0, x_high or 1.0, begin=62, end=width - 14)
    y_low, y_high = _y_range(curves, levels, whiskers, skip_start)
    y_axis = Axis(y_low, y_high, begin=304, end=14, percent=percent)
    return render(
        "chart.html",
        title=title,
        unit=unit,
        width=width,
        x_axis=x_axis,
        y_axis=y_axis,
        lines=curves,
        levels=levels,
        whiskers=whiskers,
        pointer_data=json.dumps([_pointer_data(line, x_axis, y_axis) for line in curves]),
    )


def _drawing_order(line: Line) -> int:
    """Order lines so that the run itself is drawn on top, then its single batches."""
    return ("level", "context", "faint", "own").index(line.kind.partition("-")[0])


def _y_range(
    curves: Sequence[Line],
    levels: Sequence[Line],
    whiskers: Sequence[Whisker],
    skip_start: bool,
) -> tuple[float, float]:
    """Return the ends of a y axis for these lines, without the first tenth if `skip_start`."""
    values = [y for line in levels for _, y in line.points]
    for whisker in whiskers:
        values += whisker.ends
    end = 0.0
    if skip_start and any(len(line.points) > 9 for line in curves):
        own = [line for line in curves if not line.kind.startswith("context")]
        end = max(line.points[-1][0] for line in own or curves)
    for line in curves:
        values += [y for _, y in settled(line.points, end)]
    low, high = min(values), max(values)
    padding = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    floor = 0.0 if low >= 0 else -math.inf
    return max(floor, low - padding), high + padding


def _pointer_data(line: Line, x_axis: Axis, y_axis: Axis) -> dict[str, object]:
    """Return the places and texts that page.js shows under the pointer."""
    points = [
        [x_axis.place(x), y_axis.place(y), x_axis.text(x), y_axis.text(y)] for x, y in line.points
    ]
    return {"name": line.name, "kind": line.kind, "points": points}
