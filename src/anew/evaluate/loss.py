"""Mean loss over fixed windows of text: the same figure on any device, at any batch, in any order of events."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from anew.data.dataloader import evaluation_windows
from anew.data.shards import Shard
from anew.distributed.world import ALONE, World
from anew.errors import Preempted
from anew.model.gpt import GPT


@contextmanager
def computing_in(model: GPT, dtype: torch.dtype) -> Iterator[None]:
    """In evaluation mode and in `dtype` inside the block; afterwards as before."""
    before, was_training = model.compute_dtype, model.training
    model.compute_dtype = dtype
    model.eval()
    try:
        yield
    finally:
        model.compute_dtype = before
        model.train(was_training)


@torch.no_grad()
def mean_loss(
    model: GPT,
    shards: Sequence[Shard],
    seq_len: int,
    limit_tokens: int,
    dtype: torch.dtype,
    batch: int,
    world: World = ALONE,
    stop: threading.Event | None = None,
) -> float:
    """Mean loss in nats a token over fixed windows (see `evaluation_windows`), summed in float64 and in their order.

    Ranks take the batches in turn, so any number of them finds the same. Interrupted, on all of them, if `stop` is set on one.
    """
    device = model.transformer.wte.weight.device
    mine: dict[int, tuple[float, int]] = {}
    with computing_in(model, dtype):
        for i, (ids, targets) in enumerate(
            evaluation_windows(shards, seq_len, limit_tokens, batch)
        ):
            if stop is not None and stop.is_set():
                break
            if i % world.size == world.rank:
                scored = int((targets != -100).sum())
                loss = model(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
                mine[i] = loss.item() * scored, scored
    shares = world.gather((mine, stop is not None and stop.is_set()))
    if any(stopped for _, stopped in shares):
        raise Preempted("the evaluation was stopped")
    everywhere = {i: part for share, _ in shares for i, part in share.items()}
    total = sum(everywhere[i][0] for i in range(len(everywhere)))
    return total / sum(scored for _, scored in everywhere.values())
