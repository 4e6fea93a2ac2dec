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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anew import checkpoint, metrics, optim
from anew.begin import Begun, begin
from anew.config import Config, UserError
from anew.data.batches import prefetch
from anew.data.open import Stopped, remove_used
from anew.parallel import whole
from anew.preempt import NOTHING_YET, Interrupted, Preempted, Stop, listening
from anew.probe import is_out_of_memory
from anew.profiling import profiled, quiet_garbage
from anew.spelling import bytes_of
from anew.state import State

log = logging.getLogger("anew")

MicroBatch = tuple[Tensor, Tensor]
NO_LIMITS = (math.inf, math.inf)
ROLL_BACKS = 3  # to one and the same step; then the run is not getting past it


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
    """What became of one step, the same on every rank: mean loss, gradient norm before clipping, and whether it was applied."""

    loss: float
    norm: float
    applied: bool
    stop: bool = False  # somebody was asked to stop: nothing has changed
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
) -> Outcome:
    """One optimizer step over this rank's `micro_batches` of (ids, targets), at `rate` of the peak learning rate.

    Weights and optimizer state stay as they are if the loss or the gradient is not finite or above its limit, on any rank, or if any
    rank was asked to stop. `save` is this rank's wish for a checkpoint, of which the others learn. While `compiling`, which may take a
    minute, a signal breaks off the passes.
    """
    world, scaler, params = state.world, state.scaler, state.params
    sums = torch.zeros(3, device=state.rt.device)  # loss, ranks that shall stop, ranks that want a checkpoint
    with contextlib.suppress(Interrupted), stop.breakable() if compiling else contextlib.nullcontext():
        for i, (ids, targets) in enumerate(micro_batches):
            if stop.is_set() and not state.is_sharded:  # there, all ranks are needed to the end
                break
            torch.manual_seed(_seed(state.config.run.seed, state.step, i, world.rank))
            loss = loss_of(ids, targets) / len(micro_batches)
            scaler.scale(loss).backward()
            sums[0] += loss.detach()
    sums[1], sums[2] = float(stop.is_set()), float(save)
    if world.size > 1:
        gradients = [] if state.is_sharded else [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        world.add_up([*gradients, sums])
        torch._foreach_div_([*gradients, sums[:1]], world.size)
    elif stop.is_set():
        _drop_gradients(state)
        return Outcome(math.nan, math.nan, False, stop=True)
    for optimizer in state.optimizers:
        scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(params, state.config.optim.clip))
    optim.set_rate(state.optimizers, rate, optim.momentum(state.step, state.config.optim))
    bad = ~(norm + sums[0]).isfinite() | (sums[0] > limits[0]) | (norm > limits[1]) | (sums[1] > 0)
    # Not all optimizers honour found_inf: those on MPS, of cut parameters, and the unfused.
    host_must_look = scaler.is_enabled() or state.is_sharded or bad.device.type == "mps" or not state.config.optim.fused
    if not (host_must_look and bad.item()):
        for optimizer in state.optimizers:
            if not host_must_look:
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            scaler.step(optimizer)
    scaler.update()
    _drop_gradients(state)
    loss_, stop_, save_, norm_, bad_ = torch.cat([sums, torch.stack([norm, bad.float()])]).tolist()  # the step's one wait for the device
    return Outcome(loss_, norm_, not bad_, stop_ > 0, save_ > 0)


def _drop_gradients(state: State) -> None:
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
        micro = config.run.micro_batch
        way = (
            "the micro-batch that was found (log.txt says which); use --recompute"
            if micro == "auto"
            else f"micro-batches of {micro}; use --micro-batch auto"
        )
        raise UserError(f"there is not enough memory for {way}, or use a smaller one: the tokens a step stay the same.") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"the disk of {config.folder} is full; the checkpoints that are there are whole: free some and run the same command again."
        ) from error


def _train(config: Config, progress: Callable[[metrics.Row], None] | None, stack: contextlib.ExitStack) -> Result:
    stop = stack.enter_context(listening())
    try:
        with stop.breakable(patience=5.0):
            run = begin(config, stop, stack)
    except Interrupted:
        raise Preempted(NOTHING_YET) from None
    state, saver = run.state, run.saver
    step_done = stack.enter_context(profiled(config.folder / "trace.json", config.run.profile if state.world.rank == 0 else 0))
    collect = stack.enter_context(quiet_garbage())

    def after_step(row: metrics.Row) -> None:
        step_done()
        collect(state.step)
        if progress:
            progress(row)

    try:
        _loop(run, stop, after_step)
        val_loss, text_loss = run.evaluator.finish()
        saver.wait()
    except Interrupted:
        saver.save(state)
        saver.wait()
        steps = f"{state.step:,} of {run.config.run.steps:,}"
        raise Preempted(f"stopped at step {steps}; the same command goes on from there.") from None
    return Result(run.config.folder, state.step, state.tokens, state.seconds, run.recorder.last_loss, val_loss, text_loss)


