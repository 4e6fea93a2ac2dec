"""Many training runs as one experiment, which can be stopped at any time and continued.

    with stop_after(minutes=10) as stop:
        results = run_trials(trials, Path("runs/sweep"), stop, print)    # {name: TrialResult}

Each trial is an ordinary run folder, OUT/NAME, with its curve and its checkpoint; complete trials
are not run again. When the time is over, the current run receives SIGTERM, as from Slurm, saves
and ends, and `run_trials` raises Preempted. The same command continues the experiment.

`jobs` processes take the trials, each with a GPU or a share of the cores. The same experiment may
also run in several terminals, or on several machines that share a disk: a lock file for each trial
keeps two processes from running the same one.
"""

import contextlib
import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anew.bench.jobs import other_processes
from anew.checkpoint.folder import checkpoint_folder
from anew.config.config import Config
from anew.errors import Diverged, Preempted, UserError
from anew.training import run_log
from anew.training.run_settings import resolve_config
from anew.training.trainer import train
from anew.utils.device import pick_device
from anew.utils.signals import StopFlag, signal_this_process, stop_on_signals

DIVERGED = "diverged.txt"  # marks the folder of a run that diverged, with the error message


@dataclass(frozen=True)
class Trial:
    """One run of an experiment."""

    name: str
    config: Config


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended. Seconds and loss are infinite for a run that diverged."""

    folder: Path
    config: Config
    tokens: int
    seconds: float  # that its tokens take at the median speed of its steps
    loss: float  # on the validation split, in nats a token


Report = Callable[[Trial, TrialResult], None]


def result_of(trial: Trial, out: Path) -> TrialResult | None:
    """Return the recorded result of a complete trial; None for an incomplete one.

    Raises UserError if the trial's folder holds a run with other settings.
    """
    folder = out / trial.name
    if not (folder / "config.json").is_file():
        return None
    config = resolve_config(trial.config.override(out=str(folder)))
    rows = run_log.read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    if (folder / DIVERGED).is_file():
        return TrialResult(folder, config, int(rows[-1]["tokens"]), math.inf, math.inf)
    if not rows or not checkpoint_folder(folder, config.run.steps).is_dir():
        return None
    last = rows[-1]
    if last["step"] != config.run.steps or last.get("val/precision") != "fp32":
        return None
    speeds = [row["speed/tokens_per_second"] for row in rows if "speed/tokens_per_second" in row]
    tokens = int(last["tokens"])
    loss = math.inf if last["val/loss"] is None else float(last["val/loss"])
    return TrialResult(folder, config, tokens, tokens / statistics.median(speeds), loss)


def run_trials(
    trials: Sequence[Trial], out: Path, stop: StopFlag, report: Report, jobs: int = 1
) -> dict[str, TrialResult]:
    """Run all trials that are not complete, `jobs` at a time; return the results of all by name.

    `report` is called with each result that is known, also with those of earlier calls and of other
    processes. Raises Preempted if `stop` is set before the last trial is complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return _take_trials(trials, out, stop, report)
    device = pick_device(trials[0].config.run.device).type
    others = min(jobs, len(trials)) - 1
    # The share depends on `jobs` alone, because the number of threads changes how sums are rounded.
    n_threads = max(1, torch.get_num_threads() // jobs)
    with other_processes(others, device, n_threads, take_trials, (trials, out)):
        return _take_trials(trials, out, stop, report)


def take_trials(trials: Sequence[Trial], out: Path) -> None:
    """Run the trials that no other process has taken, and wait until all are complete."""
    with stop_on_signals() as stop:
        _take_trials(trials, out, stop, lambda *_: None)


def _take_trials(
    trials: Sequence[Trial], out: Path, stop: StopFlag, report: Report
) -> dict[str, TrialResult]:
    """Run the trials that no other process has taken; return the results of all trials."""
    from filelock import FileLock, Timeout

    results: dict[str, TrialResult] = {}
    while remaining := [trial for trial in trials if trial.name not in results]:
        for trial in remaining:
            with contextlib.suppress(Timeout), FileLock(out / f".{trial.name}.lock", timeout=0):
                found = result_of(trial, out)
                results[trial.name] = found or _run(trial, out, stop)
                report(trial, results[trial.name])
                if found is None:
                    break  # trials of other processes may be complete now: look at all again
        else:
            is_complete = len(results) == len(trials)
            if not is_complete and stop.wait(1.0):  # other processes hold the locks of the rest
                raise Preempted(
                    "stopped while other processes run the last trials; the same command continues."
                )
    return {trial.name: results[trial.name] for trial in trials}


def _run(trial: Trial, out: Path, stop: StopFlag) -> TrialResult:
    """Run one trial and return its result."""
    if stop.is_set():
        raise Preempted(f"stopped before {trial.name}; the same command continues.")
    torch.compiler.reset()  # torch stops compiling a function after too many different models
    folder = out / trial.name
    try:
        train(trial.config.override(out=str(folder)))
    except Diverged as error:  # divergence is a result; the other trials go on
        (folder / DIVERGED).write_text(f"{error}\n", encoding="utf-8")
    found = result_of(trial, out)
    if found is None:
        raise UserError(
            f"{folder} ended without a validation loss, which the comparison needs; "
            "use data that has a validation split."
        )
    return found


@contextlib.contextmanager
def stop_after(minutes: float) -> Iterator[StopFlag]:
    """Give a StopFlag that is set by the signals that end a process, and after some minutes (0:
    never).

    When the time is over, this process sends SIGTERM to itself, which the current run receives.
    """
    with stop_on_signals() as stop:
        finished = threading.Event()

        def send_signals() -> None:
            if finished.wait(60 * minutes):
                return
            stop.set()
            # A run that is just starting may miss the first signal, so signals are repeated.
            while not finished.is_set():
                signal_this_process(signal.SIGTERM)
                finished.wait(1.0)

        timer = threading.Thread(target=send_signals, daemon=True, name="minutes")
        if minutes:
            timer.start()
        try:
            yield stop
        finally:
            finished.set()
            if minutes:
                timer.join()  # no signal may be sent after the original handlers are restored
