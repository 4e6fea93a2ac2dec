"""Mean loss over fixed windows of text: the same figure on any device, at any batch, in any order of events."""

from collections.abc import Sequence

import torch

from anew.data.batches import evaluation_windows
from anew.data.shards import Shard
from anew.model import GPT


@torch.no_grad()
def mean_loss(model: GPT, shards: Sequence[Shard], seq_len: int, limit_tokens: int, dtype: torch.dtype, batch: int) -> float:
    """Mean loss in nats a token over fixed windows (see `evaluation_windows`), summed in float64."""
    device, before, was_training = model.transformer.wte.weight.device, model.compute_dtype, model.training
    model.compute_dtype = dtype
    model.eval()
    total, count = 0.0, 0
    try:
        for ids, targets in evaluation_windows(shards, seq_len, limit_tokens, batch):
            scored = int((targets != -100).sum())
            loss = model(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
            total, count = total + loss.item() * scored, count + scored
    finally:
        model.compute_dtype = before
        model.train(was_training)
    return total / count
