"""The command line of `anew`, with one planned fault in one rank.

ANEW_FAULT=KIND:RANK:STEP:MARKER causes the fault in this rank before this step, once: the file
MARKER then exists, and a restarted run has no fault.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anew.cli.main import main
from anew.training import trainer
from anew.training.step import train_step

SECONDS_OF_A_HELD_LOCK = 60


def raise_error() -> None:
    """Raise an exception that nothing handles."""
    raise RuntimeError("a planned error")


def raise_asynchronously() -> None:
    """Let another thread raise an exception in this one, at some moment of the next steps."""
    main_thread = ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        time.sleep(0.02)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main_thread, ctypes.py_object(RuntimeError))

    threading.Thread(target=interrupt).start()


def access_invalid_memory() -> None:
    """Read address 0, as an extension module with an error may do."""
    ctypes.string_at(0)


def hold_lock() -> None:
    """Hold the lock of the interpreter (GIL) for a minute, so that no other thread can run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they would end the sleep
    ctypes.PyDLL(None).sleep(SECONDS_OF_A_HELD_LOCK)


FAULTS: dict[str, Callable[[], None]] = {
    "raising rank": raise_error,
    "asynchronous exception": raise_asynchronously,
    "segmentation fault": access_invalid_memory,
    "abort": os.abort,
    "held lock": hold_lock,
}


def faulty_train_step(loss_function: Any, state: Any, *arguments: Any, **named: Any) -> Any:
    """Cause the fault at the planned rank and step, and call the original `train_step`."""
    kind, rank, step, marker = os.environ["ANEW_FAULT"].split(":", 3)
    is_planned = os.environ["RANK"] == rank and state.step == int(step)
    if is_planned and not Path(marker).exists():
        Path(marker).touch()
        FAULTS[kind]()
    return train_step(loss_function, state, *arguments, **named)


if __name__ == "__main__":
    with patch.object(trainer, "train_step", faulty_train_step):
        main()
