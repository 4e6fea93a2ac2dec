"""`anew bench scaling`: the loss of a ladder of sizes over compute, and what a change saves.

It can be stopped at any time; the same command continues it.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anew.bench.power_law import Estimate, PowerLaw, multiplier
from anew.bench.scaling import (
    LEARNING_RATES,
    NOT_COMPARED,
    OWNED,
    TUNED_WIDTH,
    ArmResult,
    Experiment,
    Ladder,
    SizeResult,
    parse_sizes,
)
from anew.bench.sweep import stop_after
from anew.cli.experiments import check_comparable, config_at, parse_axes, quiet_runs
from anew.config.config import Config
from anew.errors import UserError
from anew.report import png

OVER_EXAMPLE = "--over 'optimizer=adamw,muon'"
MOST_ARMS = len(png.COLOURS)


def scaling(
    config: Config, device: str, arguments: Any, given: Collection[str] = ()
) -> dict[str, Any]:
    """Fit loss against compute over several sizes; compare the settings of --over by compute."""
    check_comparable(config, arguments)
    ladder = _ladder(arguments)
    arms, varied = _arms(config, arguments, given)
    # A rate that the user has chosen, or compares, is taken as it is.
    tunes = not set(LEARNING_RATES) & {*given, *varied}
    out = Path(config.run.out or f"runs/scaling-{config.recipe}")
    print(
        f"{config.recipe} on {config.data.data}, {ladder.tokens_per_parameter:g} tokens a "
        f"parameter,\nseeds: {len(ladder.seeds)}, on {device}, {arguments.jobs} at a time; "
        f"runs in {out}\n\n  #    loss  run",
        flush=True,
    )

    def say(line: str) -> None:
        print(line, flush=True)

    with quiet_runs(), stop_after(arguments.minutes) as stop:
        results = Experiment(ladder, arms, tunes).run(out, stop, say, arguments.jobs)
    laws = [_fit(arm.sizes) for arm in results]
    facts = {
        "tokens_per_parameter": ladder.tokens_per_parameter,
        "arms": [_print_arm(arm, law) for arm, law in zip(results, laws, strict=True)],
    }
    print("\nbrackets after a measured loss: lowest and highest seed; others: 95% intervals")
    first, *others = zip(results, laws, strict=True)
    facts["multipliers"] = [_print_multiplier(first, other) for other in others]
    (out / "scaling.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        _draw(results, laws, config, Path(arguments.picture))
    return facts


def _ladder(arguments: Any) -> Ladder:
    """Return the ladder that the flags describe."""
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds} must be at least 1.")
    if not 0 < arguments.tokens_per_parameter < math.inf:
        raise UserError(
            f"--tokens-per-parameter {arguments.tokens_per_parameter:g} must be above 0 and finite."
        )
    return Ladder(
        sizes=parse_sizes(arguments.sizes),
        tokens_per_parameter=arguments.tokens_per_parameter,
        seeds=tuple(range(1, arguments.seeds + 1)),
    )


def _arms(
    config: Config, arguments: Any, given: Collection[str]
) -> tuple[dict[str, Config], list[str]]:
    """Return the settings of each arm by its name, and the names of what differs between arms."""
    for name in sorted(set(given) & set(OWNED)):
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} is a setting in which the runs differ; leave it out.")
    if not arguments.over:
        return {config.recipe: config}, []
    axes = parse_axes(arguments.over, config)
    if len(axes) > 1:
        raise UserError(f"the change is one setting with its values: {OVER_EXAMPLE}.")
    [(name, values)] = axes.items()
    if name in OWNED:
        raise UserError(f"{name} differs from run to run anyway; compare another setting.")
    if name in NOT_COMPARED:
        raise UserError(f"losses with another {name} cannot be compared; choose another setting.")
    if not 2 <= len(set(values)) <= MOST_ARMS:
        raise UserError(f"--over {arguments.over} needs two to {MOST_ARMS} different values.")
    arms = {f"{name}={value}": config_at(config, {name: value}) for value in values}
    for arm in arms.values():
        check_comparable(arm, arguments)
    return arms, [name]


def _fit(sizes: list[SizeResult]) -> PowerLaw:
    return PowerLaw.fit([size.flops for size in sizes], [size.losses for size in sizes])


def _print_arm(arm: ArmResult, law: PowerLaw) -> dict[str, Any]:
    """Print the table of an arm, its law and the check of the law; return the figures."""
    print(f"\n{arm.name}")
    if arm.tuned:
        values = ", ".join(f"{key} {value:g}" for key, value in arm.tuned.items())
        print(f"best settings at {arm.sizes[0].size}, with the rates of a width of {TUNED_WIDTH}:")
        print(f"  {values}")
    print("size    parameters        tokens     FLOPs  loss (lowest to highest)  the line")
    for size in arm.sizes:
        seeds = f"({min(size.losses):.4f} to {max(size.losses):.4f})"
        print(
            f"{size.size!s:<6} {size.parameters:>11,} {size.tokens:>13,} {size.flops:>9.2e}  "
            f"{size.loss:.4f} {seeds:<18}  {law.loss_at(size.flops):>8.4f}"
        )
    constant = law.loss_at(1.0)
    print(f"loss = {constant:.3g} x FLOPs^-{law.slope:.4f}; exponent {_text(law.exponent, 4)}")
    return {
        "name": arm.name,
        "tuned": arm.tuned,
        "sizes": [_size_facts(size) for size in arm.sizes],
        "constant": constant,
        "exponent": law.exponent._asdict(),
        "left_out": _print_left_out(arm.sizes),
    }


def _size_facts(size: SizeResult) -> dict[str, Any]:
    """Return the figures of a size for --json."""
    return {
        "size": str(size.size),
        "parameters": size.parameters,
        "tokens": size.tokens,
        "flops": size.flops,
        "losses": size.losses,
        "loss": size.loss,
    }


def _print_left_out(sizes: list[SizeResult]) -> dict[str, Any] | None:
    """Predict the largest size from the others, which must be three or more."""
    *smaller, largest = sorted(sizes, key=lambda size: size.flops)
    if len(smaller) < 3:
        print("(a prediction of the largest size needs three smaller ones)")
        return None
    predicted = _fit(smaller).predict(largest.flops)
    is_within = predicted.low <= largest.loss <= predicted.high
    verdict = "within" if is_within else "OUTSIDE"
    print(
        f"left out: {largest.size}, predicted {_text(predicted, 4)}, "
        f"measured {largest.loss:.4f}: {verdict}"
    )
    return {
        "size": str(largest.size),
        "predicted": predicted._asdict(),
        "measured": largest.loss,
        "within": is_within,
    }


def _print_multiplier(
    first: tuple[ArmResult, PowerLaw], other: tuple[ArmResult, PowerLaw]
) -> dict[str, Any]:
    """Print how much less compute an arm needs than the first one, where both reach a loss."""
    arm, law = first
    other_arm, other_law = other
    print(f"\ncompute multiplier of {other_arm.name}: FLOPs of {arm.name} / its own")
    found: list[dict[str, float]] = []
    highest, lowest = common_losses(arm.sizes, other_arm.sizes)
    if lowest > highest:
        print("  none: the two have no measured loss in common; choose other sizes")
    elif min(law.exponent.low, other_law.exponent.low) <= 0:
        print("  none: a line may be flat within its error; choose more sizes or seeds")
    else:
        for loss in (highest, math.sqrt(highest * lowest), lowest):
            ratio = multiplier(law, other_law, loss)
            print(f"  at loss {loss:.4f}: {_text(ratio, 2)}")
            found.append({"loss": loss, **ratio._asdict()})
    return {"of": other_arm.name, "to": arm.name, "at": found}


def common_losses(first: list[SizeResult], other: list[SizeResult]) -> tuple[float, float]:
    """Return the highest and the lowest loss that both arms have measured."""
    highest = min(max(size.loss for size in arm) for arm in (first, other))
    lowest = max(min(size.loss for size in arm) for arm in (first, other))
    return highest, lowest


def _text(estimate: Estimate, digits: int) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in estimate)
    return f"{value} ({low} to {high})"


def _draw(results: list[ArmResult], laws: list[PowerLaw], config: Config, picture: Path) -> None:
    """Draw the losses of all runs and the lines through them."""
    arms = []
    for arm, law in zip(results, laws, strict=True):
        points = [(size.flops, loss) for size in arm.sizes for loss in size.losses]
        line = [(size.flops, law.loss_at(size.flops)) for size in arm.sizes]
        arms.append((arm.name, points, line))
    title = f"{config.recipe} on {Path(config.data.data).name}"
    png.loss_over_compute(arms, title, config.data.unit, picture)
