"""Training: one step function above one loop.

    anew train shakespeare --out runs/bard         # start, or go on where runs/bard stopped
    anew.train(anew.recipe("shakespeare"))         # the same from Python
    torchrun --standalone --nproc-per-node 8 -m anew train gpt2-124m

Out comes the run folder: config.json, metrics.jsonl, samples.jsonl, log.txt, tensorboard/ and checkpoints/step-N, each of which is a
Hugging Face folder. The step is the only clock: tokens, learning rate and random numbers are functions of (seed, step), so a run that
was stopped anywhere goes on bit for bit as if it had not been.
"""

import contextlib
import errno
import hashlib
import logging
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anew.checkpoint import folder as checkpoint
from anew.config.schema import Config
from anew.config.values import bytes_of
from anew.data.dataloader import prefetch
from anew.data.dataset import Stopped, remove_used
from anew.distributed.world import whole
from anew.errors import Preempted, UserError
from anew.optim import build as optim
from anew.training import run_log as metrics
from anew.training.micro_batch import is_out_of_memory
from anew.training.profiler import profiled, quiet_garbage
from anew.training.setup import Begun, begin
from anew.training.train_state import State
from anew.utils.signals import NOTHING_YET, Interrupted, Stop, listening

log = logging.getLogger("anew")

MicroBatch = tuple[Tensor, Tensor]
NO_LIMITS = (math.inf, math.inf)


@dataclass(frozen=True)
class Result:
    """Where a run ended. Losses in nats a token, scored in fp32; None where there was nothing to score."""

    folder: Path
    step: int
    tokens: int
    seconds: float
    train_loss: float
    val_loss: float | None
    train_text_loss: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of one step, the same on every rank: mean loss, gradient norm before clipping, and whether it was applied."""

    loss: float
    norm: float
    applied: bool
    stop: bool = False  # a rank was asked to stop: weights and optimizer state are unchanged
    save: bool = False


def train_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    state: State,
    micro_batches: Sequence[MicroBatch],
    rate: float,
    stop: Stop,
    save: bool = False,
    limits: tuple[float, float] = NO_LIMITS,
    compiling: bool = False,
    while_device_works: Callable[[], None] | None = None,
) -> Outcome:
    """One optimizer step over this rank's `micro_batches` of (ids, targets), at `rate` of the peak learning rate.

    Weights, optimizer and loss scale stay as they are if the loss or the gradient is not finite or above its limit on any rank, or
    if any rank was asked to stop. `save` is this rank's request for a checkpoint, which all ranks learn of. While `compiling`, which
    may take a minute, a signal interrupts the passes. `while_device_works` is called once the first micro-batch is under way.
    """
    loss = accumulate_gradients(loss_of, state, micro_batches, stop, compiling, while_device_works)
    stop_here = stop.is_set()
    loss, stop_requests, save_requests = all_reduce_gradients(state, loss, stop_here, save)
    if must_leave_early(state, stop_here, stop_requests):
        drop_gradients(state)
        return Outcome(math.nan, math.nan, applied=False, stop=True)
    norm = clip_gradients(state)
    skip = ~(norm + loss).isfinite() | (loss > limits[0]) | (norm > limits[1]) | (stop_requests > 0)
    apply_update(state, skip, rate)
    drop_gradients(state)
    results = torch.stack([loss, norm, skip.float(), stop_requests, save_requests])
    loss_, norm_, skipped, stop_, save_ = (
        results.tolist()
    )  # the one point where the host always waits for the device
    return Outcome(loss_, norm_, applied=not skipped, stop=stop_ > 0, save=save_ > 0)


def accumulate_gradients(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    state: State,
    micro_batches: Sequence[MicroBatch],
    stop: Stop,
    compiling: bool,
    while_device_works: Callable[[], None] | None,
) -> Tensor:
    """Forward and backward over this rank's micro-batches; returns their mean loss, on the device."""
    config, scaler = state.config, state.scaler
    loss_sum = torch.zeros((), device=state.rt.device)
    if state.buckets is not None:
        state.buckets.start_step()
    with (
        contextlib.suppress(Interrupted),
        stop.breakable() if compiling else contextlib.nullcontext(),
    ):
        for index, (ids, targets) in enumerate(micro_batches):
            if (
                stop.is_set() and not state.is_sharded
            ):  # sharded weights need every rank to the end of the step
                break
            if config.model.dropout > 0:
                torch.manual_seed(_seed(config.run.seed, state.step, index, state.world.rank))
            state.prepare_backward(
                is_last=index == len(micro_batches) - 1, may_be_interrupted=compiling
            )
            loss = loss_of(ids, targets) / len(micro_batches)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
            if index == 0 and while_device_works is not None:
                while_device_works()
    return loss_sum


