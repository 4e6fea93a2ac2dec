"""How the processes that torchrun has started find each other.

with joined("cuda", timeout_seconds=600) as world:
    world.rank, world.size
"""

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from anew.distributed.world import ALONE, World, naming_lost_ranks
from anew.errors import UserError
from anew.utils.signals import signal_this_process

PARENT_POLL_SECONDS = 1.0
STORE_POLL_SECONDS = 0.05
START_UP_TIMEOUT = datetime.timedelta(hours=12)  # to download and tokenise the first shard


@contextlib.contextmanager
def joined(device: str = "cpu", timeout_seconds: float = 1800) -> Iterator[World]:
    """Give the world that torchrun has started; a single process is a world of one rank.

    Tensors are exchanged by the backend of their `device` (NCCL for "cuda"), Python values by
    gloo. A rank for which the others have waited `timeout_seconds` counts as lost. Raises
    UserError if the ranks do not meet.
    """
    size = world_size_of_environment()
    if size == 1:
        yield ALONE
        return
    end_with_parent()
    rank = int(os.environ["RANK"])
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store = store_of_this_start(rank, size, timeout)
        backend = distributed.get_default_backend_for_device(device)
        distributed.init_process_group(
            backend, timeout=timeout, rank=rank, world_size=size, store=store
        )
        control = distributed.new_group(backend="gloo", timeout=timeout)
        start_up = distributed.new_group(backend="gloo", timeout=max(timeout, START_UP_TIMEOUT))
    except (RuntimeError, ValueError) as error:  # PyTorch's DistError is a RuntimeError
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} of {size} could not meet the others at {address} ({reason}); is the port "
            "free and open between the machines, and were all ranks started?"
        ) from error

    def gather_in(group: Any, value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        with naming_lost_ranks(rank):
            distributed.all_gather_object(values, value, group=group)
        return values

    try:
        yield World(
            rank=rank,
            size=size,
            gather=partial(gather_in, control),
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            gather_patiently=partial(gather_in, start_up),
        )
    finally:
        distributed.destroy_process_group()


def world_size_of_environment() -> int:
    """Return the number of ranks that torchrun has started.

    Raises UserError if variables are missing.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    rank = os.environ.get("RANK", "")
    problem = ""
    if missing:
        problem = f"{missing[0]} is missing"
    elif not size.isdigit() or not rank.isdigit() or int(rank) >= int(size):
        problem = f"RANK is {rank}"
    if problem:
        raise UserError(
            f"WORLD_SIZE is {size}, and {problem}; start the processes with torchrun, or unset "
            "WORLD_SIZE."
        )
    return int(size)


def store_of_this_start(rank: int, size: int, timeout: datetime.timedelta) -> Store | None:
    """Return torchrun's store under a prefix of this start of the ranks;

    None where torch makes a store.

    PyTorch 2.13 gives restarted ranks the store of the ranks before them, with the addresses at
    which the ended processes listened. Rank 0 therefore publishes a new name for each start, and
    waits until every other rank has answered under that name. A rank that finds an old name does
    not find itself in the list of that start, and asks again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    own_name = uuid.uuid4().hex
    if rank == 0:
        store.set("anew", own_name)
        others = [store.get(f"anew/{own_name}/{other}").decode() for other in range(1, size)]
        store.set(f"anew/{own_name}", " ".join(others))
        return PrefixStore(own_name, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("anew").decode()
        store.set(f"anew/{start}/{rank}", own_name)
        list_key = f"anew/{start}"
        if store.check([list_key]) and own_name in store.get(list_key).decode().split():
            return PrefixStore(start, store)
        time.sleep(STORE_POLL_SECONDS)
    raise RuntimeError("rank 0 did not come")


def end_with_parent() -> None:
    """Stop this process when the torchrun agent that started it has ended."""
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of prctl.h
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        signal_this_process(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()
