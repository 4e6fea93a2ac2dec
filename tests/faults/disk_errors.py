"""Errors of the disk that pass, as on network file systems, and errors that do not pass.

The errors happen in system calls of real training processes: the library fail_calls.c replaces
open, read, write, fsync and rename of the C library.
"""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anew import Config
from anew.checkpoint.folder import newest_valid
from anew.data.dataset import open_data
from tests.faults.common import (
    FaultResult,
    check_same_run,
    compiled,
    flags,
    saved_step,
    tiny,
    train_run,
)
from tests.support import ROOT
from tests.support.ranks import run_ranks

SHORT_PAUSES = "0.01 0.02 0.04 0.08"  # five attempts, as in the product
TRANSIENT = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR]
CALLS_OF_A_SAVE = {  # and the part of the paths that they are given
    "open": "/.step-{:08d}.tmp",
    "write": "/.step-{:08d}.tmp",
    "fsync": "/.step-{:08d}.tmp",
    "rename": "/step-{:08d}",
}


@dataclass(frozen=True)
class FailedCalls:
    """The next `count` calls of `call` fail where `path` is part of their path."""

    call: str
    number: int  # errno
    count: int
    path: str

    def __str__(self) -> str:
        return f"{self.call}:{self.number}:{self.count}:{self.path}"


@dataclass(frozen=True)
class Outcome:
    """How a process ended in which calls failed."""

    exit_code: int
    output: str
    n_failed: int  # calls


Control = Callable[[FaultResult, Config, Config, Path], None]


