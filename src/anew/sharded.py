"""Weights, gradients and moments cut over the ranks (torch's FSDP2), for models that do not fit on one card: `--parallel fsdp`.

    shard(model)                        # each parameter is now a DTensor, of which this rank holds a part
    with gathered(model): ...           # inside, whole weights on every rank, which may go their own ways
    parallel.whole(parameter)           # all of it, on every rank

GPT-2 1558M needs 25 GB for fp32 weights, gradients and AdamW's moments on one card, and 6.2 GB a card on four. What a checkpoint holds
is the same in both modes, so a run may change from one to the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from anew.model import GPT
from anew.parallel import World, cut_like


def shard(model: GPT) -> None:
    """Cut each block on its own (it is put together only while it computes), then what is around the blocks."""
    from torch.distributed.fsdp import fully_shard  # takes 0.7 s, so not for everybody

    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Has `shard` been here?"""
    return hasattr(model, "reshard")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, without any exchange inside the block; costs a whole model's memory."""
    parts: list[Any] = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@torch.no_grad()
def fill(target: Tensor, value: Tensor | None, world: World) -> None:
    """Give `target`, cut or not, the `value` that rank 0 has."""
    if world.size == 1:
        target.copy_(cast(Tensor, value))
        return
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device) if value is None else value.to(target.device, target.dtype)
    if hasattr(target, "full_tensor"):
        target.to_local().copy_(cut_like(target, full, source=0).to_local())  # type: ignore[attr-defined]
    else:
        full = full.contiguous()
        distributed.broadcast(full, 0)
        target.copy_(full)
