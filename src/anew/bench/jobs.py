"""More processes that do the same work as this one, on the same machine.

    with other_processes(3, "cpu", n_threads=4, work=take_trials, arguments=(trials, out)):
        take_trials(trials, out)             # four processes in all

Each process uses one GPU, or `n_threads` of the CPU. How the work is divided is left to the
function: `anew.bench.sweep` uses a lock file for each training run.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from anew.errors import Preempted, UserError
from anew.utils.signals import signal_this_process, stop_signals

log = logging.getLogger("anew")

SECONDS_TO_SAVE = 600.0  # given to a process that was asked to stop


@contextlib.contextmanager
def other_processes(
    count: int,
    device: str,
    n_threads: int,
    work: Callable[..., object],
    arguments: tuple[Any, ...],
) -> Iterator[None]:
    """Call `work(*arguments)` in `count` new processes while the block runs.

    `work` must be importable by its name, and end soon after SIGTERM. The processes receive SIGTERM
    at the end of the block, and also if this process ends without leaving the block.
    """
    context = multiprocessing.get_context("spawn")
    threads_before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        torch.set_num_threads(n_threads)
        stack.callback(torch.set_num_threads, threads_before)
        requests: list[Connection] = []
        processes: list[Any] = []
        stack.callback(_end, processes, requests)
        for index in range(1, count + 1):
            # A process is asked to stop by closing the other end of its pipe.
            stop_request, request = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(stop_request, n_threads, work, arguments))
            with _environment(OMP_NUM_THREADS=str(n_threads), **_one_gpu(device, index)):
                process.start()
            requests.append(request)
            processes.append(process)
        yield


def _end(processes: list[Any], requests: list[Connection]) -> None:
    """Ask all processes to stop, and wait until they have saved."""
    for request in requests:
        request.close()
    # 0: its work is complete, or it was asked to stop; negative: the number of a signal.
    expected = {0, *(-number for number in stop_signals())}
    for process in processes:
        process.join(SECONDS_TO_SAVE)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode not in expected:
            log.warning(
                "a process that --jobs has started ended with exit code %s; its unfinished run is "
                "continued by the others, or by the same command.",
                process.exitcode,
            )


def _one_gpu(device: str, index: int) -> dict[str, str]:
    """Return the environment variable that lets a process see one of the GPUs, by its index."""
    if device != "cuda":
        return {}
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[index % count]}


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


def _run(
    stop_request: Connection,
    n_threads: int,
    work: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    """Call `work(*arguments)` in a new process, which shows warnings only."""
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    log.addHandler(console)
    log.setLevel(logging.INFO)  # for the log file of each run
    threading.Thread(target=_wait_for, args=(stop_request,), daemon=True, name="stop").start()
    torch.set_num_threads(n_threads)
    try:
        work(*arguments)
    except (Preempted, KeyboardInterrupt):
        pass
    except UserError as error:
        sys.exit(f"anew: {error}")


def _wait_for(stop_request: Connection) -> None:
    """Send this process SIGTERM as soon as the other end of the pipe is closed."""
    stop_request.poll(None)
    signal_this_process(signal.SIGTERM)
