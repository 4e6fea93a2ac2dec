"""The micro-batches of each step: token ids and targets of this rank, on its device.

    for batch in batches_of_steps(run, range(state.step, config.run.steps)):
        train_step(loss_of, state, batch.micro_batches, ..., divisors=batch.divisors)

A step of all ranks reads the same sequences whatever the number of ranks and the micro-batch are:
each rank has consecutive sequences of the batch, in the order of the ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anew.data.conversations import Conversations
from anew.data.dataloader import NOT_SCORED, DataLoader
from anew.data.dataset import Stopped
from anew.data.read_ahead import prefetch
from anew.training.setup import Run
from anew.training.step import MicroBatch


class Batch(NamedTuple):
    """This rank's part of the batch of a step."""

    micro_batches: list[MicroBatch]
    n_tokens: int  # inputs of the step, over all ranks
    divisors: list[float]  # of the mean losses of the micro-batches; see `train_step`


def batches_of_steps(run: Run, steps: range) -> Iterator[Batch]:
    """Yield this rank's part of each step, read ahead and moved to the device by a thread.

    A rank that is asked to stop while it waits for data gets blank micro-batches. It must take part
    in the step, where the other ranks learn of the request; the step is not applied.
    """
    nominal_tokens = run.config.batch_sequences * run.config.data.seq_len

    def load(step: int) -> Batch:
        if isinstance(run.batches, Conversations):
            return conversations_of(run, run.batches, step)
        try:
            micro_batches = micro_batches_of(run, run.batches, step)
        except Stopped:
            micro_batches = blank_micro_batches(run)
        count = len(micro_batches)
        return Batch(micro_batches, nominal_tokens, divisors=[count] * count)

    return prefetch(load, steps)


def conversations_of(run: Run, conversations: Conversations, step: int) -> Batch:
    """Read this rank's conversations of `step`.

    Their micro-batches have different numbers of targets. With these divisors the loss of the step
    is the mean over all its targets, whatever the micro-batches and ranks are.
    """
    config = run.config
    world = run.state.world
    device = run.state.runtime.device
    share = config.batch_sequences // world.size
    first = step * config.batch_sequences
    n_inputs, n_targets = conversations.sizes(first, config.batch_sequences)
    rows = conversations.micro_batches(
        first + world.rank * share,
        share,
        micro_batch_size(run),
        # The ranks of a sharded model must run equally many passes.
        equal_groups=run.state.is_sharded,
    )
    micro_batches = []
    divisors = []
    for ids, targets in rows:
        ids_here = torch.from_numpy(ids).to(device)
        targets_here = torch.from_numpy(targets).to(device)
        micro_batches.append((ids_here, targets_here))
        n_scored = int((targets != NOT_SCORED).sum())
        divisors.append(n_targets / (world.size * n_scored))
    return Batch(micro_batches, n_inputs, divisors)


def micro_batches_of(run: Run, batches: DataLoader, step: int) -> list[MicroBatch]:
    """Read this rank's micro-batches of `step`: consecutive sequences of the batch."""
    config = run.config
    world = run.state.world
    device = run.state.runtime.device
    share = config.batch_sequences // world.size
    first = 0 if config.data.one_batch else step * config.batch_sequences
    rows = torch.from_numpy(batches.rows(first + world.rank * share, share))
    # Only a copy from pinned memory may run in the background; on MPS the source of such a copy
    # may be freed too early.
    is_cuda = device.type == "cuda"
    if is_cuda:
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=is_cuda)  # (share, T + 1)
    return [split_targets(part) for part in rows.split(micro_batch_size(run))]


def split_targets(rows: Tensor) -> MicroBatch:
    """Split rows (B, T + 1) into token ids and, one position later, targets, each (B, T)."""
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def blank_micro_batches(run: Run) -> list[MicroBatch]:
    """Return the micro-batches of a step with all ids and targets 0."""
    micro_batch = micro_batch_size(run)
    share = run.config.batch_sequences // run.state.world.size
    shape = (micro_batch, run.config.data.seq_len)
    ids = torch.zeros(shape, dtype=torch.int64, device=run.state.runtime.device)
    return [(ids, ids)] * (share // micro_batch)


def micro_batch_size(run: Run) -> int:
    """Return the number of sequences in a micro-batch of this rank."""
    micro_batch, _ = run.config.micro_batches(run.state.world.size)
    return micro_batch
