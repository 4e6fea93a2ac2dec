"""Progress of long work, on terminals and where there is none."""

import logging
import os
import re
import subprocess
import sys
import time

import pytest

from anew.cli import progress


def test_without_a_terminal_lines_are_logged_with_the_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 5.0, 60.0, 65.0, 120.0])  # the beginning, then each update
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    caplog.set_level(logging.INFO, "anew")
    with progress.progress_bar(seconds_between_lines=10.0) as update:
        for share in (0.01, 0.25, 0.3, 0.5):
            update(share, f"share {share}")
    assert caplog.messages == ["share 0.25, 3 min left", "share 0.5, 2 min left"]


def test_ranks_other_than_0_show_no_progress(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.progress_bar(seconds_between_lines=0.0) as update:
        update(0.5, "half")
    assert caplog.messages == []


SHOW = """
from anew.cli.progress import progress_bar
with progress_bar() as update:
    update(0.5, "100/2,000  loss 3.123  16,969 tok/s  MFU 50%")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize(("columns", "has_bar"), [(40, False), (80, True)])
def test_terminal_shows_the_step_and_the_time_left_at_any_width(
    columns: int, has_bar: bool
) -> None:
    terminal, child_end = os.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SHOW], stderr=child_end, env=environment, check=True)
    os.close(child_end)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()
    [line] = {line.strip() for line in lines if "loss" in line}
    assert re.search(r"(--:--|\d\d:\d\d) 100/2,000  loss 3\.123", line)
    assert ("━" in line) == has_bar
    assert len(line) <= columns
