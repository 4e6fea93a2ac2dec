"""Faults of time: a rank that is ten times slower, and a wall clock that jumps."""

import datetime
import os
import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anew import Config
from anew.checkpoint.folder import list_checkpoints
from anew.training import run_log, trainer
from anew.training.slow_ranks import STEPS_PER_COMPARISON
from anew.training.step import train_step
from anew.training.trainer import train
from tests.faults.common import FaultResult, check_same_run, compiled, tiny, train_run
from tests.faults.torchrun import Job
from tests.support.ranks import run_ranks

PASS_SECONDS = 0.03  # added to each forward pass, so that other load of the machine matters less
SLOWER = 10
# The log's dates, such as 2026-11-30 14:56:03.
DATE_LENGTH = 19


def slow_rank(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Slow a rank down: the log names it. The control is a run whose ranks are equally slow."""
    result = FaultResult()
    reference = tiny(scratch / "reference", steps=STEPS_PER_COMPARISON + 3)
    run_ranks(2, train_slowly, reference, -1)
    is_named = "slowest rank" in _log(reference)
    result.check(not is_named, f"control: a rank is named: {_log(reference)[-1500:]}")
    for i in range(injections):
        rank = rng.randrange(2)
        config = reference.override(out=str(scratch / f"run-{i}"))
        run_ranks(2, train_slowly, config, rank)
        result.check(f"slowest rank: {rank} (" in _log(config), f"rank {rank} is not named")
        ratios = [row.get("speed/slowest_rank_ratio", 0.0) for row in metrics(config)]
        result.measurements["last ratio"] = f"{ratios[-1]:.1f}"
        check_same_run(result, config, reference, "slow rank")
        result.injections += 1
    return result


def train_slowly(config: Config, slow: int) -> None:
    """Train one rank; each forward pass of the rank `slow` takes ten times as long."""
    is_slow = os.environ["RANK"] == str(slow)
    seconds = PASS_SECONDS * (SLOWER if is_slow else 1)

    def slow_train_step(loss_of: Any, *arguments: Any, **named: Any) -> Any:
        def slow_loss(*batch: Any) -> Any:
            time.sleep(seconds)
            return loss_of(*batch)

        return train_step(slow_loss, *arguments, **named)

    with patch.object(trainer, "train_step", slow_train_step):
        train(config)


def jump_clock(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Train two ranks while the wall clock jumps, and compare with a run whose clock does not."""
    result = FaultResult()
    library = compiled("jump_clock.c", scratch)
    if library is None:
        result.skip_reason = "there is no C compiler"
        return result
    reference = tiny(scratch / "reference", steps=60, keep=0, save_minutes=5.0)
    run_ranks(2, train_run, reference)
    for i in range(injections):
        config = reference.override(out=str(scratch / f"run-{i}"))
        start = time.monotonic()
        job = Job(config, LD_PRELOAD=str(library))
        exit_code = job.end()
        seconds = time.monotonic() - start
        output = job.log.read_text()[-1500:]
        result.check(exit_code == 0, f"exit code {exit_code}: {output}")
        check_same_run(result, config, reference, "jumping clock")
        dates = [line[:DATE_LENGTH] for line in _log(config).splitlines() if line[:2] == "20"]
        years = [datetime.datetime.fromisoformat(date).year for date in dates]
        result.check(len(set(years)) > 1, f"the clock did not jump: {dates}")
        durations = [row["speed/ms_per_step"] / 1e3 for row in metrics(config)]
        is_sane = min(durations) > 0 and sum(durations) < seconds
        result.check(is_sane, f"impossible durations of steps: {durations}")
        saved = [path.name for path in list_checkpoints(config.folder)]
        expected = [path.name for path in list_checkpoints(reference.folder)]
        result.check(saved == expected, f"saved at other steps: {saved}")
        result.injections += 1
    return result


def metrics(config: Config) -> list[run_log.Row]:
    """Return the rows of a run's training steps."""
    return [row for row in run_log.read_metrics(config.folder) if "train/loss" in row]


def _log(config: Config) -> str:
    return (config.folder / "log.txt").read_text()