def transient_errors(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Train while calls fail, until so many have failed, and compare with an undisturbed run.

    The controls are runs with one attempt, with more failures than attempts, and with a full quota.
    """
    result = FaultResult()
    library = compiled("fail_calls.c", scratch)
    if library is None:
        result.skip_reason = "there is no C compiler"
        return result
    reference = tiny(scratch / "reference", log_every=1)
    run_ranks(1, train_run, reference)
    run = 0
    while result.injections < injections and not result.failures:
        config = reference.override(out=str(scratch / f"run-{run}"))
        _disturb(result, config, reference, _faults_of_a_run(rng, config), library)
        run += 1
    result.measurements["runs"] = str(run)
    controls = [_end_after_one_attempt, _end_after_five, _end_of_quota]

    def run_control(control: Control) -> None:
        config = reference.override(out=str(scratch / control.__name__))
        control(result, config, reference, library)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_control, controls))  # raises an error of a thread
    return result


def _faults_of_a_run(rng: random.Random, config: Config) -> list[FailedCalls]:
    """Return failures of each save, of the logs, of the check of a checkpoint and of a shard."""
    faults = []
    for step in range(config.run.save_every, config.run.steps + 1, config.run.save_every):
        call = rng.choice(list(CALLS_OF_A_SAVE))
        path = CALLS_OF_A_SAVE[call].format(step)
        faults.append(FailedCalls(call, rng.choice(TRANSIENT), rng.randint(1, 4), path))
    shard = open_data(config.data.data, "bytes").splits["train"][0].path
    number = rng.choice(TRANSIENT[:3])  # the others do not happen to reads of a file
    return [
        *faults,
        FailedCalls("write", number, rng.randint(1, 4), "/metrics.jsonl"),
        FailedCalls("write", number, rng.randint(1, 4), "/tensorboard/"),
        FailedCalls("write", number, rng.randint(1, 4), "/log.txt"),
        FailedCalls("rename", number, rng.randint(1, 4), "/run_state.json"),
        FailedCalls("read", number, rng.randint(1, 4), "/step-00000005/"),
        FailedCalls(rng.choice(["open", "read"]), number, rng.randint(1, 4), str(shard)),
    ]


def _disturb(
    result: FaultResult,
    config: Config,
    reference: Config,
    faults: list[FailedCalls],
    library: Path,
) -> None:
    """Train with calls that fail, each less often than there are attempts."""
    outcome = _train(config, faults, library, SHORT_PAUSES)
    what = " ".join(map(str, faults))
    result.injections += outcome.n_failed
    if outcome.exit_code != 0:
        result.check(False, f"{what}: the run has ended: {outcome.output[-1500:]}")
        return
    planned = sum(fault.count for fault in faults)
    result.check(outcome.n_failed == planned, f"{what}: only {outcome.n_failed} calls failed")
    check_same_run(result, config, reference, what)
    log = (config.folder / "log.txt").read_text()
    for fault in faults:
        # Python itself repeats an interrupted call, so there may be nothing to log.
        is_logged = f"{os.strerror(fault.number)} (attempt 1 of 5)" in log
        result.check(is_logged or fault.number == errno.EINTR, f"not logged: {fault}")


def _end_after_one_attempt(
    result: FaultResult, config: Config, reference: Config, library: Path
) -> None:
    """With one attempt, one failed call ends the run."""
    fault = FailedCalls("fsync", errno.EIO, 1, "/.step-00000020.tmp")
    outcome = _train(config, [fault], library, pauses="")
    _check_end(result, config, outcome, 1, "checkpoints/step-00000020: the checkpoint of step 20")
    _finish(result, config, reference)


def _end_after_five(result: FaultResult, config: Config, reference: Config, library: Path) -> None:
    """An error that does not pass ends the run after five attempts."""
    fault = FailedCalls("write", errno.ESTALE, 10**6, "/.step-00000020.tmp")
    outcome = _train(config, [fault], library, SHORT_PAUSES)
    _check_end(result, config, outcome, 1, os.strerror(errno.ESTALE))
    attempts = (config.folder / "log.txt").read_text().count("(attempt ")
    result.check(attempts == 4, f"{attempts} further attempts")
    _finish(result, config, reference)


def _end_of_quota(result: FaultResult, config: Config, reference: Config, library: Path) -> None:
    """A full quota ends the run at once, with a sentence of its own."""
    fault = FailedCalls("write", errno.EDQUOT, 1, "/.step-00000020.tmp")
    outcome = _train(config, [fault], library, SHORT_PAUSES)
    _check_end(result, config, outcome, 2, f"your disk quota for {config.folder} is used up")
    _finish(result, config, reference)


def _check_end(
    result: FaultResult, config: Config, outcome: Outcome, exit_code: int, words: str
) -> None:
    """Check how a run has ended that could not save step 20: in one sentence, and with step 15."""
    last_line = outcome.output.strip().splitlines()[-1]
    is_sentence = last_line.startswith("anew: ") and words in last_line
    is_as_expected = outcome.exit_code == exit_code and is_sentence
    result.check(is_as_expected, f"{outcome.exit_code} {outcome.output[-1500:]}")
    is_honest = "Traceback" not in outcome.output and "disk of" not in outcome.output
    result.check(is_honest, f"another error: {outcome.output[-1500:]}")
    checkpoint, skipped = newest_valid(config.folder)
    has_earlier = saved_step(checkpoint) == 15 and not skipped
    result.check(has_earlier, f"the newest checkpoint is {checkpoint}, {skipped}")
    result.injections += outcome.n_failed


def _finish(result: FaultResult, config: Config, reference: Config) -> None:
    """Continue a run that has ended with an error, and compare it with the undisturbed run."""
    run_ranks(1, train_run, config)
    check_same_run(result, config, reference, config.folder.name)


def _train(config: Config, faults: list[FailedCalls], library: Path, pauses: str) -> Outcome:
    """Run the command line of the training, with failing calls, in a process of its own."""
    failed = config.folder.with_suffix(".failed")
    environment = {
        **os.environ,
        "ANEW_PAUSES": pauses,
        "ANEW_FAIL_CALLS": " ".join(map(str, faults)),
        "ANEW_FAILED_CALLS": str(failed),
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.faults.short_pauses", "train", "shakespeare"]
    done = subprocess.run(
        [*command, *flags(config)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    n_failed = len(failed.read_text().splitlines()) if failed.exists() else 0
    return Outcome(done.returncode, done.stdout, n_failed)
