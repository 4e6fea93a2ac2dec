"""Mean loss over fixed windows of text: the same figure on any device, at any batch, in any order of events."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from anew.data.batches import evaluation_windows
from anew.data.shards import Shard
from anew.model import GPT


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
def mean_loss(model: GPT, shards: Sequence[Shard], seq_len: int, limit_tokens: int, dtype: torch.dtype, batch: int) -> float:
    """Mean loss in nats a token over fixed windows (see `evaluation_windows`), summed in float64."""
    device = model.transformer.wte.weight.device
    total, count = 0.0, 0
    with computing_in(model, dtype):
        for ids, targets in evaluation_windows(shards, seq_len, limit_tokens, batch):
            scored = int((targets != -100).sum())
            loss = model(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
            total, count = total + loss.item() * scored, count + scored
    return total / count
