"""Checks before training that the ranks fit together, and what their connection costs."""

import socket
import time
from collections.abc import Callable

import torch
from torch import Tensor

from anew.distributed.world import World
from anew.errors import UserError

MOST_BYTES = 64 << 20  # exchanged to measure the connection
LISTED_RANKS = 4  # in an error


def check_ranks(
    world: World, device: torch.device, facts: dict[str, str], gradient_bytes: int
) -> str:
    """Return a line that says how long the exchange of the gradients takes.

    Raises UserError if the ranks differ in one of the `facts`.
    """
    all_facts = world.gather({**facts, "machine": socket.gethostname()})
    for key in facts:
        values = [found[key] for found in all_facts]
        if len(set(values)) > 1:
            listed = ", ".join(
                f"rank {rank} has {value}" for rank, value in enumerate(values[:LISTED_RANKS])
            )
            raise UserError(
                f"the ranks differ in {key}: {listed}; "
                "start all of them with the same command and the same software."
            )
    tensor = torch.zeros(min(gradient_bytes, MOST_BYTES) // 4, device=device)
    seconds = min(seconds_of(lambda: world.all_reduce(tensor), tensor) for _ in range(3))
    bytes_per_second = tensor.numel() * 4 / seconds
    machines = len({found["machine"] for found in all_facts})
    return (
        f"{world.size} ranks on {machines} machine{'s' * (machines > 1)}; sharing gradients of "
        f"{gradient_bytes / 1e6:,.0f} MB takes about {gradient_bytes / bytes_per_second:.2f} s "
        f"a step ({bytes_per_second / 1e9:.2f} GB/s)"
    )


def refuse_shared_gpus(world: World, device: torch.device) -> None:
    """Raise UserError if two ranks have the same GPU, which NCCL would report less clearly."""
    if device.type != "cuda":
        return
    gpus = world.gather(gpu_identity(device))
    sharing = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if sharing:
        raise UserError(
            f"ranks {sharing[0]} and {sharing[1]} have the same GPU; "
            "start as many ranks a machine as it has GPUs."
        )


def gpu_identity(device: torch.device) -> str:
    """Return a name that no other GPU has on any machine; containers may share a host name."""
    return str(torch.cuda.get_device_properties(device).uuid)


def seconds_of(work: Callable[[], None], tensor: Tensor) -> float:
    """Return the seconds that `work`, which computes `tensor`, takes on the device."""
    began = time.perf_counter()
    work()
    tensor[:1].cpu()  # waits for the device
    return time.perf_counter() - began
