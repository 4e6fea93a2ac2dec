"""`anew bench recipe` and `anew bench sweep`: experiments of many runs, which may be stopped anywhere and go on by the same command."""

import itertools
import json
import logging
import math
import statistics
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anew.bench import competitors as rivals
from anew.bench import time_to_loss
from anew.bench.sweep import Ended, Trial, alone, limited, run_all
from anew.bench.time_to_loss import Arm, Plan, Ratio, against
from anew.checkpoint import folder as checkpoint
from anew.config.schema import Config
from anew.config.values import bytes_of
from anew.errors import UserError
from anew.report import png as pictures
from anew.report.run import Run
from anew.utils.files import write_atomic

NAMES = {"reference": "reference recipe", "adamw": "AdamW, tuned", "fast": "fast recipe"}


def _check(config: Config, a: Any) -> None:
    """Every run has to end in a validation loss, and must not take the data away from the next."""
    if config.data.val_tokens < 2 or config.data.one_batch:
        raise UserError(
            "runs are compared by their held-out loss; leave out --one-batch, and give --val-tokens."
        )
    if bytes_of(config.data.disk_budget):
        raise UserError(
            "with a disk budget the first run would remove the tokens of the next; leave out --disk-budget."
        )
    if a.minutes < 0:
        raise UserError(f"--minutes {a.minutes:g} cannot be negative.")


