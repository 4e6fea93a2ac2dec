"""Progress of long work where there is no terminal."""

import logging
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
