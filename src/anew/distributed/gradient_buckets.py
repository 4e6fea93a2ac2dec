"""Sums gradients over all ranks in one bucket for each block, while the backward pass still runs.

    buckets = GradientBuckets(gradient_groups(model), world)
    buckets.start_step()                   # every p.grad is now a zeroed view of its bucket
    for micro_batch in micro_batches:
        if micro_batch is the last one:
            buckets.start_when_ready()     # from here on, hooks start the all-reduce of a bucket
        loss_of(*micro_batch).backward()
    buckets.all_reduce()                   # starts what has not started, and waits

The backward pass computes the gradients of the last block first, so the exchange of a block runs
while the blocks before it are still being computed. The embeddings are ready last; their bucket
(31% of the bytes of 124M, 5% of 1558M) is the part that nothing can hide.

`torch.nn.parallel.DistributedDataParallel` overlaps as well, but it lays its buckets out again
after the first step of a process. From three ranks on, a resumed run would then add in another
order than the run that it continues. Here the buckets and the order in which they start follow
from the model alone: bucket k starts only after bucket k - 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from anew.distributed.world import World, naming_lost_ranks
from anew.model.gpt import GPT


def gradient_groups(model: GPT) -> list[list[nn.Parameter]]:
    """Parameters by bucket, in the order in which a backward pass completes their gradients."""
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
        self.missing: list[int] = []  # gradients that each bucket still waits for
        self.works: list[Any] = []  # all-reduces that have started, in the order of the buckets
        self.is_armed = False
        for index, group in enumerate(self.groups):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._hook_of(index))

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
        self.works = []
        self.is_armed = False

    def start_when_ready(self) -> None:
        """Let the next backward pass, the last of this step, start the buckets that it completes."""
        self.missing = [len(group) for group in self.groups]
        self.is_armed = True

    def all_reduce(self) -> None:
        """Replace every gradient by its mean over the ranks. Raises LostRank if a rank is gone."""
        self.is_armed = False
        with naming_lost_ranks(self.world.rank):
            while len(self.works) < len(self.groups):
                self._start_next()
            for work in self.works:
                work.wait()
        torch._foreach_div_(self.flat, self.world.size)
        self.works = []

    def _allocate(self) -> None:
        for group in self.groups:
            sizes = [parameter.numel() for parameter in group]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=group[0].device)
            parts = zip(group, flat.split(sizes), strict=True)
            self.flat.append(flat)
            self.views.append([part.view_as(parameter) for parameter, part in parts])

    def _hook_of(self, index: int) -> Any:
        def hook(_: Tensor) -> None:
            if not self.is_armed:
                return
            self.missing[index] -= 1
            with naming_lost_ranks(self.world.rank):
                while len(self.works) < len(self.groups) and self.missing[len(self.works)] == 0:
                    self._start_next()

        return hook

    def _start_next(self) -> None:
        self.works.append(distributed.all_reduce(self.flat[len(self.works)], async_op=True))
