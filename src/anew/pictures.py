"""Pictures of figures, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path


def bars(rows: Sequence[tuple[str, float]], unit: str, title: str, path: Path) -> None:
    """One horizontal bar a row, the value behind it, the first row on top."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
