"""`anew bench recipe` and `anew bench sweep`: experiments of many runs.

Both can be stopped at any time; the same command continues them.
"""

import itertools
import json
import logging
import math
import shlex
import statistics
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anew.bench import time_to_loss
from anew.bench.competitors import exported_loss, is_installed
from anew.bench.sweep import Trial, TrialResult, run_trials, stop_after
from anew.bench.time_to_loss import Arm, Bounded, Experiment, Ratio, Settings, against
from anew.checkpoint.folder import checkpoint_folder
from anew.config.config import Config
from anew.config.schema import GROUP_OF
from anew.config.values import parse_bytes
from anew.errors import UserError, unknown_name
from anew.report import png
from anew.report.run import Run
from anew.utils.files import parse_json, write_atomic

ARM_TITLES = {"reference": "reference recipe", "adamw": "AdamW, tuned", "fast": "fast recipe"}
OVER_EXAMPLE = "--over 'lr=1e-3,2e-3 weight_decay=0,0.1'"


def check_comparable(config: Config, arguments: Any) -> None:
    """Refuse settings with which the runs could not be compared."""
    if config.data.val_tokens < 2 or config.data.one_batch:
        raise UserError(
            "runs are compared by their held-out loss; "
            "leave out --one-batch, and give --val-tokens."
        )
    if parse_bytes(config.data.disk_budget):
        raise UserError(
            "with a disk budget the first run would remove the tokens of the next; "
            "leave out --disk-budget."
        )
    if arguments.minutes < 0:
        raise UserError(f"--minutes {arguments.minutes:g} cannot be negative.")
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} must be at least 1.")


