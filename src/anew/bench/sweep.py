"""Many training runs as one experiment, which may be stopped anywhere and goes on by the same command.

    with limited(minutes=10) as stop:
        ends = run_all(trials, Path("runs/sweep"), stop, print)     # {name: Ended(tokens, seconds, loss)}

Each trial is an ordinary run folder, OUT/NAME, with its curve and its checkpoint; one that is complete is not run again. When the minutes
are over the run under way is asked to save, as Slurm would ask it, and Preempted says that there is more to do. The same command may run in
several terminals, on several machines that share a disk: each takes runs that nobody else has.
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

from anew.checkpoint import folder as checkpoint
from anew.config.schema import Config
from anew.errors import Diverged, Preempted, UserError
from anew.training import run_log as metrics
from anew.training.setup import resolve_config
from anew.training.trainer import train
from anew.utils.signals import StopFlag, signal_this_process, stop_on_signals

DIVERGED = "diverged.txt"  # in the folder of a run that was given up


@dataclass(frozen=True)
class Trial:
    """One run of an experiment."""

    name: str
    config: Config


@dataclass(frozen=True)
class Ended:
    """How a trial ended: tokens read, seconds they take at its median speed, held-out loss in nats a token (infinite: it diverged)."""

    folder: Path
    config: Config
    tokens: int
    seconds: float
    loss: float


def ended(trial: Trial, out: Path) -> Ended | None:
    """What is written down of a trial that is complete; None for one that is not. UserError if its folder is another run's."""
    folder = out / trial.name
    if not (folder / "config.json").is_file():
        return None
    config = resolve_config(trial.config.override(out=str(folder)))
    rows = metrics.read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    speeds = [row["speed/tokens_per_second"] for row in rows if "speed/tokens_per_second" in row]
    if (folder / DIVERGED).is_file():
        return Ended(folder, config, int(rows[-1]["tokens"]), math.inf, math.inf)
    last = checkpoint.folder_of(folder, config.run.steps)
    if (
        not rows
        or rows[-1]["step"] != config.run.steps
        or rows[-1].get("val/precision") != "fp32"
        or not last.is_dir()
    ):
        return None
    tokens, loss = int(rows[-1]["tokens"]), rows[-1]["val/loss"]
    return Ended(
        folder,
        config,
        tokens,
        tokens / statistics.median(speeds),
        math.inf if loss is None else float(loss),
    )


def run_all(
    trials: Sequence[Trial], out: Path, stop: StopFlag, done: Callable[[Trial, Ended], None]
) -> dict[str, Ended]:
    """Every trial's end; `done` is told of each as it is known, those of earlier calls too. Preempted if `stop` is set before the last."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Ended] = {}
    while left := [trial for trial in trials if trial.name not in results]:
        for trial in left:
            with contextlib.suppress(Timeout), FileLock(out / f".{trial.name}.lock", timeout=0):
                results[trial.name] = _run(trial, out, stop)
                done(trial, results[trial.name])
        if len(results) < len(trials) and stop.wait(1.0):  # others have the rest
            raise Preempted(
                "stopped while others are at the last runs; the same command waits for them."
            )
    return {trial.name: results[trial.name] for trial in trials}


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, no other process of the same experiment is."""
    from filelock import FileLock

    with FileLock(lock):
        yield


def _run(trial: Trial, out: Path, stop: StopFlag) -> Ended:
    """The end of one trial, which is run if it is not complete."""
    folder = out / trial.name
    if (found := ended(trial, out)) is not None:
        return found
    if stop.is_set():
        raise Preempted(f"stopped before {trial.name}; the same command goes on from there.")
    torch.compiler.reset()  # torch gives up on code that it has compiled for too many models
    try:
        train(trial.config.override(out=str(folder)))
    except Diverged as error:  # a result as any other
        (folder / DIVERGED).write_text(f"{error}\n", encoding="utf-8")
    found = ended(trial, out)
    if found is None:
        raise UserError(
            f"{folder} ended without a validation loss, by which runs are compared; does the data hold any text out?"
        )
    return found


@contextlib.contextmanager
def limited(minutes: float) -> Iterator[StopFlag]:
    """Set by the signals that ask a process to stop, one of which it sends itself when the time is over (0: never)."""
    with stop_on_signals() as stop:
        left = threading.Event()

        def end() -> None:
            if left.wait(60 * minutes):
                return
            stop.set()
            while not left.is_set():  # a run that begins just now has not heard the first
                signal_this_process(signal.SIGTERM)
                left.wait(1.0)

        clock = threading.Thread(target=end, daemon=True, name="minutes")
        if minutes:
            clock.start()
        try:
            yield stop
        finally:
            left.set()
            if minutes:
                clock.join()  # before the signals mean what they meant
