"""Line charts as SVG text that follows the page's colours, dark or light.

    svg = line_chart("Validation loss", [Line("this run", points, "own-1")], unit="nats per token")

The charts are not drawn by matplotlib because its pictures cannot follow the page's colours, and
cannot show the values under the pointer.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]  # (x, y)

# Sizes and margins in SVG units.
WIDE = 1000
NARROW = 480
HEIGHT = 340
LEFT = 62
RIGHT = 14
TOP = 14
BOTTOM = 36
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

    With `start`, the last known (x, value), a band leads from there to the whisker.
    """

    name: str
    x: float
    value: float
    plus_minus: float
    start: tuple[float, float] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        return self.value - self.plus_minus, self.value + self.plus_minus


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most so many points, each the mean of neighbours; the last point is kept."""
    if len(points) <= most:
        return points
    size = len(points) / most
    means = []
    for i in range(most):
        begin = round(i * size)
        end = max(begin + 1, round((i + 1) * size))
        part = points[begin:end]
        mean_x = sum(x for x, _ in part) / len(part)
        mean_y = sum(y for _, y in part) / len(part)
        means.append((mean_x, mean_y))
    return [*means[:-1], points[-1]]


def smoothed(points: Points, share: float = 0.02) -> Points:
    """Return the moving mean over a share of the points, for the noisy losses of batches."""
    half = int(len(points) * share / 2)
    if half < 1:
        return points
    sums = [0.0]  # sums[i] is the sum of the first i values
    for _, y in points:
        sums.append(sums[-1] + y)
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
    if not high > low:
        return [low]
    raw = (high - low) / about
    magnitude = 10 ** math.floor(math.log10(raw))
    steps = [factor * magnitude for factor in (1, 2, 2.5, 5, 10)]
    step = min((step for step in steps if step >= raw), default=10 * magnitude)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


@dataclass(frozen=True)
class Axes:
    """The ranges of a chart, and where its values are drawn."""

    width: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    percent: bool

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low or 1)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def text(self, y: float) -> str:
        return f"{100 * y:.4g}%" if self.percent else short(y)


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
    moving: list[Line] = []
    levels: list[Line] = []
    for line in sorted(lines, key=_drawing_order):
        points = [(x, y) for x, y in thinned(line.points) if math.isfinite(y)]
        if points:
            group = levels if line.kind == "level" else moving
            group.append(Line(line.name, points, line.kind))
    if not moving:
        return ""
    width = WIDE if wide else NARROW
    axes = _axes(moving, levels, whiskers, skip_start, percent, width)
    grid = _grid(axes)
    marks = [_level(line, axes) for line in levels]
    marks += [_curve(line, axes) for line in moving]
    marks += [_band(whisker, whisker.start, axes) for whisker in whiskers if whisker.start]
    marks += [_whisker(whisker, axes) for whisker in whiskers]
    data = escape(json.dumps([_pointer_data(line, axes) for line in moving]))
    clip = f"clip-{hashlib.sha256(grid[0].encode() + title.encode()).hexdigest()[:8]}"
    area = (
        f'<rect x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(unit)}</span>'
        f'</figcaption><div class="plot"><svg viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" data-lines="{data}">'
        f'<clipPath id="{clip}">{area}</clipPath>{"".join(grid)}'
        f'<g clip-path="url(#{clip})">{"".join(marks)}</g>'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="tip"></div></div>{_legend(moving, whiskers)}</figure>'
    )


def _drawing_order(line: Line) -> int:
    """Order lines so that the run itself is drawn on top, then its single batches."""
    if line.kind.startswith("own"):
        return 2
    return 1 if line.kind.startswith("faint") else 0


def _axes(
    moving: Sequence[Line],
    levels: Sequence[Line],
    whiskers: Sequence[Whisker],
    skip_start: bool,
    percent: bool,
    width: int,
) -> Axes:
    """Return axes that show all lines and whiskers."""
    x_values = [x for line in moving for x, _ in line.points]
    x_high = max([*x_values, *(whisker.x for whisker in whiskers)])
    x_low = 0.0 if x_high > 0 else x_high - 1
    ends = [line.points[-1][0] for line in moving if not line.kind.startswith("context")]
    own_end = max(ends, default=x_high)
    y_values = [y for line in levels for _, y in line.points]
    y_values += [end for whisker in whiskers for end in whisker.ends]
    skips = skip_start and any(len(line.points) > 9 for line in moving)
    for line in moving:
        shown = settled(line.points, own_end) if skips else line.points
        y_values += [y for _, y in shown]
    lowest, highest = min(y_values), max(y_values)
    padding = 0.06 * (highest - lowest) or 0.05 * abs(highest) or 1.0
    y_low = lowest - padding
    if lowest >= 0:
        y_low = max(0.0, y_low)
    return Axes(width, x_low, x_high, y_low, highest + padding, percent)


def _grid(axes: Axes) -> list[str]:
    """Return the horizontal lines and the labels of both axes."""
    found = []
    for value in ticks(axes.y_low, axes.y_high):
        y = axes.y(value)
        found.append(
            f'<line class="grid" x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{axes.text(value)}</text>'
        )
    for value in ticks(axes.x_low, axes.x_high, 6):
        position = f'x="{axes.x(value):.1f}" y="{HEIGHT - 12}"'
        found.append(f'<text {position} text-anchor="middle">{short(value)}</text>')
    return found


def _level(line: Line, axes: Axes) -> str:
    """Return a horizontal line with its name."""
    y = axes.y(line.points[0][1])
    right = axes.width - RIGHT
    return (
        f'<line class="level" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="level" x="{right - 4}" y="{y - 5:.1f}" text-anchor="end">'
        f"{escape(line.name)}</text>"
    )


def _curve(line: Line, axes: Axes) -> str:
    """Return a line, or a dot for a single point."""
    points = [(axes.x(x), axes.y(y)) for x, y in line.points]
    if len(points) == 1:
        [(x, y)] = points
        return f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{line.kind}" points="{path}"/>'


def _band(whisker: Whisker, start: tuple[float, float], axes: Axes) -> str:
    """Return a triangle from the last known value to the projected range."""
    x = axes.x(whisker.x)
    low, high = whisker.ends
    return (
        f'<polygon class="band" points="{axes.x(start[0]):.1f},{axes.y(start[1]):.1f} '
        f'{x:.1f},{axes.y(low):.1f} {x:.1f},{axes.y(high):.1f}"/>'
    )


def _whisker(whisker: Whisker, axes: Axes) -> str:
    """Return a vertical line over the projected range, with a dot at the value."""
    x = axes.x(whisker.x) - 3  # so that it is not on the edge of the chart
    low, high = whisker.ends
    return (
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{axes.y(low):.1f}" y2="{axes.y(high):.1f}"/>'
        f'<circle class="whisker" cx="{x:.1f}" cy="{axes.y(whisker.value):.1f}" r="4"/>'
    )


def _pointer_data(line: Line, axes: Axes) -> dict[str, object]:
    """Return the places and texts that page.js shows under the pointer."""
    points = [
        [round(axes.x(x), 1), round(axes.y(y), 1), short(x), axes.text(y)] for x, y in line.points
    ]
    return {"name": line.name, "kind": line.kind, "points": points}


def _legend(lines: Sequence[Line], whiskers: Sequence[Whisker]) -> str:
    """Return the names of the lines and whiskers, and the unit of the x axis."""
    entries = [(line.kind, line.name) for line in lines if not line.kind.startswith("faint")]
    entries += [("whisker", whisker.name) for whisker in whiskers]
    items = "".join(f'<li class="{kind}">{escape(name)}</li>' for kind, name in entries)
    return f'<ul class="legend">{items}<li class="x-unit">tokens &rarr;</li></ul>'
