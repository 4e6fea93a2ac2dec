"""Real ranks for tests: processes that communicate over gloo.

They are forked from a server process that has loaded torch, so starting one takes 0.1 s.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# A fork of a process that has initialised CUDA cannot use it, so no module that is preloaded here
# may initialise CUDA. Windows has no fork.
CONTEXT: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(
        ["anew", "torch.distributed.tensor", "torch.utils.tensorboard", "tests.support.ranks"]
    )


def free_port() -> int:
    """Return a TCP port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_process(
    function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
) -> tuple[BaseProcess, Connection]:
    """Call `function(*arguments)` in a new process.

    The connection delivers one pair: "ok" and the returned value, or the name and the text of the
    exception.
    """
    receiver, sender = CONTEXT.Pipe()
    variables = {**os.environ, **(environment or {})}
    process = CONTEXT.Process(target=_call, args=(function, arguments, sender, variables))
    process.start()
    sender.close()
    return process, receiver


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    sender: Connection,
    environment: dict[str, str],
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        sender.send(("ok", function(*arguments)))
    except BaseException as error:  # noqa: BLE001 (the parent process reports it)
        sender.send((type(error).__name__, f"{error}\n{traceback.format_exc()}"))


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60
) -> list[tuple[str, Any]]:
    """Call `function(*arguments)` on `size` ranks and return one pair for each, in rank order.

    A pair is "ok" and the returned value, the name and the text of an exception, or "Timeout" and
    "" for a rank that did not answer within `seconds`.
    """
    port = free_port()
    started = [
        start_process(function, *arguments, environment=rank_environment(rank, size, port))
        for rank in range(size)
    ]
    results = []
    for process, receiver in started:
        results.append(receiver.recv() if receiver.poll(seconds) else ("Timeout", ""))
        process.join(5)
        if process.is_alive():
            process.kill()
    return results