def recipe(config: Config, device: str, a: Any, given: Collection[str] = ()) -> dict[str, Any]:
    """Time to a loss: the fast recipe against the reference and against tuned AdamW."""
    _check(config, a)
    if taken := sorted({*given} & {*time_to_loss.OWNED}):
        raise UserError(f"--{taken[0].replace('_', '-')} is what the arms differ in; leave it out.")
    if config.optim.optimizer != "adamw":
        raise UserError(
            f"the arms are made from a recipe with AdamW, as gpt2-5m and gpt2-124m are; {config.recipe} has another."
        )
    if not rivals.is_installed("transformers"):
        raise UserError(
            "losses are those of the exported folders in transformers; install transformers."
        )
    if a.seeds < 1:
        raise UserError(f"--seeds {a.seeds} must be at least 1.")
    out = Path(config.run.out or f"runs/bench-{config.recipe}")
    plan = Plan(config, tuple(range(1, a.seeds + 1)), time_to_loss.tuning(config))
    print(
        f"{config.recipe} on {config.data.data}, horizon {config.total_tokens:,} tokens, {a.seeds} seeds, on {device}; runs in {out}\n",
        flush=True,
    )

    def loss_of(end: Ended) -> float:
        """What transformers finds, once for each run and number of windows."""
        if math.isinf(end.loss):
            return end.loss
        kept = end.folder / f"exported_loss_{config.data.val_tokens}.json"
        with alone(end.folder / ".exported.lock"):
            if not kept.is_file():
                folder = checkpoint.folder_of(end.folder, end.config.run.steps)
                scored = rivals.exported_loss(
                    folder, end.config.override(val_tokens=config.data.val_tokens), device
                )
                write_atomic(kept, json.dumps(scored))
        return float(json.loads(kept.read_text()))

    with _quiet(), limited(a.minutes) as stop:
        best, arms = plan.run(out, stop, loss_of, lambda line: print(line, flush=True))
    facts: dict[str, Any] = json.loads(
        json.dumps(_table(best, arms)), parse_constant=lambda _: None
    )  # JSON has no infinity
    (out / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if a.picture:
        points = [(NAMES[arm.name], arm.tokens, arm.losses) for arm in arms]
        pictures.time_to_loss(
            points,
            f"{config.recipe} on {Path(config.data.data).name}",
            config.data.unit,
            Path(a.picture),
        )
    return facts


@contextmanager
def _quiet() -> Iterator[None]:
    """A line for each run on the console; what a run says of itself stands in its own log.txt."""
    console = list(logging.getLogger("anew").handlers)
    for handler in console:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler in console:
            handler.setLevel(logging.NOTSET)


def _table(best: dict[str, dict[str, Any]], arms: list[Arm]) -> dict[str, Any]:
    """The verdict, printed and as figures."""
    print("\nlosses of the exported folders in transformers, fp32: mean and spread of seeds;")
    print("seconds compare if all ran on one machine, as many at a time\n")
    print("arm                     tokens   seconds  loss")
    for arm in arms:
        mean = sum(arm.losses) / len(arm.losses)
        seconds = sum(arm.seconds) / len(arm.seconds)
        print(
            f"{NAMES[arm.name]:<18} {arm.tokens:>11,} {seconds:>9,.0f}  {mean:.4f} ({min(arm.losses):.4f} to {max(arm.losses):.4f})"
        )
    for name, settings in best.items():
        print(
            f"best of those tried, {NAMES[name]}: "
            + ", ".join(f"{key} {value:g}" for key, value in settings.items())
        )
    fast = [arm for arm in arms if arm.name == "fast"]
    facts: dict[str, Any] = {"tuned": best, "arms": [vars(arm) for arm in arms], "against": {}}
    for arm in (arm for arm in arms if arm.name != "fast"):
        tokens, time = against(arm, fast), against(arm, fast, seconds=True)
        speed = Ratio.of([
            (statistics.mean(f.tokens / f.seconds[i] for f in fast) * arm.seconds[i] / arm.tokens, "") for i in range(len(arm.seconds))
        ])  # fmt: skip
        print(f"\nthe fast recipe against {NAMES[arm.name]}, to the same loss:")
        print(f"  {tokens} times fewer tokens")
        print(f"  {time} times less time")
        print(f"  {speed} times the tokens a second")
        facts["against"][arm.name] = {
            "tokens": vars(tokens),
            "time": vars(time),
            "speed": vars(speed),
        }
    return facts


def sweep(config: Config, device: str, a: Any, given: Collection[str] = ()) -> dict[str, Any]:  # noqa: ARG001
    """The validation loss over a grid of one setting or two; every run keeps its curve."""
    _check(config, a)
    axes = _axes(a.over, config)
    out = Path(config.run.out or f"runs/sweep-{config.recipe}")
    names = list(axes)
    grid = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    trials = [
        Trial(",".join(f"{k}={v}" for k, v in point.items()), _at(config, point)) for point in grid
    ]
    for trial in trials:
        _check(trial.config, a)
    print(f"{config.recipe}, {len(trials)} runs in {out}\n", flush=True)
    with _quiet(), limited(a.minutes) as stop:
        ends = run_all(
            trials,
            out,
            stop,
            lambda t, e: print(
                f"{t.name:<40} {e.tokens:>11,} tokens {e.seconds:>6.0f} s  loss {e.loss:.4f}",
                flush=True,
            ),
        )
    losses = [ends[trial.name].loss for trial in trials]
    columns = axes[names[1]] if len(names) > 1 else [""]
    rows = [losses[i : i + len(columns)] for i in range(0, len(losses), len(columns))]
    over_seeds = names[1:] == ["seed"]  # then settings are compared by their mean
    marks = [statistics.mean(row) for row in rows] if over_seeds else losses
    print(
        f"\nvalidation loss; {names[0]} down" + (f", {names[1]} across" if len(names) > 1 else "")
    )
    print(
        " " * 12
        + "".join(f"{column!s:>10}" for column in [*columns, *(["mean"] if over_seeds else [])])
    )
    for value, row in zip(axes[names[0]], rows, strict=True):
        shown = [*row, statistics.mean(row)] if over_seeds else row
        print(
            f"{value!s:>12}"
            + "".join(f"{loss:>9.4f}{'*' if loss == min(marks) else ' '}" for loss in shown)
        )
    best = [end.folder for end in sorted(ends.values(), key=lambda end: end.loss)[:4]]
    if a.picture:
        pictures.progress([Run.read(folder) for folder in best], Path(a.picture))
    print("\ncurves of the best, side by side:\n  anew report " + " ".join(map(str, best)))
    return {"runs": [{**point, "loss": loss} for point, loss in zip(grid, losses, strict=True)]}


def _at(config: Config, point: dict[str, Any]) -> Config:
    """`config` with these settings; the rate that a schedule ends on keeps its share of the peak."""
    share = config.optim.min_lr / config.optim.lr
    ending = {"min_lr": share * point["lr"]} if "lr" in point and "min_lr" not in point else {}
    return config.override(**ending, **point).check()


def _axes(text: str, config: Config) -> dict[str, list[Any]]:
    """'lr=1e-3,2e-3 weight_decay=0,0.1' as {setting: values}."""
    axes: dict[str, list[Any]] = {}
    for part in text.split():
        name, _, values = part.partition("=")
        name = name.replace("-", "_")
        here = next(
            (
                getattr(group, name)
                for group in (config.model, config.data, config.optim, config.run)
                if hasattr(group, name)
            ),
            None,
        )
        if not values or here is None:
            raise UserError(
                f"--over {part} is no setting with values; write it as 'lr=1e-3,2e-3 weight_decay=0,0.1'."
            )
        try:
            axes[name] = [type(here)(value) if not isinstance(here, bool) else {"true": True, "false": False}[value.lower()]
                          for value in values.split(",")]  # fmt: skip
        except (ValueError, KeyError):
            raise UserError(
                f"--over {part}: {name} is {type(here).__name__}, and one of these is not."
            ) from None
    if not 1 <= len(axes) <= 2:
        raise UserError(
            "a sweep is over one setting or two: --over 'lr=1e-3,2e-3 weight_decay=0,0.1'."
        )
    return axes
