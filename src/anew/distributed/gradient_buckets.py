"""Sums gradients over all ranks in one bucket per block, while the backward pass still runs.

    buckets = GradientBuckets(gradient_groups(model), world)
    buckets.start_step()                   # every p.grad is now a zeroed view of its bucket
    for micro_batch in micro_batches:
        if micro_batch is the last one:
            buckets.start_when_ready()     # from here on, hooks start the all-reduce of a bucket
        model(*micro_batch).backward()
    buckets.all_reduce()                   # starts what has not started, and waits

The backward pass computes the gradients of the last block first, so the exchange of a block runs
while the blocks before it are still being computed. The embeddings are ready last; the exchange of
their bucket (31% of the bytes of 124M, 5% of 1558M) cannot be overlapped with computation.

`torch.nn.parallel.DistributedDataParallel` overlaps as well, but it lays its buckets out again
after the first step of a process. From three ranks on, a resumed run would then add in another
order than the run that it continues. Here the buckets and the order in which they start follow
from the model alone: bucket k starts only after bucket k - 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from anew.distributed.world import World, naming_lost_ranks
from anew.model.gpt import GPT


def gradient_groups(model: GPT) -> list[list[nn.Parameter]]:
    """Return the parameters by bucket, in the order in which a backward pass completes them."""
    groups = [list(block.parameters()) for block in reversed(list(model.transformer.h))]
    in_blocks = {parameter for group in groups for parameter in group}
    groups.append([parameter for parameter in model.parameters() if parameter not in in_blocks])
    return groups


class GradientBuckets:
    """The gradients of one model replica, in flat buffers that are summed over all ranks."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], world: World) -> None:
        self.groups = [list(group) for group in groups]
        self.world = world
        self.flat: list[Tensor] = []
        self.views: list[list[Tensor]] = []
        self.missing: list[int] = []  # the number of gradients that each bucket still waits for
        self.started: list[
            Any
        ] = []  # the all-reduces that have started, in the order of the buckets
        self.may_start = False
        for index, group in enumerate(self.groups):
            hook = self._hook_of_bucket(index)
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(hook)

    def start_step(self) -> None:
        """Make every gradient a zeroed view of its bucket.

        A rank that is asked to stop before its first micro-batch therefore takes part in the
        exchange with real zero gradients on the device, like a rank that computed some.
        """
        if not self.flat:
            self._allocate()
        torch._foreach_zero_(self.flat)
        for group, views in zip(self.groups, self.views, strict=True):
            for parameter, view in zip(group, views, strict=True):
                parameter.grad = view
        self.started = []
        self.may_start = False

    def start_when_ready(self) -> None:
        """Let the next backward pass, the last of the step, start the buckets it completes."""
        self.missing = [len(group) for group in self.groups]
        self.may_start = True

    def all_reduce(self) -> None:
        """Replace every gradient by its mean over the ranks. Raises LostRank if a rank is gone."""
        self.may_start = False
        with naming_lost_ranks(self.world.rank):
            while len(self.started) < len(self.groups):
                self._start_next()
            for work in self.started:
                work.wait()
        torch._foreach_div_(self.flat, self.world.size)
        self.started = []

    def _allocate(self) -> None:
        for group in self.groups:
            sizes = [parameter.numel() for parameter in group]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=group[0].device)
            self.flat.append(flat)
            parts = flat.split(sizes)
            views = [part.view_as(p) for p, part in zip(group, parts, strict=True)]
            self.views.append(views)

    def _hook_of_bucket(self, index: int) -> Callable[[Tensor], None]:
        """Return the function that autograd calls when a gradient of this bucket is complete."""

        def hook(_: Tensor) -> None:
            if not self.may_start:
                return
            self.missing[index] -= 1
            with naming_lost_ranks(self.world.rank):
                while self._next_is_complete():
                    self._start_next()

        return hook

    def _next_is_complete(self) -> bool:
        index = len(self.started)
        return index < len(self.groups) and self.missing[index] == 0

    def _start_next(self) -> None:
        bucket = self.flat[len(self.started)]
        self.started.append(distributed.all_reduce(bucket, async_op=True))
