"""Training: the loop around `step.train_step`.

    anew train shakespeare --out runs/bard         # begin a run, or resume it
    anew.train(anew.recipe("shakespeare"))         # the same from Python
    torchrun --standalone --nproc-per-node 8 -m anew train gpt2-124m

A run writes a folder with config.json, metrics.jsonl, samples.jsonl, log.txt, tensorboard/ and
checkpoints/step-N, each of which is a Hugging Face folder. Tokens, learning rate and random
numbers are functions of (seed, step) alone, so a run that was stopped at any moment continues bit
for bit as if it had not been stopped.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from anew.checkpoint import folder as checkpoint
from anew.config.config import Config
from anew.config.values import parse_bytes
from anew.data.dataset import remove_used
from anew.distributed.world import World
from anew.errors import ComputedWrongly, Preempted, UserError
from anew.optim.schedule import learning_rate_factor
from anew.training.batches import batches_of_steps
from anew.training.micro_batch import is_out_of_memory
from anew.training.profiler import garbage_collected_at_fixed_steps, profiled
from anew.training.run_log import Row, step_row
from anew.training.setup import Run, joined_ranks, start_run
from anew.training.silent_errors import GradientCheck
from anew.training.step import NO_LIMITS, StepResult, train_step
from anew.training.validation import is_multiple
from anew.utils.disk_errors import out_of_space
from anew.utils.signals import StopFlag

log = logging.getLogger("anew")

ProgressCallback = Callable[[Row], None]


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. Losses are in nats per token; None where there was no text to score."""

    folder: Path
    step: int
    tokens: int
    seconds: float
    train_loss: float
    val_loss: float | None
    train_text_loss: float | None = None


def train(config: Config, progress: ProgressCallback | None = None) -> TrainResult:
    """Train to the last step of `config`, from where its run folder stopped.

    `progress` is called with the row of each step. Raises UserError for problems that the user can
    correct, and Preempted after SIGTERM, SIGUSR1 or Ctrl-C, when the last complete step is saved.
    """
    if not isinstance(config, Config):
        raise UserError('train takes a config, such as anew.train(anew.recipe("shakespeare")).')
    try:
        return run_with_rollbacks(config, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "there is not enough memory for a micro-batch; use a smaller --micro-batch or "
            "--recompute. The tokens a step stay the same."
        ) from error
    except OSError as error:
        problem = out_of_space(error, config.folder)
        if not problem:
            raise
        raise UserError(
            f"{problem}; the checkpoints in it are complete. "
            "Free some space and run the same command again."
        ) from error


def run_with_rollbacks(config: Config, progress: ProgressCallback | None) -> TrainResult:
    """Train to the last step.

    If a check finds a difference and `on_corruption` is "rollback", continue from the last
    checkpoint. Raises ComputedWrongly if another check fails before a later step.
    """
    # Signals keep their default behaviour until the first step is done: nothing can be lost before.
    # The flag is kept for all attempts, so that a request to stop is not lost between two of them.
    stop = StopFlag()
    with contextlib.ExitStack() as outer:
        world = outer.enter_context(joined_ranks(config))
        outer.callback(stop.restore)
        wrong_step = 0  # at which a check has found a difference
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    return run_training(config, world, stop, progress, stack)
            except ComputedWrongly as error:  # raised by all ranks
                if config.run.on_corruption == "stop" or error.step <= wrong_step:
                    raise
                wrong_step = error.step
                log.warning(f"continuing from the last checkpoint: {error}")
            release_memory()


