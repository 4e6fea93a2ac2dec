"""Compare packages side by side: one process each, taking turns, ratios of neighbouring turns.

    sides = {"anew": competitors.anew_training, "transformers": competitors.transformers_training}
    times = alternate(sides, (config, "cpu"), rounds=7)
    print(ratio(times["anew"], times["transformers"]))

Process-wide settings, such as the memory allocator and deterministic kernels, are part of what is
compared, so each side has a process of its own. Turns alternate because the speed of a machine
drifts; neighbouring turns see the same machine.
"""

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from anew.bench.timing import seconds_of
from anew.errors import UserError

Turn = Callable[[], Any]  # the work that is timed
WARM_UP_TURNS = 2


class Ratio(NamedTuple):
    """How many times as long the other side takes, over pairs of neighbouring turns."""

    median: float
    low: float
    high: float


def alternate(
    sides: dict[str, Callable[..., Turn]], arguments: tuple[Any, ...], rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each side's turns, after two turns of warm-up.

    Each value of `sides` is called with `arguments` in its own process and returns the turn.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    with contextlib.ExitStack() as stack:
        for name, make_turn in sides.items():
            connections[name], far_end = context.Pipe()
            process = context.Process(target=_serve_turns, args=(make_turn, arguments, far_end))
            process.start()
            stack.callback(process.join)
            stack.callback(connections[name].close)  # closing the connection ends the process
            far_end.close()
            # Each side warms up before the next one starts: two compilations at the same time
            # take longer than one after the other.
            for _ in range(WARM_UP_TURNS):
                _take_turn(connections[name], name)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, connection in connections.items():
                times[name].append(_take_turn(connection, name))
    return times


def _take_turn(connection: Connection, name: str) -> float:
    try:
        connection.send(True)
        return float(connection.recv())
    except (EOFError, ConnectionError):
        message = f"the process of {name} ended early; its error message is printed above."
        raise UserError(message) from None


def _serve_turns(
    make_turn: Callable[..., Turn], arguments: tuple[Any, ...], connection: Connection
) -> None:
    """Answer every message with the seconds of one turn, until the connection is closed."""
    turn = make_turn(*arguments)
    with contextlib.suppress(EOFError):
        while connection.recv():
            connection.send(seconds_of(turn))


def ratio(mine: list[float], other: list[float]) -> Ratio:
    """Return the ratio of the other side's seconds to mine: median, smallest and largest."""
    ratios = [theirs / ours for ours, theirs in zip(mine, other, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
