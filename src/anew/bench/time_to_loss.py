"""Time to a loss: how many fewer tokens the fast recipe needs than AdamW (`anew bench recipe`).

    experiment = Experiment(config, seeds=(1, 2, 3), tuning=tuning(config))
    best, arms = experiment.run(Path("runs/recipe"), stop, loss_of, print)
    print(against(arms[1], [arm for arm in arms if arm.name == "fast"]))

Three arms train one shape on the same tokens, in the same order for each seed:

| arm | settings |
|---|---|
| reference | the reference recipe, fitted to the horizon |
| adamw | AdamW with the best of N settings |
| fast | the fast recipe with the best of at most N settings |

The protocol is fixed before the first run and favours no arm. Every arm anneals to its own end, so
no point in the middle of a schedule is compared with a finished run. The fast recipe runs with
several shorter horizons; the tokens at which it reaches the loss of another arm are interpolated
between them, never extrapolated. Tuning uses a seed that no arm uses. Losses are computed by
transformers in fp32 from the exported checkpoints.

The protocol cannot account for earlier experiments: the settings in FAST were found on other runs
of this size (docs/log.md, 12).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anew.bench.sweep import Trial, TrialResult, run_trials
from anew.config.config import Config
from anew.config.recipes import FAST
from anew.errors import Preempted
from anew.utils.signals import StopFlag

# Horizons of the fast recipe, as shares of the others': 4, 2.8 and 2 times fewer tokens.
SHARES = (0.25, 0.357, 0.5)
# Horizons of the tuning runs: AdamW's own, and the longest of the fast recipe.
TUNED_AT = {"adamw": 1.0, "fast": 0.5}
WARMUP = 715 / 19_073  # share of the steps, as in the reference recipe; `warmup_share` replaces it
TUNING_SEED = 0

Settings = dict[str, Any]
LossOf = Callable[[TrialResult], float]

# The arms differ in these settings, so a user may not set them.
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
    """Return the reference recipe: AdamW, cosine decay to a tenth of the rate."""
    return config.override(optimizer="adamw", schedule="cosine", min_lr=config.optim.lr / 10)


def adamw(config: Config) -> Config:
    """Return AdamW with a linear decay to zero. Tuning may set the embedding's rate and warm-up."""
    return config.override(optimizer="adamw", schedule="linear", min_lr=0.0)


def fast(config: Config) -> Config:
    """Return the fast recipe."""
    return config.override(**FAST)


ARMS: dict[str, Callable[[Config], Config]] = {"reference": reference, "adamw": adamw, "fast": fast}

# Models with a width below 512 train on CPUs and have higher learning rates.
SMALL_TUNING: dict[str, tuple[Settings, ...]] = {
    "adamw": (
        {"lr": 5e-4, "wte_lr": 0.006},
        {"lr": 1e-3},
        {"lr": 1e-3, "wte_lr": 0.006, "warmup_share": 0.1},
        {"lr": 2e-3, "wte_lr": 0.006, "warmup_share": 0.1},
        {"lr": 4e-3, "wte_lr": 0.006, "warmup_share": 0.1},
        {"lr": 8e-3, "wte_lr": 0.006, "warmup_share": 0.1},
    ),
    "fast": (
        {"lr": 0.006, "muon_lr": 0.0025, "wte_lr": 0.006},
        {"lr": 0.006, "muon_lr": 0.005, "wte_lr": 0.006},
        {"lr": 0.006, "muon_lr": 0.01, "wte_lr": 0.006},
        {"lr": 0.006, "muon_lr": 0.01, "wte_lr": 0.012},
        {"lr": 0.006, "muon_lr": 0.02, "wte_lr": 0.006},
    ),
}
LARGE_TUNING: dict[str, tuple[Settings, ...]] = {
    "adamw": (
        {"lr": 1.8e-3},
        {"lr": 1.2e-3, "wte_lr": 3.6e-3, "warmup_share": 0.1},
    ),
    "fast": (
        {"lr": 3.6e-3, "muon_lr": 1.8e-3},
        {"lr": 3.6e-3, "muon_lr": 3.6e-3},
    ),
}


def tuning(config: Config) -> dict[str, tuple[Settings, ...]]:
    """Return the settings to try for each tuned arm; AdamW has at least as many as the fast one."""
    return SMALL_TUNING if config.model.n_embd < 512 else LARGE_TUNING


def fitted(
    config: Config, share: float, seed: int, warmup_share: float = WARMUP, **settings: Any
) -> Config:
    """Return `config` with `settings`, fitted to a share of its steps.

    The warm-up is a share of these steps too. The run is validated and saved at its end only.
    """
    steps = max(2, round(share * config.run.steps))
    fitted_config = config.override(
        steps=steps,
        warmup_steps=round(warmup_share * steps),
        seed=seed,
        evaluate_every=0,
        save_every=steps,
        keep=1,
        **settings,
    )
    return fitted_config.check()


@dataclass(frozen=True)
class Arm:
    """One arm's runs at one horizon, with a value for each seed."""

    name: str
    tokens: int
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


class Bounded(NamedTuple):
    """A value. `bound` is "at most " or "at least " if the true value is not known exactly."""

    value: float
    bound: str = ""


