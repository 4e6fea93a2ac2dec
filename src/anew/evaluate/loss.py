"""Compute the mean loss of a model over fixed windows of text.

    batches = evaluation_windows(shards, seq_len=1024, limit_tokens=1_000_000, batch=8)
    loss = mean_loss(model, batches, dtype=torch.float32)

The sum is made in the order of the windows, so the loss is the same for any number of ranks.
Another device or batch size changes it by rounding only.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from anew.data.dataloader import Pair
from anew.distributed.world import ALONE, World
from anew.errors import Preempted
from anew.model.gpt import GPT

MASKED = -100  # the target of tokens that are context only, which `evaluation_windows` sets


@contextmanager
def activation_dtype(model: GPT, dtype: torch.dtype) -> Iterator[None]:
    """Put the model in evaluation mode and make it compute in `dtype`, until the block ends."""
    dtype_before = model.compute_dtype
    was_training = model.training
    model.compute_dtype = dtype
    model.eval()
    try:
        yield
    finally:
        model.compute_dtype = dtype_before
        model.train(was_training)


@torch.no_grad()
def mean_loss(
    model: GPT,
    batches: Iterable[Pair],
    dtype: torch.dtype,
    world: World = ALONE,
    stop: threading.Event | None = None,
) -> float:
    """Return the mean loss in nats per target over batches of inputs and targets, each (B, T).

    Batches are divided over the ranks in turn, and their losses are summed in float64. Raises
    Preempted on every rank if `stop` is set on one of them.
    """
    device = model.transformer.wte.weight.device
    sums: dict[int, tuple[float, int]] = {}  # batch number -> sum of losses, tokens in the sum
    with activation_dtype(model, dtype):
        for number, (ids, targets) in enumerate(batches):
            if stop is not None and stop.is_set():
                break
            if number % world.size != world.rank:
                continue
            n_tokens = int((targets != MASKED).sum())
            loss = model(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
            sums[number] = loss.item() * n_tokens, n_tokens
    stopped = stop is not None and stop.is_set()
    shares = world.gather((sums, stopped))
    if any(share_stopped for _, share_stopped in shares):
        raise Preempted("the evaluation was stopped")
    all_sums: dict[int, tuple[float, int]] = {}
    for share, _ in shares:
        all_sums |= share
    total_loss = sum(all_sums[number][0] for number in range(len(all_sums)))
    total_tokens = sum(n_tokens for _, n_tokens in all_sums.values())
    return total_loss / total_tokens
