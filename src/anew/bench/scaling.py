"""Scaling: the loss of models of several sizes over their compute (`anew bench scaling`).

    ladder = Ladder(parse_sizes("2x64,3x96,4x128"), tokens_per_parameter=10.0, seeds=(1, 2))
    experiment = Experiment(ladder, {"muon": config})
    [result] = experiment.run(Path("runs/scaling"), stop, print)

A size is written LAYERSxWIDTH. All models are GPT-2s with heads of 32, or of 64 as in OpenAI's from
a width of 512 on. Every run trains with the same number of tokens for each of its parameters and
anneals to its own end. Its compute is tokens x `flops_per_token`, which does not depend on the
speed of the machine, and which leaves out the work of the optimizer.

All learning rates are divided by the square root of the width, as in the fast recipes of the larger
sizes. Where the user has chosen no rate, the best of several settings is found at the smallest size
with a seed that no other run uses, for each arm by itself.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anew.bench.sweep import Report, Trial, TrialResult, run_trials
from anew.bench.time_to_loss import SMALL_TUNING, TUNING_SEED, WARMUP, Settings, fitted
from anew.config.config import Config
from anew.errors import UserError
from anew.model.flops import count_parameters, flops_per_token
from anew.utils.signals import StopFlag

DEFAULT_SIZES = "2x64,3x64,2x96,3x96,3x128,4x128"
DEFAULT_TOKENS_PER_PARAMETER = 10.0
SIZES_EXAMPLE = f"--sizes {DEFAULT_SIZES}"
LEARNING_RATES = ("lr", "min_lr", "muon_lr", "wte_lr")
TUNED_WIDTH = 256  # the width for which the rates of SMALL_TUNING are written
TUNING = {"adamw": SMALL_TUNING["adamw"], "muon": SMALL_TUNING["fast"]}  # by optimizer

# The ladder determines these settings itself.
OWNED = ("n_layer", "n_head", "n_embd", "steps", "warmup_steps", "seed", "init")
# Losses of runs that differ in these settings cannot be compared.
NOT_COMPARED = ("data", "tokenizer", "seq_len", "val_tokens")


@dataclass(frozen=True)
class Size:
    """The shape of a model."""

    n_layer: int
    n_embd: int

    def __str__(self) -> str:
        return f"{self.n_layer}x{self.n_embd}"

    @property
    def head_width(self) -> int:
        """The width of an attention head."""
        return 64 if self.n_embd >= 512 else 32

    @property
    def n_head(self) -> int:
        """The number of attention heads."""
        return self.n_embd // self.head_width


def parse_sizes(text: str) -> list[Size]:
    """Return the sizes that a text such as '2x64,3x96' lists, the smallest first.

    Raises UserError unless there are three or more.
    """
    sizes = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)", word.strip())
        if match is None:
            raise UserError(f"'{word}' is no size; write layers x width, as in {SIZES_EXAMPLE}.")
        size = Size(int(match[1]), int(match[2]))
        if min(size.n_layer, size.n_embd) < 1 or size.n_embd % size.head_width:
            raise UserError(
                f"size {word}: the width must be a multiple of {size.head_width}, "
                "the width of a head."
            )
        sizes.add(size)
    if len(sizes) < 3:
        raise UserError(f"a line needs three sizes or more, as in {SIZES_EXAMPLE}.")
    return sorted(sizes, key=lambda size: size.n_layer * size.n_embd**2)


@dataclass(frozen=True)
class Ladder:
    """The sizes to train, and the length of their runs."""

    sizes: list[Size]
    tokens_per_parameter: float
    seeds: tuple[int, ...]

    def config_at(self, config: Config, size: Size, seed: int, tuned: Settings) -> Config:
        """Return the run of one size. The rates of `config` are those of its own width.

        `tuned` replaces settings of `config`, unless it is empty. Its rates are those of
        TUNED_WIDTH; `min_lr` keeps its ratio to the peak rate.
        """
        settings = dict(tuned)
        warmup_share = settings.pop("warmup_share", WARMUP)
        if tuned:
            min_lr = config.optim.min_lr / config.optim.lr * tuned["lr"]
            config = config.override(n_embd=TUNED_WIDTH, min_lr=min_lr, **settings)
        factor = math.sqrt(config.model.n_embd / size.n_embd)
        rates = {name: factor * config.value(name) for name in LEARNING_RATES}
        shape = {"n_layer": size.n_layer, "n_head": size.n_head, "n_embd": size.n_embd}
        config = config.override(**shape, **rates, sample_every=0)
        tokens = self.tokens_per_parameter * count_parameters(config.model)
        config = config.override(steps=round(tokens / config.run.batch_tokens))
        return fitted(config, 1.0, seed, warmup_share)


def trial_name(arm: str, size: Size, seed: int) -> str:
    """Return the name of a run of the ladder."""
    return f"{arm}-{size}-seed-{seed}"


@dataclass(frozen=True)
class SizeResult:
    """What the runs of one size of an arm reached."""

    size: Size
    parameters: int
    tokens: int
    flops: float
    losses: tuple[float, ...]  # of the seeds

    @property
    def loss(self) -> float:
        """The mean loss."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class ArmResult:
    """What one arm reached."""

    name: str
    tuned: Settings  # the best settings, or none if the user chose the rates
    sizes: list[SizeResult]


