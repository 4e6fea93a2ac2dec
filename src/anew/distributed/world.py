"""The processes (ranks) of one run, and the values that they exchange.

    torchrun --standalone --nproc-per-node 8 -m anew train gpt2-124m

Each rank computes its share of every batch. Once a step, the gradients (`gradient_buckets.py`),
the loss and the requests to stop or to save are summed over all ranks. A single process is a world
of one rank, which exchanges nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from anew.errors import LostRank, UserError

T = TypeVar("T")
Gather = Callable[
    [Any], list[Any]
]  # a value of this rank -> the values of all ranks, in their order


def gather_alone(value: Any) -> list[Any]:
    """Return the values of all ranks where there is one rank."""
    return [value]


@dataclass(frozen=True)
class World:
    """The ranks of one run, as seen by one of them."""

    rank: int = 0
    size: int = 1
    gather: Gather = gather_alone
    local_rank: int = 0  # number of this rank on its machine
    gather_patiently: Gather = (
        gather_alone  # with a long timeout: other ranks may prepare data meanwhile
    )

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks, the same bits on every rank.

        Raises LostRank.
        """
        if self.size == 1:
            return
        with naming_lost_ranks(self.rank):
            distributed.all_reduce(tensor)

    def divide_rows(
        self, rows: Tensor, work: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Return `work(rows)`, where each rank computes its share of the rows and receives the
        others.

        `work` keeps the shape, treats each row by itself and returns `dtype`. Raises LostRank.
        """
        if self.size == 1:
            return work(rows)
        share = -(-len(rows) // self.size)  # rounded up
        mine = rows[self.rank * share : (self.rank + 1) * share]
        # Ranks whose share lies behind the last row send zeros.
        done = torch.zeros(share, *rows.shape[1:], dtype=dtype, device=rows.device)
        if len(mine) > 0:
            done[: len(mine)] = work(mine)
        gathered = torch.empty(self.size * share, *rows.shape[1:], dtype=dtype, device=rows.device)
        with naming_lost_ranks(self.rank):
            # PyTorch 2.13 has renamed the function.
            new_name = getattr(distributed, "all_gather_single", None)
            all_gather = new_name or distributed.all_gather_into_tensor
            all_gather(gathered, done)
        return gathered[: len(rows)]

    def run_on_all_ranks(
        self, work: Callable[[], T], first: Callable[["World"], bool] | None = None
    ) -> T:
        """Return `work()`, called on every rank. A UserError on one rank is raised on all of them.

        Ranks for which `first` is true finish before the others begin.
        """
        if first is None:
            return self._run_together(work, self.gather)
        result: T | None = None
        is_first = first(self)
        for turn in (True, False):
            if is_first == turn:
                result = self._run_together(work, self.gather_patiently)
            else:
                self._run_together(lambda: None, self.gather_patiently)
        return result  # type: ignore[return-value]

    def _run_together(self, work: Callable[[], T], gather: Gather) -> T:
        """Call `work`, and raise the first UserError that any rank has met."""
        result: T | None = None
        problem = ""
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        problems = [text for text in gather(problem) if text]
        if problems:
            raise UserError(problems[0], on_every_rank=True)
        return result  # type: ignore[return-value]


ALONE = World()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor from one that may be sharded over the ranks.

    Every rank must call this.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, full: Tensor, source: int | None = None) -> Tensor:
    """Shard `full` as `tensor` is sharded. Every rank has `full`, or only the rank `source`."""
    if not hasattr(tensor, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    mesh = sharded.device_mesh
    return distribute_tensor(full, mesh, sharded.placements, src_data_rank=source)


@contextlib.contextmanager
def naming_lost_ranks(rank: int) -> Iterator[None]:
    """Turn the error of a collective into LostRank, with a sentence that says what happened."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRank(
            f"rank {rank} lost another rank and ends; the run goes on from its last checkpoint "
            f"({reason})."
        ) from error
