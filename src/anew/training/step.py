"""One optimizer step: forward and backward passes, sums over the ranks, clipping and the update.

    result = train_step(loss_of, state, micro_batches, rate=0.5, stop=stop)

`train_step` is used by training, by the benchmarks and by the tests; there is no second step
function.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anew.distributed.world import full_tensor
from anew.optim.build import set_learning_rates
from anew.optim.schedule import muon_momentum
from anew.training.train_state import TrainState
from anew.utils.signals import StopFlag

MicroBatch = tuple[Tensor, Tensor]  # token ids and targets, each (sequences, T) of int64
LossFunction = Callable[[Tensor, Tensor], Tensor]  # (ids, targets) -> mean loss
NO_LIMITS = (math.inf, math.inf)  # largest loss, largest gradient norm


@dataclass(frozen=True)
class StepResult:
    """The result of one step, the same on every rank."""

    loss: float  # mean over all tokens of the step, in nats
    grad_norm: float  # global norm before clipping; NaN if the step ended before it was known
    applied: bool  # False if weights and optimizer state were left unchanged
    stop: bool = False  # a rank was asked to stop, so the step was not applied
    save: bool = False  # a rank asks for a checkpoint
    rank_seconds: tuple[float, ...] = ()  # own work of each rank in the step before; 0: unknown


@dataclass(frozen=True)
class RankSums:
    """Values on the device that are the same on every rank after the exchange."""

    loss: Tensor  # mean over the ranks
    stop_requests: Tensor  # number of ranks that were asked to stop
    save_requests: Tensor  # number of ranks that ask for a checkpoint
    rank_seconds: Tensor  # (ranks,) own work of each rank in the step before; 0: unknown


def train_step(
    loss_of: LossFunction,
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    rate: float,
    stop: StopFlag,
    save: bool = False,
    limits: tuple[float, float] = NO_LIMITS,
    while_device_works: Callable[[], None] | None = None,
    divisors: Sequence[float] | None = None,
    after_first_pass: Callable[[Tensor], None] | None = None,
) -> StepResult:
    """Take one optimizer step over this rank's `micro_batches`.

    `rate` is the learning rate as a share of its peak. The loss of a step is the sum over its
    micro-batches of their mean losses, each divided by its entry in `divisors`, and the mean of
    these sums over the ranks. By default all divisors are the number of micro-batches, which gives
    the mean over all tokens if every micro-batch has equally many targets.

    Weights and optimizer state stay unchanged if the loss or the gradient norm is not finite or
    above `limits` (loss, norm), or if any rank was asked to stop. After a stop the loss scale of
    fp16 is unchanged too; after an overflow it is lowered.
    `save` is this rank's request for a checkpoint. `while_device_works` is called once, after the
    first micro-batch has been submitted to the device. `after_first_pass` is called with the loss
    of that micro-batch while the parameters have its gradients, before ranks exchange them. The
    gradients of a sharded model do not exist at that moment, so it must be None there.
    """
    assert after_first_pass is None or not state.is_sharded
    divisors = divisors or [len(micro_batches)] * len(micro_batches)
    local_loss = accumulate_gradients(
        loss_of, state, micro_batches, divisors, stop, while_device_works, after_first_pass
    )
    stop_here = stop.is_set()
    sums = all_reduce_gradients(state, local_loss, stop_here, save)
    if must_end_before_update(state, stop_here, sums.stop_requests):
        release_gradients(state)
        return StepResult(math.nan, math.nan, applied=False, stop=True)
    grad_norm = clip_gradients(state)
    is_finite = (grad_norm + sums.loss).isfinite()
    max_loss, max_norm = limits
    is_outlier = (sums.loss > max_loss) | (grad_norm > max_norm)
    skip = ~is_finite | is_outlier | (sums.stop_requests > 0)
    apply_update(state, skip, rate)
    release_gradients(state)
    return read_result(sums, grad_norm, skip)


def accumulate_gradients(
    loss_of: LossFunction,
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    divisors: Sequence[float],
    stop: StopFlag,
    while_device_works: Callable[[], None] | None,
    after_first_pass: Callable[[Tensor], None] | None,
) -> Tensor:
    """Run forward and backward passes over this rank's micro-batches.

    Return the sum of their losses, each divided by its divisor.
    """
    loss_sum = torch.zeros((), device=state.runtime.device)
    if state.buckets is not None:
        state.buckets.start_step()
    for index, ((ids, targets), divisor) in enumerate(zip(micro_batches, divisors, strict=True)):
        # FSDP exchanges data in every pass, so no rank of a sharded model may leave the loop early.
        if stop.is_set() and not state.is_sharded:
            break
        # Each pass has a seed of its own, so that a resumed run drops the same activations.
        if state.config.model.dropout > 0:
            seed = dropout_seed(state.config.run.seed, state.step, index, state.world.rank)
            torch.manual_seed(seed)
        is_last = index == len(micro_batches) - 1
        needs_own_gradients = index == 0 and after_first_pass is not None
        state.prepare_backward(is_last=is_last and not needs_own_gradients)
        loss = loss_of(ids, targets) / divisor
        # FSDP exchanges parameters in the forward pass, so the ranks wait for each other there.
        if is_last and not state.is_sharded:
            state.timer.stop()
        state.scaler.scale(loss).backward()
        loss_sum += loss.detach()
        if index == 0 and after_first_pass is not None:
            after_first_pass(loss)
        if index == 0 and while_device_works is not None:
            while_device_works()
    return loss_sum


def all_reduce_gradients(state: TrainState, loss: Tensor, stop: bool, save: bool) -> RankSums:
    """Average gradients and loss over all ranks, count the requests to stop and to save, and
    collect the ranks' times.
    """
    # Sharded gradients have no buckets: FSDP has averaged them in the backward pass.
    if state.buckets is not None:
        state.buckets.all_reduce()
    world = state.world
    # One exchange of all values takes less time than an exchange of each.
    shared = torch.zeros(3 + world.size, device=loss.device)
    shared[0] = loss
    shared[1] = float(stop)
    shared[2] = float(save)
    shared[3 + world.rank] = state.timer.seconds  # to which the others add zero
    world.all_reduce(shared)
    return RankSums(
        loss=shared[0] / world.size,
        stop_requests=shared[1],
        save_requests=shared[2],
        rank_seconds=shared[3:],
    )


def must_end_before_update(state: TrainState, stop_here: bool, stop_requests: Tensor) -> bool:
    """Return whether the step must end before the optimizer runs, because a rank was asked to stop.

    A single process reads its own flag. Several ranks compare the sum of the requests, so all of
    them decide alike; reading it waits for the device, which is done only with a GradScaler. There
    the step must end here, because the scaler creates its scale in the first backward pass, which a
    rank that stopped early has not run, and because `scaler.update` would change the scale after an
    incomplete step. Without a scaler, the ranks continue with `skip` set.
    """
    if state.world.size == 1:
        return stop_here
    return state.scaler.is_enabled() and stop_requests.item() > 0


def clip_gradients(state: TrainState) -> Tensor:
    """Scale the gradients down to the largest allowed global norm; return the norm before that."""
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.parameters, state.config.optim.clip)
    return full_tensor(norm)


def apply_update(state: TrainState, skip: Tensor, rate: float) -> None:
    """Update the weights at `rate` of the peak learning rate, unless `skip` is true."""
    config = state.config.optim
    set_learning_rates(state.optimizers, rate, muon_momentum(state.step, config))
    # `found_inf` is PyTorch's name for a flag on the device: fused AdamW, and Muon here, leave
    # weights and state alone where it is not zero, so the host does not wait for `skip`. The
    # optimizers on MPS, of sharded parameters, and the unfused ones do not read it.
    host_must_decide = (
        state.scaler.is_enabled()
        or state.is_sharded
        or skip.device.type == "mps"
        or not config.fused
    )
    must_skip = host_must_decide and skip.item()
    if not must_skip:
        for optimizer in state.optimizers:
            if not host_must_decide:
                optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            state.scaler.step(optimizer)
    state.scaler.update()


def release_gradients(state: TrainState) -> None:
    """Drop the gradients of a finished step.

    Gradient buckets keep their memory for the next step.
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)


def read_result(sums: RankSums, grad_norm: Tensor, skip: Tensor) -> StepResult:
    """Copy the values of a step to the host. Only here does the host always wait for the device."""
    values = [sums.loss, grad_norm, skip.float(), sums.stop_requests, sums.save_requests]
    on_host = torch.cat([torch.stack(values), sums.rank_seconds]).tolist()
    loss, norm, skipped, stop_requests, save_requests, *rank_seconds = on_host
    return StepResult(
        loss,
        norm,
        applied=not skipped,
        stop=stop_requests > 0,
        save=save_requests > 0,
        rank_seconds=tuple(rank_seconds),
    )


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the seed of one forward pass, so that dropout is a function of these four numbers."""
    key = struct.pack("<4q", seed, step, micro_batch, rank)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits, because a seed is a signed integer
