"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C, at any moment of a run.

    with listening() as stop:
        with stop.breakable():      # here the first signal raises Interrupted at once: nothing would be lost
            compile_for_a_minute()
        if stop.is_set(): ...       # elsewhere it is noted, and the loop looks

The first signal asks, a second Ctrl-C leaves at once (every save is atomic, so nothing saved is lost), a second SIGTERM changes nothing.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTHING_YET = (
    "stopped before its first step, so there was nothing to save; the same command starts again."
)


class Interrupted(BaseException):
    """Raised by a signal inside `Stop.breakable`. No Exception, so that nothing on the way takes it for an error and goes on."""


class Stop(threading.Event):
    """Set once somebody wants the run to end."""

    def __init__(self) -> None:
        super().__init__()
        self.may_break = 0
        self.patience: float | None = None

    @contextmanager
    def breakable(self, patience: float | None = None) -> Iterator[None]:
        """Inside, the first signal raises Interrupted: for long work that leaves nothing half done.

        Python acts on a signal once C++ returns to it, which may wait for other machines. A process that is still inside `patience`
        seconds after a signal is ended.
        """
        self.may_break += 1
        self.patience = patience
        try:
            if self.is_set():
                raise Interrupted
            yield
        finally:
            self.may_break -= 1
            self.patience = None

    def handle(self, number: int, _: Any) -> None:
        """The signal handler."""
        if self.is_set():
            if number == signal.SIGINT:
                os._exit(130)
            return
        self.set()
        if self.may_break:
            raise Interrupted

    def watch(self, arrived: socket.socket) -> None:
        """Read the signals' numbers as they come, until the other end is closed; for a thread, which C++ does not hold up."""
        while arrived.recv(1):
            if self.patience is not None:
                time.sleep(self.patience)
                if self.patience is not None:
                    sys.stderr.write(f"anew: {NOTHING_YET}\n")
                    sys.stderr.flush()
                    os._exit(75)


def signal_this_process(number: int) -> None:
    """Send this process a signal that its handler sees, from any thread. On Windows, os.kill would end the process at once."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


@contextmanager
def listening() -> Iterator[Stop]:
    """A Stop that signals set, as long as the block runs. Only the main thread can listen."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [
        signal.SIGINT,
        signal.SIGTERM,
        *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []),
    ]
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    here, there = socket.socketpair()
    there.setblocking(False)
    woken = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, args=(here,), daemon=True, name="signals").start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken)
        there.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        outer = getattr(before[signal.SIGTERM], "__self__", None)
        if stop.is_set() and isinstance(
            outer, Stop
        ):  # what came too late for the inner is for the outer
            outer.set()
