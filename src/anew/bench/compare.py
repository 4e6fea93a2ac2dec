"""Side by side with other packages: each side in a process of its own, taking turns, ratios of neighbouring turns.

    times = alternate({"anew": rivals.our_step, "transformers": rivals.their_step}, arguments, rounds=7)

Process-wide settings (the allocator, determinism) are part of what is compared, so no process serves two sides.
"""

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from anew.errors import UserError

Step = Callable[[], Any]


def alternate(
    sides: dict[str, Callable[..., Step]], arguments: tuple[Any, ...], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side's turns, after two that warm up."""
    context = multiprocessing.get_context("spawn")
    wires: dict[str, Connection] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:
        for name, make in sides.items():
            wires[name], theirs = context.Pipe()
            process = context.Process(target=_side, args=(make, arguments, theirs))
            process.start()
            stack.callback(process.join)
            stack.callback(wires[name].close)  # which ends it
            theirs.close()
            _turn(
                wires[name], name
            )  # one after the other: two that compile at once are slower than both in turn
            _turn(wires[name], name)
        for _ in range(rounds):
            for name, wire in wires.items():
                times[name].append(_turn(wire, name))
    return times


def _turn(wire: Connection, name: str) -> float:
    try:
        wire.send(True)
        return float(wire.recv())
    except (EOFError, ConnectionError):
        raise UserError(f"the process of {name} ended; what it said stands above.") from None


def _side(make: Callable[..., Step], arguments: tuple[Any, ...], wire: Connection) -> None:
    """One process: for every message, one turn and its seconds, until the other end closes."""
    step = make(*arguments)
    with contextlib.suppress(EOFError):
        while wire.recv():
            begin = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wire.send(time.perf_counter() - begin)


def ratio(mine: list[float], other: list[float]) -> tuple[float, float, float]:
    """How many times as long the other takes: median of neighbouring turns, smallest, largest."""
    ratios = sorted(slow / fast for fast, slow in zip(mine, other, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]
