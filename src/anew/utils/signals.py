"""Stop a run on SIGTERM, SIGUSR1 or Ctrl-C.

    with listening() as stop:
        with stop.breakable():      # here the first signal raises Interrupted at once
            compile_for_a_minute()
        if stop.is_set(): ...       # elsewhere it only sets the flag, which the loop polls

The first signal requests the stop. A second Ctrl-C ends the process at once; nothing that was saved
is lost, because every save is atomic. A second SIGTERM changes nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any



class Interrupted(BaseException):
    """Raised by a signal inside `Stop.breakable`.

    It is not an Exception, so code that handles errors and goes on does not catch it.
    """


class Stop(threading.Event):
    """A flag that is set when the run should end."""

    def __init__(self) -> None:
        super().__init__()
        self.may_break = 0  # how many `breakable` blocks are active
        self.patience: float | None = None

    @contextmanager
    def breakable(self, patience: float | None = None) -> Iterator[None]:
        """Inside the block, the first signal raises Interrupted.

        For long work that leaves nothing half done. Python acts on a signal only when a call into
        C++ returns, and such a call may wait for other machines. With `patience`, a process that
        is still inside the block that many seconds after a signal is ended.
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
        """Handle a signal."""
        if not self.is_set():
            self.set()
            if self.may_break:
                raise Interrupted
        elif number == signal.SIGINT:
            os._exit(130)

    def watch(self, arrived: socket.socket) -> None:
        """Read the numbers of signals as they arrive, and end the process if patience runs out.

        It runs in a thread, which a call into C++ does not block, until the socket is closed.
        """
        while arrived.recv(1):
            if self.patience is None:
                continue
            time.sleep(self.patience)
            is_still_inside = self.patience is not None
            if is_still_inside:
                sys.stderr.write(f"anew: {NOTHING_YET}\n")
                sys.stderr.flush()
                os._exit(75)


def signal_this_process(number: int) -> None:
    """Send a signal to this process, from any thread, so that its handler is called.

    On Windows, os.kill would end the process instead.
    """
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


@contextmanager
def listening() -> Iterator[Stop]:
    """Give a Stop that signals set while the block runs.

    Only the main thread can handle signals; in another thread nothing sets the flag.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    handlers = {number: signal.signal(number, stop.handle) for number in numbers}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(reader,), daemon=True, name="signals")
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(previous_fd)
        writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # A signal that came too late for this block is passed to the block around it.
        outer = getattr(handlers[signal.SIGTERM], "__self__", None)
        if stop.is_set() and isinstance(outer, Stop):
            outer.set()