@dataclass(frozen=True)
class Experiment:
    """All runs: every arm at every size with every seed."""

    ladder: Ladder
    arms: dict[str, Config]
    tunes: bool = True

    def tuning_trials(self, arm: str) -> Iterator[tuple[Settings, Trial]]:
        """Yield the settings to try for an arm, each with its run of the smallest size."""
        config = self.arms[arm]
        smallest = self.ladder.sizes[0]
        for settings in TUNING[config.optim.optimizer]:
            values = "-".join(f"{name}={value:g}" for name, value in settings.items())
            trial_config = self.ladder.config_at(config, smallest, TUNING_SEED, settings)
            yield settings, Trial(f"tuning-{arm}-{smallest}-{values}", trial_config)

    def trials(self, arm: str, tuned: Settings) -> list[Trial]:
        """Return the runs of an arm, the longest first, so that no process waits long at the end
        if several runs take place at a time.
        """
        trials = []
        for size, seed in itertools.product(reversed(self.ladder.sizes), self.ladder.seeds):
            config = self.ladder.config_at(self.arms[arm], size, seed, tuned)
            trials.append(Trial(trial_name(arm, size, seed), config))
        return trials

    def run(
        self, out: Path, stop: StopFlag, say: Callable[[str], None], jobs: int = 1
    ) -> list[ArmResult]:
        """Run what is not complete, `jobs` runs at a time. `say` receives a line for each run.

        Raises UserError if a run outside of the tuning diverged.
        """
        numbers = itertools.count(1)

        def report(trial: Trial, result: TrialResult) -> None:
            say(f"{next(numbers):>3}  {result.loss:.4f}  {trial.name}")

        best = self._tune(out, stop, report, jobs)
        trials = {arm: self.trials(arm, best[arm]) for arm in self.arms}
        turns = zip(*trials.values(), strict=True)
        results = run_trials(list(itertools.chain(*turns)), out, stop, report, jobs)
        for name, result in results.items():
            if math.isinf(result.loss):
                raise UserError(f"{out / name} diverged; use a lower learning rate.")
        return [ArmResult(arm, best[arm], self._sizes(arm, results)) for arm in self.arms]

    def _tune(self, out: Path, stop: StopFlag, report: Report, jobs: int) -> dict[str, Settings]:
        """Return the best settings of each arm, which are none if nothing is tuned."""
        if not self.tunes:
            return {arm: {} for arm in self.arms}
        tried = {arm: list(self.tuning_trials(arm)) for arm in self.arms}
        trials = [trial for pairs in tried.values() for _, trial in pairs]
        results = run_trials(trials, out, stop, report, jobs)
        best = {}
        for arm, pairs in tried.items():
            best[arm], _ = min(pairs, key=lambda pair: results[pair[1].name].loss)
        return best

    def _sizes(self, arm: str, results: dict[str, TrialResult]) -> list[SizeResult]:
        """Return the results of one arm's runs by size."""
        sizes = []
        for size in self.ladder.sizes:
            runs = [results[trial_name(arm, size, seed)] for seed in self.ladder.seeds]
            config = runs[0].config
            tokens = runs[0].tokens
            sizes.append(
                SizeResult(
                    size=size,
                    parameters=count_parameters(config.model),
                    tokens=tokens,
                    flops=float(tokens * flops_per_token(config.model, config.data.seq_len)),
                    losses=tuple(run.loss for run in runs),
                )
            )
        return sizes
