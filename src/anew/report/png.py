"""The PNG files that `--picture` asks for, drawn by matplotlib.

The page has its own charts (svg.py). A PNG can be shown where a page cannot, such as in a README.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anew.errors import UserError, missing_packages
from anew.report.html import reference_lines
from anew.report.run import Run
from anew.report.svg import Line, Points, settled, smoothed

COLOURS = ("#1f5fbf", "#b4541a", "#6b3fa0", "#0d7a6a")
REFERENCE_COLOUR = "#9aa1ad"
GRID_COLOUR = "#e3e5ea"
PANELS = {
    "train/loss": "loss, nats a token",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "speed/tokens_per_second": "tokens a second",
}


def bars(rows: Sequence[tuple[str, float]], unit: str, title: str, path: Path) -> None:
    """Draw a horizontal bar with its value for each row; the first row is on top."""
    pyplot = _pyplot()
    height = 0.45 * len(rows) + 1.2
    figure, axes = pyplot.subplots(figsize=(8, height))
    names = [name for name, _ in rows]
    values = [value for _, value in rows]
    drawn = axes.barh(names, values, color="#3b6ea8", height=0.7)
    drawn[0].set_color("#b0b7c3")
    labels = [f"{value:,.0f}" for value in values]
    axes.bar_label(drawn, labels=labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.1)
    _save(figure, path)


def time_to_loss(
    arms: Sequence[tuple[str, int, Sequence[float]]], title: str, unit: str, path: Path
) -> None:
    """Draw the loss at which each arm ended over its tokens.

    `arms` are (name, tokens, losses of the seeds). Arms of one name are joined by a line through
    their means; every seed is a point.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    names = dict.fromkeys(name for name, _, _ in arms)
    for name, colour in zip(names, COLOURS, strict=False):
        ends = sorted((tokens, losses) for other, tokens, losses in arms if other == name)
        means = [(float(tokens), sum(losses) / len(losses)) for tokens, losses in ends]
        _draw(axes, means, colour, linewidth=1.5, label=name, marker="_", markersize=14)
        for tokens, losses in ends:
            same_tokens = [tokens] * len(losses)
            axes.scatter(same_tokens, losses, color=colour, s=14, alpha=0.7)
        if len(ends) == 1:
            axes.axhline(means[0][1], color=colour, linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    ticks = sorted({tokens for _, tokens, _ in arms})
    labels = [f"{tokens / 1e6:.3g}M" for tokens in ticks]
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.set_ylabel(f"validation loss, nats a {unit}")
    _finish(
        axes,
        f"{title}: every point is a run that annealed to its own end",
        f"{unit}s of the whole run (logarithmic)",
    )
    axes.legend(frameon=False)
    _save(figure, path)


def loss_over_compute(
    arms: Sequence[tuple[str, Points, Points]], title: str, unit: str, path: Path
) -> None:
    """Draw the losses of runs over their compute, and the line that was fitted to each arm.

    `arms` are (name, (FLOPs, loss) of every run, points of the line). Both axes are logarithmic.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for (name, runs, line), colour in zip(arms, COLOURS, strict=False):
        _draw(axes, line, colour, linewidth=1.5, label=name)
        flops, losses = zip(*runs, strict=True)
        axes.scatter(flops, losses, color=colour, s=14, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_ylabel(f"validation loss, nats a {unit} (logarithmic)")
    _finish(
        axes,
        f"{title}: every point is a run, every line a power law",
        "floating-point operations of a run (logarithmic)",
    )
    axes.legend(frameon=False)
    _save(figure, path)


def progress(runs: Sequence[Run], path: Path) -> Path:
    """Draw loss, learning rate, gradient norm and speed of one run or several over tokens."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(2, 2, figsize=(12, 7.5))
    for axes, (key, title) in zip(grid.flat, PANELS.items(), strict=True):
        for run, colour in zip(runs, COLOURS, strict=False):
            if key == "train/loss":
                _draw_losses(axes, run, colour)
            else:
                _draw(axes, run.points(key), colour)
        _finish(axes, title, "tokens")
    references = reference_lines(runs[0], end=runs[0].last["tokens"])
    _draw_references(grid[0, 0], references)
    if grid[0, 0].lines:  # a run without finite losses draws none
        grid[0, 0].legend(frameon=False, fontsize=9)
    losses = []
    for run in runs:
        points = settled(run.points("train/loss"), run.last["tokens"])
        losses += [loss for _, loss in points]
    if losses:
        losses += [line.points[0][1] for line in references if line.kind == "level"]
        lowest = 0.97 * min(losses)
        highest = 1.03 * max(losses)
        grid[0, 0].set_ylim(lowest, highest)
    steps = ", ".join(f"{run.name} at step {run.last['step']:,}" for run in runs)
    figure.suptitle(steps, x=0.01, ha="left")
    _save(figure, path)
    return path


def _draw_losses(axes: Any, run: Run, colour: str) -> None:
    points = run.points("train/loss")
    _draw(axes, points, colour, alpha=0.3)
    _draw(axes, smoothed(points), colour, linewidth=1.5, label=f"{run.name}: training")
    _draw(
        axes,
        run.points("val/loss"),
        colour,
        linewidth=1.5,
        marker="o",
        linestyle="--",
        markersize=4,
        label=f"{run.name}: validation",
    )


def _draw_references(axes: Any, lines: Sequence[Line]) -> None:
    """Draw the losses of public runs, and of GPT-2 or the baseline, as the page does."""
    for line in lines:
        if line.kind == "level":
            axes.axhline(line.points[0][1], color=REFERENCE_COLOUR, linestyle=":", label=line.name)
        else:
            _draw(axes, line.points, REFERENCE_COLOUR, label=line.name)


def _draw(axes: Any, points: Points, colour: str, linewidth: float = 1, **style: Any) -> None:
    """Draw a line through the points, if there are any."""
    if points:
        x_values, y_values = zip(*points, strict=True)
        axes.plot(x_values, y_values, color=colour, linewidth=linewidth, **style)


def _finish(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID_COLOUR, linewidth=0.7)


def check(path: Path) -> None:
    """Raise UserError where no picture can be drawn at `path`, before minutes of measuring."""
    _pyplot()
    if path.suffix.lower() != ".png":
        raise UserError(f"the picture {path} must have a name that ends in .png.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"the picture {path} cannot be written; choose another --picture.")


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing_packages("a picture", "matplotlib") from error

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
