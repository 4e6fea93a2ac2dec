"""Where a step's time goes: a trace of a few steps, for ui.perfetto.dev or chrome://tracing, and quiet while steps are taken.

with profiled(run / "trace.json", steps=3) as step_done: ...
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("anew")

WARM_UP = 2  # steps: the first compiles, the second makes the optimizer's state
GARBAGE_EVERY = 50  # steps


@contextlib.contextmanager
def profiled(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Record `steps` steps, after two, into `path`. What it yields is called behind each step."""
    if not steps:
        yield lambda: None
        return
    written = False

    def write(recorded: Any) -> None:
        nonlocal written
        taken = recorded.step_num - WARM_UP
        if not taken:  # the run ended just here
            return
        written = True
        recorded.export_chrome_trace(str(path))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        log.info(f"profile of {taken} steps in {path}; what took longest:")
        for event in sorted(recorded.key_averages(), key=lambda e: -_self_time(e, key))[:8]:
            log.info(
                f"  {_self_time(event, key) / taken / 1e3:>9,.1f} ms a step  {event.count / taken:>6,.0f} times  {event.key[:60]}"
            )

    activities = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with profile(
        activities=activities,
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
    ) as p:
        yield p.step
    if not written:
        log.warning(f"no profile was written: the run ended before step {WARM_UP + steps}")


def _self_time(event: Any, key: str) -> float:
    """Microseconds in this operation itself; torch has renamed CUDA's to a device's."""
    found: float = getattr(event, key.replace("cuda", "device"), 0.0) or getattr(event, key, 0.0)
    return found


@contextlib.contextmanager
def quiet_garbage() -> Iterator[Callable[[int], None]]:
    """Python's collector of cycles stays off; what it yields is called with each step and collects at the same ones on every rank.

    By itself it starts when enough objects are there, at another moment on each rank, and all wait for the one that is collecting.
    """

    def collect(step: int) -> None:
        if step % GARBAGE_EVERY == 0:
            gc.collect(2 if step % (20 * GARBAGE_EVERY) == 0 else 1)

    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if on:
            gc.enable()
