"""The processes of one job (ranks): how they find each other, and what they exchange.

    torchrun --standalone --nproc-per-node 8 -m anew train gpt2-124m

Each rank computes its share of every batch. Once a step, gradients (`gradient_buckets`), the loss and
the requests to stop or to save are summed over all ranks.
"""

import contextlib
import ctypes
import datetime
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from anew.errors import LostRank, UserError
from anew.utils.signals import signal_this_process

T = TypeVar("T")


PREFLIGHT_BYTES = 64 << 20  # exchanged once before training, to measure the link
PARENT_SECONDS = 1.0
START_UP_TIMEOUT = datetime.timedelta(
    hours=12
)  # downloading and tokenising the first shard may take long


@dataclass(frozen=True)
class World:
    """The processes that share one job; `gather` collects one value of each rank on all, in rank order. One rank exchanges nothing."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    local_rank: int = 0
    gather_patiently: Callable[[Any], list[Any]] = lambda value: [
        value
    ]  # where others work for long, such as preparing data

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks, the same bits on every rank. Raises LostRank."""
        if self.size == 1:
            return
        with naming_lost_ranks(self.rank):
            distributed.all_reduce(tensor)

    def divide(self, rows: Tensor, work: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """`work(rows)` in `dtype`, each rank doing its share of the rows; `work` keeps their shape and treats each by itself.

        The results are exchanged in `dtype`, which is that of `work`'s result. Raises LostRank.
        """
        if self.size == 1:
            return work(rows)
        share = -(-len(rows) // self.size)
        mine = rows[self.rank * share : (self.rank + 1) * share]
        done = torch.zeros(
            share, *rows.shape[1:], dtype=dtype, device=rows.device
        )  # ranks behind the last row send zeros
        if len(mine):
            done[: len(mine)] = work(mine)
        every = torch.empty(self.size * share, *rows.shape[1:], dtype=dtype, device=rows.device)
        with naming_lost_ranks(self.rank):
            distributed.all_gather_into_tensor(every, done)
        return every[: len(rows)]

    def everywhere(
        self, work: Callable[[], T], first: Callable[["World"], bool] | None = None
    ) -> T:
        """`work()` on every rank. If it fails on one with a UserError, all raise that. Ranks that are `first` go before the others."""
        done: list[T] = []
        problem = ""
        for turn in (True, False) if first else (True,):
            if first is None or first(self) == turn:
                try:
                    done.append(work())
                except UserError as error:
                    problem = str(error)
            gather = self.gather_patiently if first else self.gather
            if problems := [p for p in gather(problem) if p]:
                raise UserError(problems[0], on_every_rank=True)
        return done[0]


ALONE = World()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over the ranks; every rank has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut_like(tensor: Tensor, full: Tensor, source: int | None = None) -> Tensor:
    """`full`, which every rank has (or only the `source`), cut as `tensor` is."""
    if not hasattr(tensor, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    part: Any = tensor
    return distribute_tensor(full, part.device_mesh, part.placements, src_data_rank=source)


@contextlib.contextmanager
def naming_lost_ranks(rank: int) -> Iterator[None]:
    """Turn what torch raises in a collective into LostRank, a sentence that says what happened."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise LostRank(
            f"rank {rank} lost another rank and ends; the run goes on from its last checkpoint ({why})."
        ) from error


def _store(size: int, timeout: datetime.timedelta) -> Store | None:
    """The elastic agent's store, under a name that only this start of the ranks has; None where torch makes one.

    torch 2.13 gives restarted ranks the store of those before them, with the addresses where the dead ones listened. So rank 0 names each
    start, and the others answer until they find themselves in its list: an old list does not have them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, me = int(os.environ["RANK"]), uuid.uuid4().hex
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    if rank == 0:
        store.set("anew", me)
        present = [store.get(f"anew/{me}/{other}").decode() for other in range(1, size)]
        store.set(f"anew/{me}", " ".join(present))
        return PrefixStore(me, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("anew").decode()
        store.set(f"anew/{start}/{rank}", me)
        if store.check([f"anew/{start}"]) and me in store.get(f"anew/{start}").decode().split():
            return PrefixStore(start, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 did not come")


@contextlib.contextmanager
def joined(device: str = "cpu", timeout_seconds: float = 1800) -> Iterator[World]:
    """The world that torchrun started, for as long as the block runs; a single process is a world of one.

    Tensors are exchanged by the backend of their `device` (NCCL for "cuda"), plain values by gloo. A rank that the others have waited
    for `timeout_seconds` is taken for lost.
    """
    size = _environment()
    if size == 1:
        yield ALONE
        return
    _end_with_parent()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = _store(size, timeout)
        backend, rank = distributed.get_default_backend_for_device(device), int(os.environ["RANK"])
        distributed.init_process_group(
            backend, timeout=timeout, rank=rank, world_size=size, store=store
        )
        control = distributed.new_group(backend="gloo", timeout=timeout)
        start_up = distributed.new_group(backend="gloo", timeout=max(timeout, START_UP_TIMEOUT))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        what = str(error).splitlines()[0]
        raise UserError(
            f"rank {os.environ['RANK']} of {size} could not meet the others at {host}:{port} ({what}); is the port free and open between "
            "the machines, and were all ranks started?"
        ) from error

    def gather_in(group: Any, value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        with naming_lost_ranks(rank):
            distributed.all_gather_object(values, value, group=group)
        return values

    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    try:
        yield World(
            rank, size, partial(gather_in, control), local_rank, partial(gather_in, start_up)
        )
    finally:
        distributed.destroy_process_group()


def _environment() -> int:
    """How many ranks torchrun has started, checked."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if (
        missing
        or not size.isdigit()
        or not os.environ["RANK"].isdigit()
        or int(os.environ["RANK"]) >= int(size)
    ):
        lacking = f"{missing[0]} is missing" if missing else f"RANK is {os.environ['RANK']}"
        raise UserError(
            f"WORLD_SIZE is {size}, and {lacking}; start the processes with torchrun, or unset WORLD_SIZE."
        )
    return int(size)


def _end_with_parent() -> None:
    """Ask this process to stop when the agent that started it is gone, so that nothing is left computing on its own."""
    parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        signal_this_process(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def preflight(
    world: World, device: torch.device, facts: dict[str, str], gradient_bytes: int
) -> str:
    """Refuse ranks that do not fit together; a line that says what sharing the gradients costs. `facts` must be the same on all ranks."""
    mine = {**facts, "machine": socket.gethostname()}
    all_ranks = world.gather(mine)
    for key in facts:
        if len({found[key] for found in all_ranks}) > 1:
            listed = ", ".join(
                f"rank {rank} has {found[key]}" for rank, found in enumerate(all_ranks[:4])
            )
            raise UserError(
                f"the ranks differ in {key}: {listed}; start all of them with the same command and the same software."
            )
    tensor = torch.zeros(min(gradient_bytes, PREFLIGHT_BYTES) // 4, device=device)
    seconds = min(_seconds(lambda: world.all_reduce(tensor), tensor) for _ in range(3))
    speed = tensor.numel() * 4 / seconds
    machines = len({found["machine"] for found in all_ranks})
    return (
        f"{world.size} ranks on {machines} machine{'s' * (machines > 1)}; sharing gradients of "
        f"{gradient_bytes / 1e6:,.0f} MB takes about {gradient_bytes / speed:.2f} s a step ({speed / 1e9:.2f} GB/s)"
    )


def refuse_shared_gpus(world: World, device: torch.device) -> None:
    """Refuse two ranks on one GPU, before NCCL is asked for anything."""
    gpus = world.gather(identity_of(device)) if device.type == "cuda" else []
    twice = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if twice:
        raise UserError(
            f"ranks {twice[0]} and {twice[1]} have the same GPU; start as many ranks a machine as it has GPUs."
        )


def identity_of(device: torch.device) -> str:
    """A name that no other GPU has, on any machine: containers may share a host name."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _seconds(work: Callable[[], None], tensor: Tensor) -> float:
    begin = time.perf_counter()
    work()
    tensor[:1].cpu()  # waits for the device
    return time.perf_counter() - begin
