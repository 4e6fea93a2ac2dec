"""Compare packages side by side: one process each, taking turns, ratios of neighbouring turns.

    sides = {"anew": competitors.anew_training, "transformers": competitors.transformers_training}
    found = alternate(sides, (config, "cpu"), rounds=7)
    print(ratio(found.seconds["anew"], found.seconds["transformers"]))
    print(found.left_out)           # {} if every side finished

Process-wide settings, such as the memory allocator and deterministic kernels, are part of what is
compared, so each side has a process of its own. Turns alternate because the speed of a machine
drifts; neighbouring turns see the same machine. A side whose process ends is left out, and the
others go on.
"""

import contextlib
import multiprocessing
import signal
import statistics
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from anew.bench.timing import seconds_of
from anew.errors import UserError

Turn = Callable[[], Any]  # the work that is timed
Show = Callable[[float, str], None]  # (share of the turns that is done, the next turn)
WARM_UP_TURNS = 2
REASON_CHARACTERS = 300  # the messages of compilers have pages
SECONDS_BETWEEN_CHECKS = 1.0


class Comparison(NamedTuple):
    """The sides that finished, and the others."""

    seconds: dict[str, list[float]]  # of each turn, by side
    left_out: dict[str, str]  # why a side has no figures


class Ratio(NamedTuple):
    """How many times as long the other side takes, over pairs of neighbouring turns."""

    median: float
    low: float
    high: float


def alternate(
    sides: dict[str, Callable[..., Turn]],
    arguments: tuple[Any, ...],
    rounds: int,
    show: Show | None = None,
) -> Comparison:
    """Return the seconds of each side's turns, after two turns of warm-up.

    Each value of `sides` is called with `arguments` in its own process and returns the turn. A side
    that raises an error or whose process ends is left out from then on. `show` is called before
    every turn.
    """
    schedule = _schedule(list(sides), rounds)
    processes: dict[str, _Side] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for done, (name, turn) in enumerate(schedule):
            if name in left_out:
                continue
            if show is not None:
                show(done / len(schedule), f"{name}: {turn}")
            if name not in processes:
                processes[name] = _Side(sides[name], arguments)
                stack.callback(processes[name].end)
            answer = processes[name].take_turn()
            if isinstance(answer, str):
                left_out[name] = answer
            else:
                seconds[name].append(answer)
    finished = {name: seconds[name][WARM_UP_TURNS:] for name in sides if name not in left_out}
    return Comparison(finished, left_out)


def _schedule(names: list[str], rounds: int) -> list[tuple[str, str]]:
    """Return every turn as the name of its side and its description, in order.

    Each side warms up before the next one starts: two compilations at the same time take longer
    than one after the other.
    """
    schedule = []
    for name in names:
        for number in range(1, WARM_UP_TURNS + 1):
            schedule.append((name, f"warming up, {number} of {WARM_UP_TURNS}"))
    for number in range(1, rounds + 1):
        for name in names:
            schedule.append((name, f"turn {number} of {rounds}"))
    return schedule


class _Side:
    """The process of one side, and the connection to it."""

    def __init__(self, make_turn: Callable[..., Turn], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        work = (make_turn, arguments, far_end)
        self.process = context.Process(target=_serve_turns, args=work)
        self.process.start()
        far_end.close()

    def take_turn(self) -> float | str:
        """Return the seconds of the next turn, or why the process has ended."""
        try:
            self.connection.send(True)
            while not self.connection.poll(SECONDS_BETWEEN_CHECKS):
                # The connection of a process that has ended stays open as long as a process that it
                # forked lives.
                if not self.process.is_alive() and not self.connection.poll():
                    raise EOFError
            answer: float | str = self.connection.recv()
            return answer
        except (EOFError, ConnectionError):
            self.process.join()
            return _reason_of_end(self.process.exitcode or 0)

    def end(self) -> None:
        """Close the connection, which ends the process, and wait for it."""
        self.connection.close()
        self.process.join()


def _reason_of_end(exit_code: int) -> str:
    """Return why a process ended; a negative code is the number of a signal."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    number = -exit_code
    meaning = (signal.strsignal(number) or "unknown").lower()
    reason = f"ended by signal {number} ({meaning})"
    if meaning.startswith("killed"):
        # Linux kills the largest process when memory runs out, without any message to it.
        reason += ", probably because memory ran out"
    return reason


def _serve_turns(
    make_turn: Callable[..., Turn], arguments: tuple[Any, ...], connection: Connection
) -> None:
    """Answer every message with the seconds of one turn, until the connection is closed.

    The answer to a turn that raises an error is the error as one line of text.
    """
    try:
        turn = make_turn(*arguments)
        for _ in _messages(connection):
            connection.send(seconds_of(turn))
    except Exception as error:
        with contextlib.suppress(OSError):  # the other process may have been interrupted
            connection.send(_one_line(error))
        raise SystemExit(1) from error


def _messages(connection: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def _one_line(error: Exception) -> str:
    text = str(error)
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return textwrap.shorten(text, REASON_CHARACTERS, placeholder=" ...")


def ratio(mine: list[float], other: list[float]) -> Ratio:
    """Return the ratio of the other side's seconds to mine: median, smallest and largest."""
    ratios = [theirs / ours for ours, theirs in zip(mine, other, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