@dataclass(frozen=True)
class Ratio:
    """A ratio to one arm: mean, smallest and largest over the seeds.

    `bound` is "at most ", "at least " or "about " where the horizons did not reach far enough.
    """

    mean: float
    low: float
    high: float
    bound: str = ""

    @classmethod
    def of(cls, ratios: Sequence[Bounded]) -> "Ratio":
        """Summarize the ratios of all seeds."""
        values = [ratio.value for ratio in ratios]
        bounds = {ratio.bound for ratio in ratios if ratio.bound}
        bound = "about " if len(bounds) > 1 else "".join(bounds)
        return cls(statistics.mean(values), min(values), max(values), bound)

    def __str__(self) -> str:
        return f"{self.bound}{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def crossing(points: Sequence[tuple[float, float]], loss: float) -> Bounded:
    """Return the amount at which a falling curve through points (amount, loss) reaches `loss`.

    The amount is interpolated in log(amount). For a loss outside of the curve it is the nearest
    end, as a bound of the true amount. Points of runs that diverged are left out.
    """
    ordered = sorted(point for point in points if math.isfinite(sum(point)))
    if not ordered:
        return Bounded(max(amount for amount, _ in points), "at least ")
    first, highest_loss = ordered[0]
    last, lowest_loss = ordered[-1]
    if loss >= highest_loss:
        return Bounded(first, "at most ")
    if loss < lowest_loss:
        return Bounded(last, "at least ")
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if y1 <= loss <= y0:
            position = (y0 - loss) / (y0 - y1 or 1)
            log_amount = math.log(x0) + (math.log(x1) - math.log(x0)) * position
            return Bounded(math.exp(log_amount))
    raise AssertionError("a loss between the ends of a curve lies between two of its points")


OPPOSITE = {"at most ": "at least ", "at least ": "at most ", "": ""}


def against(arm: Arm, fast_arms: Sequence[Arm], seconds: bool = False) -> Ratio:
    """Return how many times as many tokens (or seconds) as the fast recipe the arm took.

    For each seed, the fast recipe's amount is read off where it reaches the arm's loss.
    """

    def amount_of(any_arm: Arm, seed: int) -> float:
        return any_arm.seconds[seed] if seconds else any_arm.tokens

    ratios = []
    for seed, loss in enumerate(arm.losses):
        points = [(amount_of(other, seed), other.losses[seed]) for other in fast_arms]
        amount, bound = crossing(points, loss)
        ratios.append(Bounded(amount_of(arm, seed) / amount, OPPOSITE[bound]))
    return Ratio.of(ratios)


@dataclass(frozen=True)
class PlannedArm:
    """The trials of one arm at one horizon, one for each seed."""

    name: str
    share: float  # of the horizon
    trials: list[Trial]


@dataclass(frozen=True)
class Experiment:
    """All runs of the experiment, known before the first one."""

    config: Config
    seeds: tuple[int, ...]
    tuning: dict[str, tuple[Settings, ...]]

    def tuning_trials(self, arm: str) -> list[Trial]:
        """Return one trial for each setting to try for an arm."""
        arm_config = ARMS[arm](self.config)
        trials = []
        for settings in self.tuning[arm]:
            values = "-".join(f"{name}={value:g}" for name, value in settings.items())
            config = fitted(arm_config, TUNED_AT[arm], TUNING_SEED, **settings)
            trials.append(Trial(f"tuning-{arm}-{values}", config))
        return trials

    def arms(self, best: dict[str, Settings]) -> Iterator[PlannedArm]:
        """Yield every arm at each of its horizons, with the best settings of the tuned arms."""
        for name, make_arm in ARMS.items():
            arm_config = make_arm(self.config)
            settings = best.get(name, {})
            for share in SHARES if name == "fast" else (1.0,):
                trials = []
                for seed in self.seeds:
                    config = fitted(arm_config, share, seed, **settings)
                    trials.append(Trial(f"{name}-{share:g}-seed-{seed}", config))
                yield PlannedArm(name, share, trials)

    def run(
        self,
        out: Path,
        stop: StopFlag,
        loss_of: LossOf,
        say: Callable[[str], None],
        jobs: int = 1,
    ) -> tuple[dict[str, Settings], list[Arm]]:
        """Run what is not complete, `jobs` runs at a time; return the best settings of the tuned
        arms, and all arms.

        `loss_of` computes the loss of a complete trial, and `say` receives a line for each.
        """
        numbers = itertools.count(1)

        def report(trial: Trial, result: TrialResult) -> None:
            say(
                f"{next(numbers):>3}  {trial.name:<44} {result.tokens:>11,} tokens "
                f"{result.seconds:>6.0f} s  loss {result.loss:.4f}"
            )

        tuning_trials = {arm: self.tuning_trials(arm) for arm in self.tuning}
        all_tuning_trials = list(itertools.chain(*tuning_trials.values()))
        results = run_trials(all_tuning_trials, out, stop, report, jobs)
        best: dict[str, Settings] = {}
        for arm, trials in tuning_trials.items():
            losses = [results[trial.name].loss for trial in trials]
            best[arm] = self.tuning[arm][losses.index(min(losses))]

        planned = list(self.arms(best))
        # The arms take turns, so that an hour in which the machine is slow affects all of them.
        turns = zip(*(arm.trials for arm in planned), strict=True)
        results = run_trials(list(itertools.chain(*turns)), out, stop, report, jobs)
        return best, [_scored(arm, results, stop, loss_of) for arm in planned]


def _scored(
    planned: PlannedArm, results: dict[str, TrialResult], stop: StopFlag, loss_of: LossOf
) -> Arm:
    """Return an arm with the loss of each of its trials. Raises Preempted if `stop` is set."""
    seconds = []
    losses = []
    for trial in planned.trials:
        if stop.is_set():
            raise Preempted(f"stopped before {trial.name} was scored; the same command continues.")
        seconds.append(results[trial.name].seconds)
        losses.append(loss_of(results[trial.name]))
    tokens = planned.trials[0].config.total_tokens
    return Arm(planned.name, tokens, tuple(seconds), tuple(losses))
