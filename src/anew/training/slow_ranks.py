"""Find the rank that the others wait for. A slow machine makes every step slow, without an error.

    state.timer.start()     # before the next batch is awaited
    state.timer.stop()      # after the last forward pass of a step, before anything is exchanged
    result.rank_seconds     # of every rank, exchanged together with the loss of the next step

    slow_ranks = SlowRanks(names_of_ranks(world, device))
    row |= slow_ranks.add(result.rank_seconds)      # warns of a rank that is slower than the others

The time between `start` and `stop` is that of a rank's own work: waiting for data, and all passes
but the last backward pass, in which the ranks begin to exchange gradients.
"""

import logging
import math
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from anew.distributed.world import World

log = logging.getLogger("anew")

SLOW_RATIO = 1.5  # of a rank's time to the median of the others
STEPS_PER_COMPARISON = 20  # whose mean times are compared
SECONDS_BETWEEN_WARNINGS = 600.0  # about the same rank


class RankTimer:
    """Measures the time of this rank's own work in a step, on the device if it has a clock."""

    def __init__(self, device: torch.device) -> None:
        self.uses_events = device.type == "cuda"
        self.started: Any = None
        self.stopped: Any = None
        self.seconds = 0.0  # of the last complete step; 0: not known yet

    def start(self) -> None:
        """Begin to measure. The step before must have ended on the device."""
        if self.started is not None and self.stopped is not None:
            if self.uses_events:
                self.seconds = self.started.elapsed_time(self.stopped) / 1e3
            else:
                self.seconds = self.stopped - self.started
        self.stopped = None
        self.started = self._now()

    def stop(self) -> None:
        """Note the end of this rank's own work."""
        self.stopped = self._now()

    def _now(self) -> Any:
        if not self.uses_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class SlowRanks:
    """Compares the ranks' times over some steps, and names the slowest rank if it is much slower.

    `names` says where each rank runs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.recent: list[Sequence[float]] = []
        self.warned: dict[int, float] = {}  # by rank, the time of its last warning

    def add(self, seconds: Sequence[float]) -> dict[str, float]:
        """Add the ranks' times of one step; return their columns of metrics.jsonl.

        There are no columns for one rank, and none while a time is unknown.
        """
        if len(seconds) < 2 or min(seconds) <= 0:
            return {}
        self.recent.append(seconds)
        if len(self.recent) == STEPS_PER_COMPARISON:
            self._compare([statistics.fmean(times) for times in zip(*self.recent, strict=True)])
            self.recent = []
        rank, ratio = slowest(seconds)
        return {"speed/slowest_rank": rank, "speed/slowest_rank_ratio": round(ratio, 3)}

    def _compare(self, means: list[float]) -> None:
        rank, ratio = slowest(means)
        now = time.monotonic()
        is_recent = now - self.warned.get(rank, -math.inf) < SECONDS_BETWEEN_WARNINGS
        if ratio < SLOW_RATIO or is_recent:
            return
        self.warned[rank] = now
        log.warning(
            f"slowest rank: {rank} ({self.names[rank]}) computes for {1e3 * means[rank]:,.0f} ms "
            f"in each step before it exchanges gradients, {ratio:.1f} times as long as the other "
            "ranks, which wait for it"
        )


def slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Return the slowest rank, and its time relative to the median of the other ranks."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = [time for other, time in enumerate(seconds) if other != rank]
    return rank, seconds[rank] / statistics.median(others)


def names_of_ranks(world: World, device: torch.device) -> list[str]:
    """Return the machine and the device of each rank. Every rank must call this."""
    return world.gather(f"{device} of {socket.gethostname()}")
