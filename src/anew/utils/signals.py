"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag, which the training loop reads.

    with stop_on_signals() as stop:
        while not stop.is_set():
            work()

The first signal sets the flag. A second Ctrl-C ends the process at once; nothing that was saved is
lost, because saves are atomic. A second SIGTERM changes nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopFlag(threading.Event):
    """An event that signals set between `listen` and `restore`."""

    def __init__(self) -> None:
        super().__init__()
        # A signal can arrive while the handler of another one, or the main thread, holds the
        # event's lock. With the plain lock of an Event, the handler would then wait for ever.
        self._cond = threading.Condition(threading.RLock())
        self._previous: dict[int, Any] = {}  # signal number: the handler before `listen`

    def listen(self) -> None:
        """Let signals set this flag.

        Python delivers signals to the main thread only; elsewhere this does nothing.

        If signals set another flag until now, which is the case when one run starts another, and
        that flag is set already, this flag is set too.
        """
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        outer = self._outer_flag()
        if outer is not None and outer.is_set():
            self.set()

    def restore(self) -> None:
        """Give the signals their previous handlers, and pass a request to stop on to an outer
        flag.
        """
        outer = self._outer_flag()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if outer is not None and self.is_set():
            outer.set()

    def _outer_flag(self) -> "StopFlag | None":
        handler = self._previous.get(signal.SIGTERM)
        owner = getattr(handler, "__self__", None)
        return owner if isinstance(owner, StopFlag) else None

    def _handle(self, number: int, _: Any) -> None:
        if self.is_set() and number == signal.SIGINT:
            os._exit(130)
        self.set()


def stop_signals() -> list[int]:
    """Return the signals that ask a run to stop; Windows has no SIGUSR1."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    return [int(number) for number in numbers]


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Give a flag that signals set while the block runs."""
    stop = StopFlag()
    stop.listen()
    try:
        yield stop
    finally:
        stop.restore()


def signal_this_process(number: int) -> None:
    """Send this process a signal that its handler receives, from any thread.

    On Windows, os.kill would end the process at once.
    """
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)
