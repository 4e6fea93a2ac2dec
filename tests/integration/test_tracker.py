"""`--track`: a service receives the metrics, and can neither stop nor slow the training."""

import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anew import Config
from anew.training import tracker
from anew.training.run_log import read_metrics
from anew.training.trainer import train

CLIENT = """
import json, os
received = []

def init(**options):
    received.append(options)
    {at_init}

def log(row, step):
    {at_log}
    received.append((step, row))

def finish():
    with open(os.environ["RECEIVED"], "w") as file:
        json.dump(received, file)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder for a module that stands in for the client wandb."""
    folder = tmp_path / "client"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("RECEIVED", str(tmp_path / "received.json"))
    yield folder
    sys.modules.pop("wandb", None)


def test_client_that_fails_is_reported_once_and_the_run_goes_on(
    tiny: Config, stand_in: Path
) -> None:
    code = CLIENT.format(at_init="pass", at_log="if step > 3: raise OSError('connection lost')")
    (stand_in / "wandb.py").write_text(code)
    result = train(tiny.override(track="wandb"))
    assert result.step == 12
    assert len([row for row in read_metrics(tiny.folder) if "train/loss" in row]) == 12
    log = (tiny.folder / "log.txt").read_text()
    assert log.count("--track wandb ended (connection lost); the run continues") == 1


def test_client_that_never_answers_does_not_hold_the_run(
    tiny: Config, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = CLIENT.format(at_init="import threading; threading.Event().wait()", at_log="pass")
    (stand_in / "wandb.py").write_text(code)
    monkeypatch.setattr(tracker, "SECONDS_AT_THE_END", 0.1)
    monkeypatch.setattr(tracker, "MOST_WAITING_ROWS", 3)
    assert train(tiny.override(track="wandb")).step == 12


def test_missing_client_is_reported_with_what_to_install(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    train(tiny.override(track="trackio"))
    assert "pip install trackio" in (tiny.folder / "log.txt").read_text()


def test_wandb_receives_the_metrics_offline(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tiny.override(track="wandb"))
    assert "--track wandb ended" not in (tiny.folder / "log.txt").read_text()
    [file] = (tiny.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert content.count(b"train/loss") >= 12
    assert b"weight_decay" in content


def test_trackio_receives_the_metrics(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="trackio is not installed")
    train(tiny.override(track="trackio"))
    assert "--track trackio ended" not in (tiny.folder / "log.txt").read_text()
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    losses = [metrics for _, metrics in rows if "train/loss" in str(metrics)]
    assert len(losses) == 12
