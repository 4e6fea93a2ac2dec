"""Faults of running processes: signals, resumes, changes of the number of ranks, bad numbers."""

import contextlib
import hashlib
import math
import os
import pkgutil
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anew import Config
from anew.checkpoint.folder import newest_valid
from anew.errors import Preempted
from anew.evaluate.loss import mean_loss
from anew.training import run_log, trainer, validation
from anew.training.step import train_step
from anew.training.trainer import train
from tests.faults.common import (
    FaultResult,
    check_same_run,
    final,
    flags,
    losses,
    saved_step,
    tiny,
    train_run,
)
from tests.integration.test_parallel import trained, trained_until
from tests.support.ranks import run_ranks, start_process

# --- interrupted and resumed runs -----------------------------------------------------------------

RESUMED_RUNS: list[dict[str, Any]] = [
    {"batch_tokens": 4096, "micro_batch": 16},  # 4 steps an epoch, so shards and epochs end
    {"micro_batch": 2},
    {"evaluate_every": 3},
    {"dropout": 0.1},
    {"optimizer": "muon", "decay_share": 0.5},
]


def chained_resumes(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Interrupt a run three times, and compare it with an uninterrupted run."""
    result = FaultResult()
    for i in range(injections):
        settings = {"steps": 16, **RESUMED_RUNS[i % len(RESUMED_RUNS)]}
        reference = tiny(scratch / f"reference-{i}", **settings)
        train(reference)
        config = reference.override(out=str(scratch / f"interrupted-{i}"))
        for step in sorted(rng.sample(range(1, 16), 3)):
            moment = rng.choice(["micro-batch", "evaluation", "step"])
            if moment == "evaluation" and not config.run.evaluate_every:
                moment = "step"
            with contextlib.suppress(Preempted), _sigterm(step, moment):
                train(config)
        train(config)
        check_same_run(result, config, reference, f"chain {i} {settings}")

        state = final(config.folder)
        rows = losses(config.folder)
        train(config)
        is_unchanged = final(config.folder) == state and losses(config.folder) == rows
        result.check(is_unchanged, "the same command has changed a finished run")
        result.injections += 1
    return result


@contextlib.contextmanager
def _sigterm(step: int, moment: str) -> Iterator[None]:
    """Send SIGTERM once: in the second micro-batch of `step`, after it, or in an evaluation."""
    is_sent = False
    is_first = True  # until the first step of a process, signals have their default behaviour

    def send() -> None:
        nonlocal is_sent
        if not is_sent and not is_first:
            is_sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def step_with_signal(
        loss_of: Any, state: Any, micro_batches: Any, *arguments: Any, **named: Any
    ) -> Any:
        calls = 0

        def loss_with_signal(*batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == min(2, len(micro_batches)):
                send()
            return loss_of(*batch)

        nonlocal is_first
        is_due = state.step >= step
        in_micro_batch = is_due and moment == "micro-batch"
        loss_function = loss_with_signal if in_micro_batch else loss_of
        outcome = train_step(loss_function, state, micro_batches, *arguments, **named)
        if is_first:  # as the training loop does right after the step
            stop = arguments[1]
            stop.listen()
        is_first = False
        if is_due and moment == "step":
            send()
        return outcome

    def evaluation_with_signal(*arguments: Any) -> Any:
        if moment == "evaluation":
            send()
        return mean_loss(*arguments)

    with (
        patch.object(trainer, "train_step", step_with_signal),
        patch.object(validation, "mean_loss", evaluation_with_signal),
    ):
        yield


# --- another number of ranks ----------------------------------------------------------------------


def change_world_size(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Continue a run on 2, 1, 4 and 2 ranks, and compare it with a run on one rank."""
    result = FaultResult()
    reference = tiny(scratch / "reference", steps=41, save_every=10, keep=0)
    [(_, expected)] = run_ranks(1, trained, reference)
    expected_losses = {step: loss for step, loss, _, _ in losses(reference.folder)}
    largest = 0.0
    for i in range(injections):
        parallel = "ddp" if i % 2 == 0 else "fsdp"
        config = reference.override(out=str(scratch / f"run-{i}"), parallel=parallel)
        for ranks, last_step in ((2, 10), (1, 20), (4, 30), (2, 40)):
            found = run_ranks(ranks, trained_until, config, last_step)
            if any(status != "ok" for status, _ in found):
                result.check(False, f"{ranks} ranks: {found}")
                break
            _check_same_tokens(result, [part for _, part in found], expected["rows"])
        differences = [
            abs(loss / expected_losses[step] - 1) for step, loss, _, _ in losses(config.folder)
        ]
        largest = max(largest, *differences)
        result.check(max(differences) <= 1e-6, f"losses differ by {max(differences):.1e}")
        result.injections += 1
    result.measurements["largest relative difference of a loss"] = f"{largest:.1e}"
    return result


def _check_same_tokens(
    result: FaultResult, parts: list[dict[str, Any]], expected: list[list[list[int]]]
) -> None:
    """Check that the ranks together have read the sequences that one rank reads in each step."""
    first = parts[0]["first"]
    for k in range(len(parts[0]["rows"])):
        rows = [row for part in parts for row in part["rows"][k]]
        step = first + k
        result.check(rows == expected[step], f"other tokens at step {step} on {len(parts)} ranks")


# --- signals --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A phase of a run: it begins with a call of a function, which is delayed by some seconds."""

    function: str
    call: int
    seconds: float


PHASES = {
    "start-up": Phase("anew.training.setup.open_data", 1, 3.0),
    "compile": Phase("anew.training.trainer.train_step", 1, 0.0),
    "step": Phase("anew.training.trainer.train_step", 8, 0.4),
    "evaluation": Phase("anew.training.validation.mean_loss", 2, 0.4),
    "save": Phase("anew.checkpoint.folder.publish", 2, 0.4),
    "wait for data": Phase("anew.data.dataloader.DataLoader.rows", 12, 0.4),
}
BEFORE_THE_FIRST_STEP = ("start-up", "compile")  # signals have their default behaviour there
SIGNALS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGUSR1": [signal.SIGUSR1],
    "two SIGTERM": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
}


