"""Weights, gradients and moments sharded over the ranks (torch's FSDP2), for models that do not fit on one card: `--parallel fsdp`.

    shard(model, torch.bfloat16)        # each parameter is now a DTensor, of which this rank holds a shard
    with whole_model(model) as whole: ...       # whole weights in fp32 on every rank, without any exchange inside
    parallel.whole(parameter)           # one whole parameter, on every rank

GPT-2 1558M needs 25 GB for fp32 weights, gradients and AdamW's moments on one card, and 6.2 GB a card on four; 10.9 GB where micro-batches
are accumulated, whose gradients stay whole until the last. What a checkpoint holds is the same in both modes, so a run may change from one
to the other.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from anew.distributed.world import World, cut_like, whole
from anew.model.gpt import GPT


def shard(model: GPT, dtype: torch.dtype) -> None:
    """Shard each block by itself (it is gathered only while it computes), then what is around the blocks.

    Blocks are gathered in `dtype`, in which they compute in any case: half the bytes in bf16. Their layer norms see weights rounded
    to it. The embeddings, whose rows are added in fp32, are gathered in fp32, and all gradients are summed in fp32.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
    )  # takes 0.7 s, so it is imported only here

    gathered = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model)


def reduce_gradients(model: nn.Module, wanted: bool) -> None:
    """Should the next backward passes sum gradients over the ranks? Before the last micro-batch of a step they need not."""
    part: Any = model
    part.set_requires_gradient_sync(wanted)


def is_sharded(model: nn.Module) -> bool:
    """Has `shard` been applied to this model?"""
    return hasattr(model, "reshard")


def after_failed_pass(model: nn.Module) -> None:
    """Make a model usable again after an error in a forward or backward pass, such as too little memory."""
    part: Any = model
    if is_sharded(model):
        if hasattr(part, "reset_iter_state"):  # not in every torch from 2.11 on
            part.reset_iter_state()
        part.reshard()


@contextmanager
def whole_model(model: GPT) -> Iterator[GPT]:
    """The model with whole weights in fp32, to evaluate and to sample with, each rank for itself.

    A sharded model is copied, which costs the memory of a whole model and exchanges nothing inside the block. FSDP's own modules
    remember the order of forward passes, so ranks that evaluate different amounts would exchange different things in the next step.
    Compiled blocks run eagerly inside: each shape of batch would otherwise be compiled anew.
    """
    with _eager_blocks(model):
        if not is_sharded(model):
            yield model
            return
        with torch.device("meta"):
            copy = GPT(model.config, model.compute_dtype, seed=None)
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            value = nn.Parameter(whole(parameter.detach()), requires_grad=False)
            setattr(copy.get_submodule(module), kind, value)
        copy.train(model.training)
        yield copy


def _eager_blocks(model: GPT) -> contextlib.AbstractContextManager[Any]:
    """Run blocks that were compiled one by one eagerly inside. For other models this does not import the compiler, which takes seconds."""
    if model.transformer.h[0]._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def fill(target: Tensor, value: Tensor | None, world: World) -> None:
    """Give `target`, sharded or not, the `value` that rank 0 has."""
    if world.size == 1:
        target.copy_(cast(Tensor, value))
        return
    full = (
        torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if value is None
        else value.to(target.device, target.dtype)
    )
    if hasattr(target, "full_tensor"):
        target.to_local().copy_(cut_like(target, full, source=0).to_local())  # type: ignore[attr-defined]
    else:
        full = full.contiguous()
        distributed.broadcast(full, 0)
        target.copy_(full)
