"""How many fewer tokens does the fast recipe need? `anew bench recipe`: time to a loss, so measured that nobody is favoured.

    plan = Plan(config, seeds=(1, 2, 3), tuning=tuning(config))         # every run there will be, fixed before the first
    best, arms = plan.run(Path("runs/recipe"), stop, loss_of, print)

Three arms train one shape on the same tokens, in the same order for a seed: the reference recipe fitted to the horizon, AdamW with the
best of N settings, the fast recipe with the best of no more than that. Every arm anneals to its own end, so no point in the middle of a
schedule is set against a finished run. The fast recipe has shorter horizons; the tokens at which it reaches another arm's loss are read off
between them and never beyond. Tuning has a seed of its own. Losses are those of the exported folders in transformers, in fp32.

What this cannot show is what was tried before: the settings in FAST were found on other runs of this size (docs/log.md, 12).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.bench.sweep import Ended, Trial, run_all
from anew.config.recipes import FAST
from anew.config.schema import Config
from anew.errors import Preempted
from anew.utils.signals import StopFlag

SHARES = (
    0.25,
    0.357,
    0.5,
)  # horizons of the fast recipe: 4, 2.8 and 2 times fewer tokens than the others'
TUNED_AT = {
    "adamw": 1.0,
    "fast": 0.5,
}  # share of the horizon: AdamW's own, a middle one of the fast recipe's
WARMUP = 715 / 19_073  # of the steps, as in the reference recipe, where no `warmup_share` is tried
TUNING_SEED = 0
Settings = tuple[dict[str, Any], ...]
LossOf = Callable[[Ended], float]


# The arms differ in these, so nobody else may set them.
OWNED = (
    "seed",
    "warmup_steps",
    "optimizer",
    "schedule",
    "min_lr",
    "decay_share",
    "wte_lr",
    "muon_lr",
    "muon_warmup",
)


def reference(config: Config) -> Config:
    """The reference recipe: AdamW, cosine to a tenth of the rate."""
    return config.override(optimizer="adamw", schedule="cosine", min_lr=config.optim.lr / 10)


def adamw(config: Config) -> Config:
    """AdamW with a linear decay to zero; the embedding's rate may be its own, and the warm-up longer."""
    return config.override(optimizer="adamw", schedule="linear", min_lr=0.0)


def fast(config: Config) -> Config:
    """The fast recipe."""
    return config.override(**FAST)


def tuning(config: Config) -> dict[str, Settings]:
    """What is tried for each arm that is tuned; for AdamW never less than for the fast recipe."""
    if config.model.n_embd < 512:  # of a size for CPUs, where rates are higher
        return {
            "adamw": (
                {"lr": 5e-4, "wte_lr": 0.006},
                {"lr": 1e-3},
                *(
                    {"lr": lr, "wte_lr": 0.006, "warmup_share": 0.1}
                    for lr in (1e-3, 2e-3, 4e-3, 8e-3)
                ),
            ),
            "fast": tuple(
                {"lr": 0.006, "muon_lr": muon, "wte_lr": wte}
                for muon, wte in (
                    (0.0025, 0.006),
                    (0.005, 0.006),
                    (0.01, 0.006),
                    (0.01, 0.012),
                    (0.02, 0.006),
                )
            ),
        }
    return {
        "adamw": ({"lr": 1.8e-3}, {"lr": 1.2e-3, "wte_lr": 3.6e-3, "warmup_share": 0.1}),
        "fast": ({"lr": 3.6e-3, "muon_lr": 1.8e-3}, {"lr": 3.6e-3, "muon_lr": 3.6e-3}),
    }


ARMS: dict[str, Callable[[Config], Config]] = {"reference": reference, "adamw": adamw, "fast": fast}


def fitted(
    config: Config, share: float, seed: int, warmup_share: float = WARMUP, **settings: Any
) -> Config:
    """`config` with `settings` over this share of its steps: warm-up a share of them too, validated and saved at the end."""
    steps = max(2, round(share * config.run.steps))
    every: dict[str, Any] = {"evaluate_every": 0, "save_every": steps, "keep": 1}
    return config.override(
        steps=steps, warmup_steps=round(warmup_share * steps), seed=seed, **every, **settings
    ).check()


