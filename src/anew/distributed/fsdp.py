"""Weights, gradients and optimizer state sharded over the ranks (PyTorch's FSDP2):

`--parallel fsdp`.

    shard(model, torch.bfloat16)            # parameters become DTensors; each rank has a part
    with whole_model(model) as whole:       # whole fp32 weights on every rank, to evaluate with
        ...

It is for models that do not fit on one GPU. GPT-2 1558M needs 25 GB for fp32 weights, gradients and
AdamW's moments on one GPU and 6.2 GB per GPU on four; 10.9 GB where micro-batches are accumulated,
because their gradients stay whole until the last one. A checkpoint has the same content in both
modes, so a run may change from one to the other.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from anew.distributed.world import World, full_tensor, shard_like
from anew.model.gpt import GPT


def shard(model: GPT, dtype: torch.dtype) -> None:
    """Shard each block by itself, so that it is gathered only while it computes, and then the rest.

    Blocks are gathered in `dtype`, in which they compute anyway: half the bytes in bf16. Their
    layer norms therefore see weights rounded to it. The embeddings, whose rows are added in fp32,
    are gathered in fp32, and all gradients are summed in fp32.
    """
    # The import takes 0.7 seconds.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    gathered = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    fully_shard(model)


def reduce_gradients(model: nn.Module, enabled: bool) -> None:
    """Choose whether the next backward passes sum gradients over the ranks.

    This is needed only in the last micro-batch of a step.
    """
    sharded: Any = model
    sharded.set_requires_gradient_sync(enabled)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has been applied to `model`."""
    return hasattr(model, "reshard")


def after_failed_pass(model: nn.Module) -> None:
    """Make a model usable again after an error in a pass, such as a lack of memory."""
    if not is_sharded(model):
        return
    sharded: Any = model
    if hasattr(sharded, "reset_iter_state"):  # not in every PyTorch from 2.11 on
        sharded.reset_iter_state()
    sharded.reshard()


@contextmanager
def whole_model(model: GPT) -> Iterator[GPT]:
    """Give the model with whole fp32 weights on every rank, to evaluate and to sample with.

    A sharded model is copied, which costs the memory of a whole model. Inside the block nothing is
    exchanged: FSDP's own modules remember the order of forward passes, so ranks that evaluate
    different amounts would exchange different tensors in the next step. Compiled blocks run
    eagerly, because each shape of batch would otherwise be compiled anew.
    """
    with eager_blocks(model):
        yield copy_with_whole_weights(model) if is_sharded(model) else model


def copy_with_whole_weights(model: GPT) -> GPT:
    """Return a copy of a sharded model that has whole weights."""
    with torch.device("meta"):
        copy = GPT(model.config, model.compute_dtype, seed=None)
    for name, parameter in model.named_parameters():
        module_name, _, attribute = name.rpartition(".")
        value = nn.Parameter(full_tensor(parameter.detach()), requires_grad=False)
        setattr(copy.get_submodule(module_name), attribute, value)
    copy.train(model.training)
    return copy


def eager_blocks(model: GPT) -> contextlib.AbstractContextManager[Any]:
    """Run blocks that were compiled one by one eagerly inside the block.

    For other models this does not import the compiler, which takes seconds.
    """
    if model.transformer.h[0]._compiled_call_impl is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def fill(target: Tensor, value: Tensor | None, world: World) -> None:
    """Copy `value`, which only rank 0 has, to `target` on every rank; `target` may be sharded."""
    if world.size == 1:
        target.copy_(cast(Tensor, value))
        return
    if value is None:
        full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    else:
        full = value.to(target.device, target.dtype)
    if hasattr(target, "full_tensor"):
        part = shard_like(target, full, source=0)
        target.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    else:
        full = full.contiguous()
        distributed.broadcast(full, 0)
        target.copy_(full)