def release_memory() -> None:
    """Release the memory of a model that is not used any more. Its tensors refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_training(
    config: Config,
    world: World,
    stop: StopFlag,
    progress: ProgressCallback | None,
    stack: contextlib.ExitStack,
) -> TrainResult:
    """Start the run, train it to the end, validate it and wait for the last checkpoint."""
    run = start_run(config, world, stop, stack)
    profiled_steps = config.run.profile if run.state.world.rank == 0 else 0
    step_profiled = stack.enter_context(profiled(config.folder / "trace.json", profiled_steps))
    collect_garbage = stack.enter_context(garbage_collected_at_fixed_steps())

    def after_step() -> None:
        step_profiled()
        collect_garbage(run.state.step)

    try:
        training_loop(run, stop, after_step, progress)
        val_loss, train_text_loss = run.validation.run_at_end()
        run.checkpoints.wait()
    except Preempted:
        run.checkpoints.save(run.state)
        run.checkpoints.wait()
        raise Preempted(
            f"stopped at step {run.state.step:,} of {config.run.steps:,}; "
            "the same command goes on from there."
        ) from None
    return TrainResult(
        folder=run.config.folder,
        step=run.state.step,
        tokens=run.state.tokens,
        seconds=run.state.seconds,
        train_loss=run.log.last_train_loss,
        val_loss=val_loss,
        train_text_loss=train_text_loss,
    )


def training_loop(
    run: Run,
    stop: StopFlag,
    after_step: Callable[[], None],
    progress: ProgressCallback | None,
) -> None:
    """Take the remaining steps.

    Raises Preempted, on every rank at the same step, if one was asked to stop.
    """
    config = run.config
    state = run.state
    rows = DelayedRows(run, progress)
    stack = contextlib.ExitStack()
    stack.callback(rows.write)
    with stack:
        stopwatch = Stopwatch()
        for batch in batches_of_steps(run, range(state.step, config.run.steps)):
            if run.validation.is_due(state.step):
                with stopwatch.paused():
                    run.validation.run(state.step)
                state.timer.start()
            check = None
            if is_multiple(state.step, config.run.check_every):
                check = GradientCheck(state, run.loss_of, batch.micro_batches[0], batch.divisors[0])
                state.timer.start()
            rate = learning_rate_factor(state.step, config.run.steps, config.optim)
            result = train_step(
                run.loss_of,
                state,
                batch.micro_batches,
                rate,
                stop,
                save=run.checkpoints.is_due(),
                limits=outlier_limits(run),
                while_device_works=rows.write,
                divisors=batch.divisors,
                after_first_pass=check.after_first_pass if check else None,
            )
            stop.listen()
            if result.stop:
                raise Preempted
            if check:
                check.refuse_differences()
            seconds = stopwatch.seconds()
            state.advance(seconds, batch.n_tokens)
            if result.applied:
                state.outliers.add(result.loss, result.grad_norm)
            save = result.save or saves_at(run, state.step)
            row = row_of_step(run, result, rate, seconds, batch.n_tokens)
            row |= run.slow_ranks.add(result.rank_seconds)
            # The rows of a validation and the files of a checkpoint follow the row of their step.
            is_urgent = save or run.validation.is_due(state.step) or not result.applied
            rows.add(row, result.applied, is_urgent)
            after_step()
            if save:
                run.checkpoints.save(state)
                remove_used_shards(run)
            stopwatch.restart()
            state.timer.start()


def outlier_limits(run: Run) -> tuple[float, float]:
    """Return the largest loss and gradient norm with which a step is applied."""
    if run.config.run.spikes == "keep":
        return NO_LIMITS
    return run.state.outliers.limits(run.config.run.spike_z)


def saves_at(run: Run, step: int) -> bool:
    """Return whether a checkpoint is saved after `step` steps, apart from `save_minutes`."""
    config = run.config.run
    return step % config.save_every == 0 or step == config.steps


def row_of_step(run: Run, result: StepResult, rate: float, seconds: float, n_tokens: int) -> Row:
    """Return the row of metrics.jsonl for the step that was just counted."""
    learning_rate = rate * run.config.optim.lr
    return step_row(
        run.state.clock(),
        result.loss,
        result.grad_norm,
        learning_rate,
        seconds,
        n_tokens,
        run.config,
        run.peak_flops,
    )


class DelayedRows:
    """Writes the row of a step while the device computes the next one. Writing takes 2 to 4 ms."""

    def __init__(self, run: Run, progress: ProgressCallback | None) -> None:
        self.run = run
        self.progress = progress
        # A CPU computes the steps itself, so a delay gains nothing there.
        self.is_delayed = run.state.runtime.device.type != "cpu"
        self.waiting: list[tuple[Row, bool]] = []

    def add(self, row: Row, applied: bool, is_urgent: bool) -> None:
        """Write a row, now if it is urgent, otherwise when `write` is called."""
        self.waiting.append((row, applied))
        if is_urgent or not self.is_delayed:
            self.write()

    def write(self) -> None:
        """Write the rows that are waiting."""
        while self.waiting:
            row, applied = self.waiting.pop(0)
            config = self.run.config
            first = 0 if config.data.one_batch else (row["step"] - 1) * config.batch_sequences
            last = first + config.batch_sequences - 1
            self.run.log.step(row, applied, f"sequences {first:,} to {last:,}")
            if self.progress is not None:
                self.progress(row)


class Stopwatch:
    """Measures the seconds since `restart`, without those inside `paused`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to measure from zero."""
        self.started = time.perf_counter()
        self.paused_seconds = 0.0

    def seconds(self) -> float:
        """Return the measured time."""
        return time.perf_counter() - self.started - self.paused_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the block."""
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began


def remove_used_shards(run: Run) -> None:
    """Within a disk budget, remove shards that even the oldest checkpoint is past."""
    config = run.config
    preparation = run.data.preparation
    oldest = checkpoint.list_checkpoints(config.folder)[:1]
    has_budget = parse_bytes(config.data.disk_budget) > 0
    if preparation is None or not preparation.owns_preparation or not has_budget or not oldest:
        return
    oldest_step = int(oldest[0].name.removeprefix("step-"))
    sequences = oldest_step * config.batch_sequences
    remove_used(run.batches.shards, sequences, config.data.seq_len)
