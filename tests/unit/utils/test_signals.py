"""How a process signals itself."""

import os
import signal
import subprocess
import sys

import pytest

from anew.utils.signals import signal_this_process, stop_on_signals


def test_signal_to_this_process_reaches_its_handler_on_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Windows, os.kill ends the process without calling the handler."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill ends a Windows process"))
    with stop_on_signals() as stop:
        signal_this_process(signal.SIGTERM)
        assert stop.is_set()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_signal_that_interrupts_the_handler_of_another_one_does_not_block() -> None:
    """The process changes the flag while it receives thousands of signals."""
    program = (
        "import os, subprocess, sys\n"
        "from anew.utils.signals import StopFlag\n"
        "flag = StopFlag()\n"
        "flag.listen()\n"
        "sender = f'import os\\nfor _ in range(20000): os.kill({os.getpid()}, 15)'\n"
        "process = subprocess.Popen([sys.executable, '-c', sender])\n"
        "while process.poll() is None:\n"
        "    flag.clear()\n"
        "    flag.set()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0
