"""How a process signals itself."""

import os
import signal
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
