"""The files of a run lose no line to an error that passes."""

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from anew import Config
from anew.training.run_log import LogFile, RunLog, open_for_append, write_line


def test_line_is_whole_after_partial_writes_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    calls = 0

    def write(file: int, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise OSError(errno.EIO, "Input/output error")
        return real_write(file, content[:7])

    rows = [{"step": step, "text": "x" * 20} for step in range(3)]
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with open_for_append(path) as file:
        for row in rows:
            write_line(file, row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert calls > 20


def test_tensorboard_continues_in_another_file_after_an_error_that_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event_accumulator: Any = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )

    class Failed:
        def add_scalar(self, *_: Any) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

    with RunLog(tmp_path, Config(), step=0) as run_log:
        run_log.tensorboard.close()
        run_log.tensorboard = Failed()
        run_log.row({"step": 1, "train/loss": 1.0})
        run_log.row({"step": 2, "train/loss": 2.0})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2]
    assert "Stale file handle; TensorBoard lacks" in caplog.text


def test_log_file_shows_only_errors_that_do_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stream:
        error: OSError | None = OSError(errno.EIO, "Input/output error")

        def write(self, text: str) -> None:
            if self.error is not None:
                raise self.error

    record = logging.LogRecord("anew", logging.INFO, __file__, 0, "a line", None, None)
    handler = LogFile(tmp_path / "log.txt", delay=True)
    stream: Any = Stream()
    handler.stream = stream
    handler.emit(record)
    assert capsys.readouterr().err == ""
    stream.error = OSError(errno.EACCES, "Permission denied")
    handler.emit(record)
    assert "Permission denied" in capsys.readouterr().err