def _loop(run: Begun, stop: Stop, after_step: Callable[[metrics.Row], None]) -> None:
    """Steps until the last. Interrupted on every rank at the same step, if one of them was asked to stop."""
    config, state, saver, r = run.config, run.state, run.saver, run.config.run
    rolled_back: Counter[int] = Counter()
    began = time.perf_counter()
    compiled_for = 0  # sequences in a micro-batch
    while state.step < r.steps:
        for step, micro_batches in _batches(run, range(state.step, r.steps)):
            began += run.evaluator.due(step)
            sequences = config.ramp.sequences(step)
            smaller = math.sqrt(sequences / config.batch_sequences)  # a smaller batch has a noisier gradient
            rate = smaller * optim.rate(step, r.steps, config.optim)
            limits = state.spikes.limits(r.spike_z) if r.spikes != "keep" else NO_LIMITS
            micro_batch = len(micro_batches[0][0]) if micro_batches else 0
            compiling = run.compiled and not state.is_sharded and micro_batch not in (0, compiled_for)
            outcome = train_step(run.loss_of, state, micro_batches, rate, stop, saver.is_due(), limits, compiling)
            compiled_for = micro_batch
            if outcome.stop:
                raise Interrupted
            seconds = time.perf_counter() - began
            state.advance(seconds)
            state.add_to_average()
            if outcome.applied:
                state.spikes.add(outcome.loss, outcome.norm)
            lr, tokens = rate * config.optim.lr, sequences * config.data.seq_len
            row = metrics.step_row(state.clock(), outcome.loss, outcome.norm, lr, seconds, tokens, config, run.peak_flops)
            first = state.first_sequence(step)
            run.recorder.step(row, outcome.applied, f"sequences {first:,} to {first + sequences - 1:,}")
            after_step(row)
            spike = not outcome.applied and math.isfinite(outcome.loss + outcome.norm)
            if spike and r.spikes == "rollback" and _rolled_back(run, rolled_back):
                break  # the steps from there on read other sequences
            if outcome.save or state.step % r.save_every == 0 or state.step == r.steps:
                saver.save(state)
                _remove_used_shards(run)
            began = time.perf_counter()


def _rolled_back(run: Begun, before: Counter[int]) -> bool:
    """Back to the last checkpoint, to go on behind the sequences that led to a spike. Without one the step was only skipped."""
    run.saver.wait()
    step = run.state.roll_back(run.config.folder)
    if step < 0:
        return False
    before[step] += 1
    if before[step] > ROLL_BACKS:
        raise metrics.Diverged(f"the run went back to step {step:,} {ROLL_BACKS} times and spiked again; lower the learning rate.")
    run.saver.taken_step = step
    start, end = run.state.excluded[-1]
    log.warning(f"went back to step {step:,}; sequences {start:,} to {end - 1:,} are passed over for good")
    return True


def _batches(run: Begun, steps: range) -> Iterator[tuple[int, list[MicroBatch]]]:
    """This rank's micro-batches of each step, read ahead and moved to the device by a thread; none if asked to stop meanwhile."""
    config, state, batches = run.config, run.state, run.batches
    device, world = state.rt.device, state.world
    most, _ = config.micro_batches(world.size)

    def load(step: int) -> tuple[int, list[MicroBatch]]:
        share = config.ramp.sequences(step) // world.size
        micro = max(n for n in range(1, most + 1) if share % n == 0)
        first = 0 if config.data.one_batch else state.first_sequence(step)
        rows = torch.from_numpy(batches.rows(first + world.rank * share, share))
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=device.type == "cuda")  # on MPS a copy from a temporary may read freed memory
        return step, [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(micro)]

    try:
        yield from prefetch(load, steps)
    except Stopped:  # in data that is still being prepared; the other ranks are told with this step's sum
        yield state.step, []


def _remove_used_shards(run: Begun) -> None:
    """Within a disk budget: shards that even the oldest checkpoint is past are not needed again."""
    config, folder = run.config, run.folder
    saved = checkpoint.steps(config.folder)
    if folder.growth is not None and folder.growth.leads and bytes_of(config.data.disk_budget) and saved:
        sequences = run.state.first_sequence(int(saved[0].name.removeprefix("step-")))
        remove_used(run.batches.shards, sequences, config.data.seq_len)


def _seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The global generator's seed for one forward pass: dropout is a function of these four numbers."""
    key = struct.pack("<4q", seed, step, micro_batch, rank)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
