"""Real ranks for tests: processes that meet over gloo. A server that has torch loaded forks them, which takes a tenth of a second."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# A fork of a process that has initialised CUDA cannot use it, so nothing that is preloaded here may do so. Windows has no fork.
CONTEXT: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(
        ["anew", "torch.distributed.tensor", "torch.utils.tensorboard", "tests.support.ranks"]
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
) -> tuple[BaseProcess, Connection]:
    """`function(*arguments)` in a process of its own; what it returns or raises comes through the connection."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=_work, args=(function, arguments, there, {**os.environ, **(environment or {})})
    )
    process.start()
    there.close()
    return process, here


def _work(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    connection: Connection,
    environment: dict[str, str],
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        connection.send(("ok", function(*arguments)))
    except BaseException as error:  # noqa: BLE001 (it is reported)
        connection.send((type(error).__name__, f"{error}\n{traceback.format_exc()}"))


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60
) -> list[tuple[str, Any]]:
    """`function(*arguments)` on `size` ranks: ("ok", what it returned) or (name of an exception, its text) of each, in rank order."""
    port = free_port()
    started = [
        start(function, *arguments, environment=rank_environment(rank, size, port))
        for rank in range(size)
    ]
    found = []
    for process, connection in started:
        found.append(connection.recv() if connection.poll(seconds) else ("Timeout", ""))
        process.join(5)
        if process.is_alive():
            process.kill()
    return found
