"""More processes that take part in the work of this one, on the same machine.

    with other_processes(3, "cpu", run_trials, trials, out):
        run_trials(trials, out)             # four processes in all

Each process has a GPU of its own as far as there are enough, or an equal share of the CPU's cores.
How the work is divided is left to the function: `anew.bench.sweep` uses a lock file for each run.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from anew.errors import Preempted
from anew.utils.signals import signal_this_process

log = logging.getLogger("anew")

EXPECTED_ENDS = (0, -signal.SIGTERM)  # exit codes


@contextlib.contextmanager
def other_processes(
    count: int, device: str, work: Callable[..., object], *arguments: Any
) -> Iterator[None]:
    """Call `work(*arguments)` in `count` new processes while the block runs.

    `work` must be importable by its name, and should end soon after SIGTERM, which the processes
    get at the end of the block, and also when this process has ended without leaving the block.
    """
    context = multiprocessing.get_context("spawn")
    n_threads = torch.get_num_threads()
    share = n_threads if device == "cuda" else max(1, n_threads // (count + 1))
    processes = [context.Process(target=_call, args=(share, work, arguments)) for _ in range(count)]
    for index, process in enumerate(processes, start=1):
        with _environment(OMP_NUM_THREADS=str(share), **_own_gpu(device, index)):
            process.start()
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        for process in processes:
            # A run that is just starting may miss a signal, so signals are repeated.
            while process.is_alive():
                process.terminate()
                process.join(1.0)
            if process.exitcode not in EXPECTED_ENDS:
                log.warning(
                    "one of the processes that --jobs started ended with exit code %s; "
                    "the others have taken its runs.",
                    process.exitcode,
                )


def _own_gpu(device: str, index: int) -> dict[str, str]:
    """Return the environment variable that gives a process one GPU; processes take turns."""
    if device != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": names[index % len(names)]}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables, which a process that starts in the block inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _call(n_threads: int, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Call `work(*arguments)` in a new process. A request to stop is no error."""
    threading.Thread(target=_stop_after_parent, daemon=True, name="parent").start()
    torch.set_num_threads(n_threads)
    with contextlib.suppress(Preempted):
        work(*arguments)


def _stop_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal_this_process(signal.SIGTERM)
