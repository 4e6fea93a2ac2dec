"""Lines over tokens or steps, as SVG that follows the page's colours, dark or light.

    svg = line_chart("Validation loss", [Line("this run", points, "own-1")], unit="nats a token")

Drawn here and not by matplotlib, because a picture cannot change its colours at night or say the value under a finger.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]
WIDE, NARROW, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 480, 340, 62, 14, 14, 36
MOST_POINTS = 240  # a line: more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    """`kind` is a class of page.css: own-1 to own-4, faint-1 to faint-4, context-1 to context-6, or level: one value for all x."""

    name: str
    points: Points
    kind: str = "own-1"


@dataclass(frozen=True)
class Whisker:
    """A value that is expected at x, and how far it may be off; with `start`, (x, value) of what is known, a band leads there."""

    name: str
    x: float
    value: float
    plus_minus: float
    start: tuple[float, float] | None = None


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points, each the mean of its neighbours; the last one is kept as it is."""
    if len(points) <= most:
        return points
    size = len(points) / most
    found = []
    for i in range(most):
        part = points[round(i * size) : max(round(i * size) + 1, round((i + 1) * size))]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*found[:-1], points[-1]]


def smoothed(points: Points, share: float = 0.02) -> Points:
    """A moving mean over this share of the points, for training losses, which jump from batch to batch."""
    half = int(len(points) * share / 2)
    if half < 1:
        return points
    found, total = [], [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        found.append((x, (total[high] - total[low]) / (high - low)))
    return found


def short(value: float) -> str:
    """1.2B, 300M, 15k, 0.003, 6e-4."""
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    magnitude = 10 ** math.floor(math.log10(raw))
    step = min(
        (m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw), default=10 * magnitude
    )
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    unit: str,
    x_unit: str = "tokens",
    whiskers: Sequence[Whisker] = (),
    settled: bool = False,
    percent: bool = False,
    wide: bool = False,
) -> str:
    """One chart with its legend. `settled`: the scale need not show the first tenth of the run, where a loss falls from chance."""
    width = WIDE if wide else NARROW
    drawn = [
        Line(line.name, [(x, y) for x, y in thinned(line.points) if math.isfinite(y)], line.kind)
        for line in lines
    ]
    drawn.sort(
        key=lambda line: line.kind.startswith(("faint", "own")) + line.kind.startswith("own")
    )  # the run itself on top
    moving = [line for line in drawn if line.points and line.kind != "level"]
    if not moving:
        return ""
    x_high = max([max(x for x, _ in line.points) for line in moving] + [w.x for w in whiskers])
    x_low = 0.0 if x_high > 0 else x_high - 1
    own_end = max(
        (line.points[-1][0] for line in moving if not line.kind.startswith("context")),
        default=x_high,
    )
    after = 0.1 * own_end if settled and any(len(line.points) > 9 for line in moving) else -math.inf
    shown = [y for line in moving for x, y in line.points if x >= after] + [
        y for line in drawn if line.kind == "level" for _, y in line.points
    ]
    shown += [y for w in whiskers for y in (w.value - w.plus_minus, w.value + w.plus_minus)]
    y_low, y_high = min(shown), max(shown)
    pad = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = (max(0.0, y_low - pad) if y_low >= 0 else y_low - pad), y_high + pad

    def sx(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low or 1) * (width - LEFT - RIGHT)

    def sy(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def written(y: float) -> str:
        return f"{100 * y:.4g}%" if percent else short(y)

    data = [
        {
            "name": line.name,
            "kind": line.kind,
            "points": [
                [round(sx(x), 1), round(sy(y), 1), short(x), written(y)] for x, y in line.points
            ],
        }
        for line in moving
    ]
    axes = [
        *(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{sy(y):.1f}" y2="{sy(y):.1f}"/>'
          f'<text x="{LEFT - 8}" y="{sy(y) + 4:.1f}" text-anchor="end">{written(y)}</text>' for y in ticks(y_low, y_high)),
        *(f'<text x="{sx(x):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{short(x)}</text>' for x in ticks(x_low, x_high, 6)),
    ]  # fmt: skip
    marks = [_level(line, sy(line.points[0][1]), width) for line in drawn if line.kind == "level"]
    marks += [_curve(line.kind, [(sx(x), sy(y)) for x, y in line.points]) for line in moving]
    marks += [
        f'<polygon class="band" points="{sx(w.start[0]):.1f},{sy(w.start[1]):.1f} {sx(w.x):.1f},{sy(w.value - w.plus_minus):.1f} '
        f'{sx(w.x):.1f},{sy(w.value + w.plus_minus):.1f}"/>'
        for w in whiskers if w.start
    ]  # fmt: skip
    marks += [
        _whisker(sx(w.x) - 3, sy(w.value), sy(w.value - w.plus_minus), sy(w.value + w.plus_minus))
        for w in whiskers
    ]
    legend = [
        f'<li class="{line.kind}">{escape(line.name)}</li>'
        for line in moving
        if not line.kind.startswith("faint")
    ]
    legend += [f'<li class="whisker">{escape(w.name)}</li>' for w in whiskers]
    clip = f"clip-{hashlib.sha256(axes[0].encode() + title.encode()).hexdigest()[:8]}"
    box = f'<rect x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span>{escape(unit)}</span></figcaption><div class="plot">'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}" data-lines="{escape(json.dumps(data))}">'
        f'<clipPath id="{clip}">{box}</clipPath>{"".join(axes)}<g clip-path="url(#{clip})">{"".join(marks)}</g>'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg><div class="tip"></div></div>'
        f'<ul class="legend">{"".join(legend)}<li class="x-unit">{escape(x_unit)} &rarr;</li></ul></figure>'
    )


def _level(line: Line, y: float, width: int) -> str:
    return (
        f'<line class="level" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="level" x="{width - RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{escape(line.name)}</text>'
    )


def _curve(kind: str, points: Points) -> str:
    if len(points) == 1:
        [(x, y)] = points
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _whisker(x: float, middle: float, low: float, high: float) -> str:
    return (
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        f'<circle class="whisker" cx="{x:.1f}" cy="{middle:.1f}" r="4"/>'
    )