def signals(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Send a signal in a phase of a run, then continue and compare with an uninterrupted run."""
    result = FaultResult()
    reference = tiny(scratch / "reference", evaluate_every=4, keep=0)
    run_ranks(1, train_run, reference)  # in a process with one thread, like the runs below
    slowest = 0.0
    for i in range(injections):
        phase = list(PHASES)[i % len(PHASES)]
        if phase == "compile" and i >= len(PHASES):
            phase = "step"  # because compiling takes ten seconds each time
        name = list(SIGNALS)[(i // len(PHASES) + i) % len(SIGNALS)]
        what = f"{name} in {phase}"
        compiles = "on" if phase == "compile" else "off"
        config = reference.override(out=str(scratch / f"run-{i}"), compile=compiles)
        seconds = _signal_in_phase(result, config, phase, name, rng)
        slowest = max(slowest, seconds)
        result.check(seconds < 20, f"{what}: took {seconds:.1f} s")
        has_metrics = (config.folder / "metrics.jsonl").exists()
        recorded = losses(config.folder) if has_metrics else []
        last_step = recorded[-1][0] if recorded else 0
        checkpoint, skipped = newest_valid(config.folder)
        is_last = not skipped and saved_step(checkpoint) == last_step
        result.check(is_last, f"{what}: the checkpoint is not of the last step")
        if phase != "compile":  # compiled code rounds differently
            run_ranks(1, train_run, config)
            check_same_run(result, config, reference, what)
        result.injections += 1
    result.measurements["slowest exit"] = f"{slowest:.1f} s"
    return result


def _signal_in_phase(
    result: FaultResult, config: Config, phase: str, name: str, rng: random.Random
) -> float:
    """Train in a process that gets a signal in this phase. Return the seconds until it ends."""
    marker = config.folder.with_suffix(".marker")
    arguments = ["train", "shakespeare", *flags(config)]
    process, connection = start_process(train_with_delay, arguments, PHASES[phase], marker)
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.005)
    if phase == "compile":
        time.sleep(1.5 * rng.random())
    start = time.monotonic()
    first, *others = SIGNALS[name]
    os.kill(process.pid or 0, first)
    for other in others:
        time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, other)
    try:
        error, text = connection.recv() if connection.poll(60) else ("Timeout", "")
    except EOFError:  # the signal ended the process
        process.join(10)
        error, text = "signal", str(process.exitcode)
    seconds = time.monotonic() - start
    if phase in BEFORE_THE_FIRST_STEP:
        is_expected = (error, text[:3]) in {("signal", str(-first)), ("SystemExit", "130")}
    else:
        is_expected = error == "SystemExit" and text.startswith("75")
    result.check(is_expected, f"{name} in {phase}: {error} {text}")
    process.join(10)
    return seconds


def train_with_delay(arguments: list[str], phase: Phase, marker: Path) -> None:
    """Run the command line. When the phase begins, create the file `marker` and wait in it."""
    from anew.cli.main import main

    function: Callable[..., Any] = pkgutil.resolve_name(phase.function)
    calls = 0

    def delayed(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == phase.call:
            marker.touch()
            time.sleep(phase.seconds)
        return function(*values, **named)

    # A shell that runs the tests in the background lets its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stdout = marker.with_suffix(".log").open("w")
    with patch(phase.function, delayed):
        main(arguments)


# --- bad numbers ----------------------------------------------------------------------------------

FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 10.0}


def bad_losses(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Multiply the loss of rank 1 by NaN, infinity or 10 in one step: both ranks skip the step."""
    result = FaultResult()
    for i in range(injections):
        kind = list(FACTORS)[i % len(FACTORS)]
        bad_step = rng.randint(60, 75)
        spikes = "skip" if kind == "spike" else "keep"
        config = tiny(scratch / f"run-{i}", steps=80, spikes=spikes)
        found = run_ranks(2, train_with_bad_loss, config, FACTORS[kind], bad_step, seconds=120)
        if any(status != "ok" for status, _ in found):
            result.check(False, f"{kind}: {found}")
            continue
        (_, first), (_, second) = found
        result.check(first == second, f"{kind}: the ranks disagree")
        [bad] = [step for step in first if step.number == bad_step]
        result.check(bad.kept_weights, f"{kind}: the step changed weights")
        result.check("applied=False" in bad.outcome, f"{kind}: {bad.outcome}")
        log = (config.folder / "log.txt").read_text()
        result.check("the step was skipped (sequences" in log, f"{kind}: not reported")
        last_step = run_log.read_metrics(config.folder)[-1]["step"]
        result.check(last_step == 80, f"{kind}: the run ended at step {last_step}")
        result.injections += 1
    return result


@dataclass(frozen=True)
class Step:
    """What one rank has seen of a step."""

    number: int
    outcome: str
    kept_weights: bool


def train_with_bad_loss(config: Config, factor: float, bad_step: int) -> list[Step]:
    """Train one rank. In `bad_step`, the loss of rank 1 is multiplied by `factor`."""
    steps: list[Step] = []

    def bad_train_step(loss_of: Any, state: Any, *arguments: Any, **named: Any) -> Any:
        def bad_loss(*batch: Any) -> Any:
            return loss_of(*batch) * factor

        is_bad = state.step == bad_step
        before = _digest(state) if is_bad else ""
        has_bad_loss = is_bad and os.environ["RANK"] == "1"
        loss_function = bad_loss if has_bad_loss else loss_of
        outcome = train_step(loss_function, state, *arguments, **named)
        kept_weights = is_bad and _digest(state) == before
        steps.append(Step(state.step, repr(outcome), kept_weights))
        return outcome

    with patch.object(trainer, "train_step", bad_train_step):
        train(config)
    return steps


def _digest(state: Any) -> str:
    """Return a hash of the weights and of the optimizers' states."""
    digest = hashlib.sha256()
    tensors = list(state.parameters)
    for optimizer in state.optimizers:
        for moments in optimizer.state.values():
            tensors += moments.values()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()