@dataclass(frozen=True)
class Arm:
    """One arm's runs at one horizon, a loss for each seed."""

    name: str
    tokens: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """Against one arm: mean, smallest and largest over the seeds. `bound` is "" or says where the horizons did not reach."""

    mean: float
    low: float
    high: float
    bound: str = ""

    @classmethod
    def of(cls, values: Sequence[tuple[float, str]]) -> "Ratio":
        numbers = [value for value, _ in values]
        bounds = {bound for _, bound in values if bound}
        return cls(
            statistics.mean(numbers),
            min(numbers),
            max(numbers),
            "about " if len(bounds) > 1 else "".join(bounds),
        )

    def __str__(self) -> str:
        return f"{self.bound}{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def crossing(points: Sequence[tuple[float, float]], loss: float) -> tuple[float, str]:
    """The amount at which a falling curve through (amount, loss) reaches `loss`, between its points in log(amount).

    Outside of them the nearest end, and "at most " or "at least " for what is known of the true one.
    """
    ordered = sorted(point for point in points if math.isfinite(sum(point)))
    if not ordered:
        return max(amount for amount, _ in points), "at least "
    (first, highest), (last, lowest) = ordered[0], ordered[-1]
    if loss >= highest:
        return first, "at most "
    if loss < lowest:
        return last, "at least "
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if y1 <= loss <= y0:
            return math.exp(
                math.log(x0) + (math.log(x1) - math.log(x0)) * (y0 - loss) / (y0 - y1 or 1)
            ), ""
    raise AssertionError("a point of a curve lies between its ends")


def against(arm: Arm, fast_arms: Sequence[Arm], seconds: bool = False) -> Ratio:
    """How many times as many tokens (or seconds) the arm took for its loss, seed by seed."""
    opposite = {"at most ": "at least ", "at least ": "at most ", "": ""}
    found = []
    for seed, loss in enumerate(arm.losses):
        amounts = [
            (f.seconds[seed] if seconds else float(f.tokens), f.losses[seed]) for f in fast_arms
        ]
        amount, bound = crossing(amounts, loss)
        found.append(((arm.seconds[seed] if seconds else arm.tokens) / amount, opposite[bound]))
    return Ratio.of(found)


@dataclass(frozen=True)
class Plan:
    """Every run of the experiment, known before the first."""

    config: Config
    seeds: tuple[int, ...]
    tuning: dict[str, Settings]

    def tuning_trials(self, arm: str) -> list[Trial]:
        """One run for each of an arm's settings."""
        made = ARMS[arm](self.config)
        return [
            Trial(f"tuning-{arm}-" + "-".join(f"{k}={v:g}" for k, v in settings.items()),
                  fitted(made, TUNED_AT[arm], TUNING_SEED, **settings))
            for settings in self.tuning[arm]
        ]  # fmt: skip

    def arms(self, best: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, list[Trial]]]:
        """(arm, share of the horizon, a run for each seed)."""
        for name, make in ARMS.items():
            made, tuned = make(self.config), best.get(name, {})
            for share in SHARES if name == "fast" else (1.0,):
                yield (
                    name,
                    share,
                    [
                        Trial(f"{name}-{share:g}-seed-{seed}", fitted(made, share, seed, **tuned))
                        for seed in self.seeds
                    ],
                )

    def run(
        self, out: Path, stop: StopFlag, loss_of: LossOf, say: Callable[[str], None]
    ) -> tuple[dict[str, dict[str, Any]], list[Arm]]:
        """Everything that is not done yet: the best settings of each tuned arm, and every arm at its horizons."""
        done = 0

        def told(trial: Trial, end: Ended) -> None:
            nonlocal done
            done += 1
            say(
                f"{done:>3}  {trial.name:<44} {end.tokens:>11,} tokens {end.seconds:>6.0f} s  loss {end.loss:.4f}"
            )

        tunings = {arm: self.tuning_trials(arm) for arm in self.tuning}
        ends = run_all([t for trials in tunings.values() for t in trials], out, stop, told)
        best: dict[str, dict[str, Any]] = {}
        for arm, trials in tunings.items():
            found = min(range(len(trials)), key=lambda i: ends[trials[i].name].loss)
            best[arm] = self.tuning[arm][found]
        planned = list(self.arms(best))
        in_turns = [
            trials[i] for i in range(len(self.seeds)) for _, _, trials in planned
        ]  # so that a slow hour is nobody's alone
        ends = run_all(in_turns, out, stop, told)
        arms: list[Arm] = []
        for name, _, trials in planned:
            of_seeds = [ends[t.name] for t in trials]
            losses = []
            for end in of_seeds:
                if stop.is_set():
                    raise Preempted(
                        f"stopped before {end.folder.name} was scored; the same command goes on from there."
                    )
                losses.append(loss_of(end))
            arms.append(
                Arm(
                    name,
                    trials[0].config.total_tokens,
                    tuple(e.seconds for e in of_seeds),
                    tuple(losses),
                )
            )
        return best, arms