def recipe(
    config: Config, device: str, arguments: Any, given: Collection[str] = ()
) -> dict[str, Any]:
    """Compare the fast recipe with the reference and with tuned AdamW by their time to a loss."""
    check_comparable(config, arguments)
    _check_arms(config, arguments, given)
    out = Path(config.run.out or f"runs/bench-{config.recipe}")
    seeds = tuple(range(1, arguments.seeds + 1))
    experiment = Experiment(config, seeds, time_to_loss.tuning(config))
    print(
        f"{config.recipe} on {config.data.data}, horizon {config.total_tokens:,} tokens, "
        f"{arguments.seeds} seeds, on {device}; runs in {out}\n",
        flush=True,
    )

    def loss_of(result: TrialResult) -> float:
        return _exported_loss(result, config, device)

    def say(line: str) -> None:
        print(line, flush=True)

    with quiet_runs(), stop_after(arguments.minutes) as stop:
        best, arms = experiment.run(out, stop, loss_of, say, arguments.jobs)
    facts = _print_verdict(best, arms)
    # JSON has no infinity, which is the loss of a run that diverged.
    facts = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    (out / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        ends = [(ARM_TITLES[arm.name], arm.tokens, arm.losses) for arm in arms]
        title = f"{config.recipe} on {Path(config.data.data).name}"
        png.time_to_loss(ends, title, config.data.unit, Path(arguments.picture))
    return facts


def _check_arms(config: Config, arguments: Any, given: Collection[str]) -> None:
    """Refuse settings with which the arms of the recipe experiment could not be made."""
    owned = sorted(set(given) & set(time_to_loss.OWNED))
    if owned:
        flag = owned[0].replace("_", "-")
        raise UserError(f"--{flag} is a setting in which the arms differ; leave it out.")
    if config.optim.optimizer != "adamw":
        raise UserError(
            f"the arms are made from a recipe with AdamW, as gpt2-5m and gpt2-124m are; "
            f"{config.recipe} has another optimizer."
        )
    if not is_installed("transformers"):
        raise UserError("losses are computed by transformers; install transformers.")
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1.")


def _exported_loss(result: TrialResult, config: Config, device: str) -> float:
    """Return the loss that transformers computes, kept in a file for each number of windows."""
    from filelock import FileLock

    if math.isinf(result.loss):
        return result.loss
    val_tokens = config.data.val_tokens
    stored = result.folder / f"exported_loss_{val_tokens}.json"
    with FileLock(result.folder / ".exported.lock"):  # several processes may run the experiment
        if not stored.is_file():
            folder = checkpoint_folder(result.folder, result.config.run.steps)
            loss = exported_loss(folder, result.config.override(val_tokens=val_tokens), device)
            write_atomic(stored, json.dumps(loss))
    return float(parse_json(stored))


@contextmanager
def quiet_runs() -> Iterator[None]:
    """Show only warnings of the runs on the console; all messages are in each run's log.txt."""
    console = list(logging.getLogger("anew").handlers)
    for handler in console:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler in console:
            handler.setLevel(logging.NOTSET)


def _print_verdict(best: dict[str, Settings], arms: list[Arm]) -> dict[str, Any]:
    """Print the arms and how the fast recipe compares with each other one; return the figures."""
    print("\nlosses are computed by transformers in fp32: mean (lowest to highest seed);")
    print("seconds compare only if all runs were on one machine, equally many at a time\n")
    print("arm                     tokens   seconds  loss")
    for arm in arms:
        mean_loss = statistics.fmean(arm.losses)
        mean_seconds = statistics.fmean(arm.seconds)
        print(
            f"{ARM_TITLES[arm.name]:<18} {arm.tokens:>11,} {mean_seconds:>9,.0f}  "
            f"{mean_loss:.4f} ({min(arm.losses):.4f} to {max(arm.losses):.4f})"
        )
    for name, settings in best.items():
        values = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        print(f"best settings of {ARM_TITLES[name]}: {values}")
    fast_arms = [arm for arm in arms if arm.name == "fast"]
    comparisons: dict[str, Any] = {}
    for arm in arms:
        if arm.name == "fast":
            continue
        ratios = {
            "tokens": against(arm, fast_arms),
            "time": against(arm, fast_arms, seconds=True),
            "speed": _speed_ratio(arm, fast_arms),
        }
        print(f"\nthe fast recipe compared with {ARM_TITLES[arm.name]}, to the same loss:")
        print(f"  {ratios['tokens']} times fewer tokens")
        print(f"  {ratios['time']} times less time")
        print(f"  {ratios['speed']} times the tokens a second")
        comparisons[arm.name] = {name: vars(ratio) for name, ratio in ratios.items()}
    return {"tuned": best, "arms": [vars(arm) for arm in arms], "against": comparisons}


def _speed_ratio(arm: Arm, fast_arms: list[Arm]) -> Ratio:
    """Return how many times as many tokens a second the fast recipe processes."""
    ratios = []
    for seed, seconds in enumerate(arm.seconds):
        fast_speed = statistics.mean(fast.tokens / fast.seconds[seed] for fast in fast_arms)
        ratios.append(Bounded(fast_speed * seconds / arm.tokens))
    return Ratio.of(ratios)


def sweep(
    config: Config,
    device: str,  # noqa: ARG001 (`recipe` has the same parameters)
    arguments: Any,
    given: Collection[str] = (),  # noqa: ARG001
) -> dict[str, Any]:
    """Print the validation loss over a grid of one setting or two; every run keeps its curve."""
    check_comparable(config, arguments)
    axes = parse_axes(arguments.over, config)
    out = Path(config.run.out or f"runs/sweep-{config.recipe}")
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    trials = []
    for point in grid:
        name = ",".join(f"{key}={value}" for key, value in point.items())
        trials.append(Trial(name, config_at(config, point)))
        check_comparable(trials[-1].config, arguments)
    print(f"{config.recipe}, {len(trials)} runs in {out}\n", flush=True)

    def report(trial: Trial, result: TrialResult) -> None:
        print(
            f"{trial.name:<40} {result.tokens:>11,} tokens {result.seconds:>6.0f} s  "
            f"loss {result.loss:.4f}",
            flush=True,
        )

    with quiet_runs(), stop_after(arguments.minutes) as stop:
        results = run_trials(trials, out, stop, report, arguments.jobs)
    losses = [results[trial.name].loss for trial in trials]
    _print_grid(axes, losses)
    by_loss = sorted(results.values(), key=lambda result: result.loss)
    best = [result.folder for result in by_loss[:4]]
    if arguments.picture:
        png.progress([Run.read(folder) for folder in best], Path(arguments.picture))
    print("\nto compare the curves of the best runs:\n  anew report " + shlex.join(map(str, best)))
    return {"runs": [{**point, "loss": loss} for point, loss in zip(grid, losses, strict=True)]}


def _print_grid(axes: dict[str, list[Any]], losses: list[float]) -> None:
    """Print a table of losses and mark the best one; over seeds, mark the best mean instead."""
    row_name, *column_names = axes
    columns = axes[column_names[0]] if column_names else [""]
    width = len(columns)
    rows = [losses[start : start + width] for start in range(0, len(losses), width)]
    best = min(losses)
    if column_names == ["seed"]:
        columns = [*columns, "mean"]
        rows = [[*row, statistics.mean(row)] for row in rows]
        best = min(row[-1] for row in rows)
    across = f", {column_names[0]} across" if column_names else ""
    print(f"\nvalidation loss; {row_name} down{across}")
    print(" " * 12 + "".join(f"{column!s:>10}" for column in columns))
    for value, row in zip(axes[row_name], rows, strict=True):
        cells = [f"{loss:>9.4f}{'*' if loss == best else ' '}" for loss in row]
        print(f"{value!s:>12}" + "".join(cells))


def config_at(config: Config, point: Settings) -> Config:
    """Return `config` with these settings; `min_lr` keeps its ratio to the peak rate."""
    settings = dict(point)
    if "lr" in point and "min_lr" not in point:
        settings["min_lr"] = config.optim.min_lr / config.optim.lr * point["lr"]
    return config.override(**settings).check()


def parse_axes(text: str, config: Config) -> dict[str, list[Any]]:
    """Parse 'lr=1e-3,2e-3 weight_decay=0,0.1' into {setting: values}."""
    axes: dict[str, list[Any]] = {}
    for part in text.split():
        name, _, values = part.partition("=")
        name = name.replace("-", "_")
        if name not in GROUP_OF:
            raise unknown_name("setting", name, GROUP_OF, f"write it as {OVER_EXAMPLE}.")
        if not values:
            raise UserError(
                f"--over {part} is not a setting with values; write it as {OVER_EXAMPLE}."
            )
        try:
            axes[name] = [_parse_like(config.value(name), value) for value in values.split(",")]
        except (ValueError, KeyError):
            kind = type(config.value(name)).__name__
            raise UserError(f"--over {part}: {name} takes values of type {kind}.") from None
    if not 1 <= len(axes) <= 2:
        raise UserError(f"a sweep is over one setting or two: {OVER_EXAMPLE}.")
    return axes


def _parse_like(current: Any, text: str) -> Any:
    """Return `text` as a value of the same type as `current`."""
    if isinstance(current, bool):
        return {"true": True, "false": False}[text.lower()]
    return type(current)(text)