def all_reduce_gradients(
    state: State, loss: Tensor, stop: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the gradients over all ranks; returns the mean loss and the numbers of ranks that want to stop and to save."""
    shared = torch.zeros(3, device=loss.device)
    shared[0], shared[1], shared[2] = loss, float(stop), float(save)
    if state.buckets is not None:  # sharded gradients were summed by the backward pass
        state.buckets.all_reduce()
    state.world.all_reduce(shared)
    return shared[0] / state.world.size, shared[1], shared[2]


def must_leave_early(state: State, stop_here: bool, stop_requests: Tensor) -> bool:
    """Must the step end before the optimizer, because a rank was asked to stop?

    A single process knows without asking its device. Of several, only those with a GradScaler ask: unscaling needs a scale, which a
    rank without a micro-batch does not have, and the scaler's update would change the scale after a step that was broken off. All
    others go on, with `skip` set.
    """
    if state.world.size == 1:
        return stop_here
    return state.scaler.is_enabled() and stop_requests.item() > 0


def clip_gradients(state: State) -> Tensor:
    """Scale the gradients down to the largest allowed global norm; returns the norm before that, on the device."""
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    return whole(nn.utils.clip_grad_norm_(state.params, state.config.optim.clip))


def apply_update(state: State, skip: Tensor, rate: float) -> None:
    """Update the weights at `rate` of the peak learning rate, or leave weights and optimizer state as they are if `skip` is true."""
    scaler, config = state.scaler, state.config.optim
    optim.set_rate(state.optimizers, rate, optim.momentum(state.step, config))
    # Fused AdamW and Muon read `found_inf` on the device. The optimizers on MPS, of sharded parameters, and the unfused do not.
    host_must_look = (
        scaler.is_enabled() or state.is_sharded or skip.device.type == "mps" or not config.fused
    )
    if not (host_must_look and skip.item()):
        for optimizer in state.optimizers:
            if not host_must_look:
                optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            scaler.step(optimizer)
    scaler.update()


def drop_gradients(state: State) -> None:
    """Release the gradients of a step that is over. Buckets keep their memory for the next step."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)


def train(config: Config, progress: Callable[[metrics.Row], None] | None = None) -> Result:
    """Run `config` to its last step, from where its run folder stopped. `progress` is called with each step's row.

    Raises UserError for what the user can put right, Preempted after SIGTERM, SIGUSR1 or Ctrl-C and a save.
    """
    try:
        with contextlib.ExitStack() as stack:
            return _train(config, progress, stack)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        micro_batch = config.run.micro_batch
        what = (
            "the micro-batch that was found"
            if micro_batch == "auto"
            else f"a micro-batch of {micro_batch}"
        )
        raise UserError(
            f"there is not enough memory for {what}; use a smaller --micro-batch or --recompute. The tokens a step stay the same."
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"the disk of {config.folder} is full; the checkpoints that are there are whole: free some and run the same command again."
        ) from error


def _train(
    config: Config, progress: Callable[[metrics.Row], None] | None, stack: contextlib.ExitStack
) -> Result:
    stop = stack.enter_context(listening())
    try:
        with stop.breakable(patience=5.0):
            run = begin(config, stop, stack)
    except Interrupted:
        raise Preempted(NOTHING_YET) from None
    state, saver = run.state, run.saver
    step_done = stack.enter_context(
        profiled(config.folder / "trace.json", config.run.profile if state.world.rank == 0 else 0)
    )
    collect = stack.enter_context(quiet_garbage())

    def after_step() -> None:
        step_done()
        collect(state.step)

    try:
        _loop(run, stop, after_step, progress)
        val_loss, text_loss = run.evaluator.finish()
        saver.wait()
    except Interrupted:
        saver.save(state)
        saver.wait()
        steps = f"{state.step:,} of {run.config.run.steps:,}"
        raise Preempted(f"stopped at step {steps}; the same command goes on from there.") from None
    return Result(
        run.config.folder,
        state.step,
        state.tokens,
        state.seconds,
        run.recorder.last_loss,
        val_loss,
        text_loss,
    )


def _loop(
    run: Begun,
    stop: Stop,
    after_step: Callable[[], None],
    progress: Callable[[metrics.Row], None] | None,
) -> None:
    """Steps until the last. Interrupted on every rank at the same step, if one of them was asked to stop."""
    rows = LateRows(run, progress)
    try:
        _steps(run, stop, after_step, rows)
    finally:
        rows.write()


class LateRows:
    """Writes the row of a step while the device computes the next step. Writing (JSON and TensorBoard) takes the host 2 to 4 ms."""

    def __init__(self, run: Begun, progress: Callable[[metrics.Row], None] | None) -> None:
        self.run, self.progress = run, progress
        self.is_late = run.state.rt.device.type != "cpu"  # a CPU has nothing to do meanwhile
        self.waiting: list[tuple[metrics.Row, bool, str]] = []

    def add(self, row: metrics.Row, applied: bool, sequences: str, now: bool) -> None:
        """Write a row `now`, or when `write` is called. The row of a step that was not applied may end the run, so it never waits."""
        self.waiting.append((row, applied, sequences))
        if now or not applied or not self.is_late:
            self.write()

    def write(self) -> None:
        """Write what is waiting."""
        while self.waiting:
            row, applied, sequences = self.waiting.pop(0)
            self.run.recorder.step(row, applied, sequences)
            if self.progress:
                self.progress(row)


def _steps(run: Begun, stop: Stop, after_step: Callable[[], None], rows: LateRows) -> None:
    config, state, saver, r = run.config, run.state, run.saver, run.config.run
    began = time.perf_counter()
    compiled_for = 0  # sequences in a micro-batch
    for step, micro_batches in _batches(run, range(state.step, r.steps)):
        began += run.evaluator.due(step)
        rate = optim.rate(step, r.steps, config.optim)
        limits = state.spikes.limits(r.spike_z) if r.spikes != "keep" else NO_LIMITS
        micro_batch = len(micro_batches[0][0]) if micro_batches else 0
        compiling = run.compiled and not state.is_sharded and micro_batch not in (0, compiled_for)
        outcome = train_step(
            run.loss_of,
            state,
            micro_batches,
            rate,
            stop,
            saver.is_due(),
            limits,
            compiling,
            rows.write,
        )
        compiled_for = micro_batch
        if outcome.stop:
            raise Interrupted
        seconds = time.perf_counter() - began
        state.advance(seconds)
        if outcome.applied:
            state.spikes.add(outcome.loss, outcome.norm)
        sequences = config.batch_sequences
        lr, tokens = rate * config.optim.lr, sequences * config.data.seq_len
        row = metrics.step_row(
            state.clock(), outcome.loss, outcome.norm, lr, seconds, tokens, config, run.peak_flops
        )
        first = step * sequences
        save = outcome.save or state.step % r.save_every == 0 or state.step == r.steps
        now = save or run.evaluator.is_due(
            state.step
        )  # their rows and files come after this step's
        rows.add(row, outcome.applied, f"sequences {first:,} to {first + sequences - 1:,}", now)
        after_step()
        if save:
            saver.save(state)
            _remove_used_shards(run)
        began = time.perf_counter()


def _batches(run: Begun, steps: range) -> Iterator[tuple[int, list[MicroBatch]]]:
    """This rank's micro-batches of each step, read ahead and moved to the device by a thread; none if asked to stop meanwhile."""
    config, state, batches = run.config, run.state, run.batches
    device, world = state.rt.device, state.world
    most, _ = config.micro_batches(world.size)

    def load(step: int) -> tuple[int, list[MicroBatch]]:
        share = config.batch_sequences // world.size
        micro = _micro_batch_of(share, most)
        first = 0 if config.data.one_batch else step * config.batch_sequences
        rows = torch.from_numpy(batches.rows(first + world.rank * share, share))
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(
            device, non_blocking=device.type == "cuda"
        )  # on MPS a copy from a temporary may read freed memory
        return step, [
            (part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(micro)
        ]

    try:
        yield from prefetch(load, steps)
    except Stopped:  # this rank was asked to stop while it waited for data; the other ranks learn of it with this step's loss
        yield state.step, _blank_micro_batches(run) if state.is_sharded else []


def _blank_micro_batches(run: Begun) -> list[MicroBatch]:
    """As many micro-batches as the other ranks compute in this step. Sharded weights need every rank; the step is not applied."""
    share = run.config.batch_sequences // run.state.world.size
    most, _ = run.config.micro_batches(run.state.world.size)
    micro = _micro_batch_of(share, most)
    blank = torch.zeros(
        micro, run.config.data.seq_len, dtype=torch.int64, device=run.state.rt.device
    )
    return [(blank, blank)] * (share // micro)


def _micro_batch_of(share: int, most: int) -> int:
    """Sequences in a micro-batch: the largest divisor of a rank's share of the batch that is at most `most`."""
    return max(n for n in range(1, most + 1) if share % n == 0)


def _remove_used_shards(run: Begun) -> None:
    """Within a disk budget: shards that even the oldest checkpoint is past are not needed again."""
    config, folder = run.config, run.folder
    saved = checkpoint.steps(config.folder)
    if (
        folder.growth is not None
        and folder.growth.leads
        and bytes_of(config.data.disk_budget)
        and saved
    ):
        sequences = int(saved[0].name.removeprefix("step-")) * config.batch_sequences
        remove_used(run.batches.shards, sequences, config.data.seq_len)


def _seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The global generator's seed for one forward pass: dropout is a function of these four numbers."""
    key = struct.pack("<4q", seed, step, micro_batch, rank)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
