"""Pictures of figures, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anew.errors import UserError
from anew.report.run import Run
from anew.report.svg import smoothed

COLOURS = ("#1f5fbf", "#b4541a", "#6b3fa0", "#0d7a6a")


def bars(rows: Sequence[tuple[str, float]], unit: str, title: str, path: Path) -> None:
    """One horizontal bar a row, the value behind it, the first row on top."""
    plt = _pyplot()
    names, values = [name for name, _ in rows], [value for _, value in rows]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2))
    drawn = axes.barh(names, values, color=["#b0b7c3"] + ["#3b6ea8"] * (len(rows) - 1), height=0.7)
    axes.bar_label(drawn, labels=[f"{value:,.0f}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.1)
    _save(plt, figure, path)


def time_to_loss(
    arms: Sequence[tuple[str, int, Sequence[float]]], what: str, unit: str, path: Path
) -> None:
    """Where each arm ended, (name, tokens, a loss for each seed): runs of one name on a line, seeds as points. `what`: model and text."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, colour in zip(dict.fromkeys(name for name, _, _ in arms), COLOURS, strict=False):
        mine = sorted((tokens, losses) for other, tokens, losses in arms if other == name)
        means = [sum(losses) / len(losses) for _, losses in mine]
        axes.plot(
            [tokens for tokens, _ in mine],
            means,
            color=colour,
            linewidth=1.5,
            label=name,
            marker="_",
            markersize=14,
        )
        for tokens, losses in mine:
            axes.scatter([tokens] * len(losses), losses, color=colour, s=14, alpha=0.7)
        if len(mine) == 1:
            axes.axhline(means[0], color=colour, linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    ticks = sorted({tokens for _, tokens, _ in arms})
    axes.set_xticks(ticks, [f"{tokens / 1e6:.3g}M" for tokens in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{unit}s of the whole run (logarithmic)")
    axes.set_ylabel(f"validation loss, nats a {unit}")
    axes.set_title(
        f"{what}: every point is a run that annealed to its own end", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e5ea", linewidth=0.7)
    axes.legend(frameon=False)
    _save(plt, figure, path)


def progress(runs: Sequence[Run], path: Path) -> Path:
    """Loss, learning rate, gradient norm and speed over tokens, of one run or several."""
    plt = _pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(12, 7.5))
    panels = [("loss, nats a token", "train/loss"), ("learning rate", "train/lr"), ("gradient norm", "train/grad_norm"),
              ("tokens a second", "speed/tokens_per_second")]  # fmt: skip
    for axes, (title, key) in zip(grid.flat, panels, strict=True):
        for run, colour in zip(runs, COLOURS, strict=False):
            points = run.points(key)
            if not points:  # never finite
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                alpha=0.3 if key == "train/loss" else 1.0,
                linewidth=1,
            )
            if key == "train/loss":
                axes.plot(
                    *zip(*smoothed(points), strict=True),
                    color=colour,
                    label=f"{run.name}: training",
                )
                if val := run.points("val/loss"):
                    axes.plot(
                        *zip(*val, strict=True),
                        color=colour,
                        marker="o",
                        linestyle="--",
                        markersize=4,
                        label=f"{run.name}: validation",
                    )
                settled = [
                    y
                    for other in runs
                    for _, y in other.points(key)[len(other.points(key)) // 10 :]
                ]
                if settled:
                    axes.set_ylim(0.97 * min(settled), 1.03 * max(settled))
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e5ea", linewidth=0.7)
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        ", ".join(f"{run.name} at step {run.last['step']:,}" for run in runs), x=0.01, ha="left"
    )
    _save(plt, figure, path)
    return path


def check() -> None:
    """UserError where no picture could be drawn: better before minutes of measuring than behind them."""
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install -e '.[pictures]'.") from error

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
