"""Records where the time of a step goes, and keeps Python's garbage collector out of the steps.

    with profiled(run / "trace.json", steps=3) as step_done:
        ...
        step_done()

The trace opens in ui.perfetto.dev and in chrome://tracing.
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

WARM_UP_STEPS = 2  # the first step compiles, and the second creates the optimizer's state
LISTED_OPERATIONS = 8
COLLECT_EVERY = 50  # steps
FULL_COLLECTION_EVERY = 20 * COLLECT_EVERY


@contextlib.contextmanager
def profiled(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Record `steps` steps into `path`, from the third one on.

    The yielded function follows each step.
    """
    if steps == 0:
        yield lambda: None
        return
    written = False

    def write(recorded: Any) -> None:
        nonlocal written
        taken = recorded.step_num - WARM_UP_STEPS
        if taken == 0:  # the run ended before a step was recorded
            return
        written = True
        recorded.export_chrome_trace(str(path))
        log.info(f"profile of {taken} steps in {path}; the operations that took longest:")
        log_longest_operations(recorded, taken)

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    phases = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        log.warning(f"no profile was written: the run ended before step {WARM_UP_STEPS + steps}")


def log_longest_operations(recorded: Any, steps: int) -> None:
    """Log the operations that took most time by themselves."""
    events = sorted(recorded.key_averages(), key=self_time, reverse=True)
    for event in events[:LISTED_OPERATIONS]:
        milliseconds = self_time(event) / steps / 1e3
        calls = event.count / steps
        log.info(f"  {milliseconds:>9,.1f} ms a step  {calls:>6,.0f} times  {event.key[:60]}")


def self_time(event: Any) -> float:
    """Return the microseconds of an operation by itself, on the GPU if there is one."""
    if not torch.cuda.is_available():
        return float(event.self_cpu_time_total)
    # PyTorch has renamed the attribute.
    for name in ("self_device_time_total", "self_cuda_time_total"):
        value = float(getattr(event, name, 0.0))
        if value:
            return value
    return 0.0


@contextlib.contextmanager
def garbage_collected_at_fixed_steps() -> Iterator[Callable[[int], None]]:
    """Switch automatic garbage collection off; the yielded function collects at fixed steps.

    Automatic collection begins when enough objects exist, which happens at different moments on the
    ranks, and all of them wait for the rank that is collecting.
    """

    def collect(step: int) -> None:
        if step % COLLECT_EVERY != 0:
            return
        is_full = step % FULL_COLLECTION_EVERY == 0
        gc.collect(2 if is_full else 1)

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if was_enabled:
            gc.enable()
