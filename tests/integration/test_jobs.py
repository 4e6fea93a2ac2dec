"""Experiments with several runs at a time: `--jobs`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anew.bench import sweep
from anew.bench.jobs import other_processes
from anew.bench.sweep import Trial, TrialResult, run_trials, stop_after
from anew.checkpoint.folder import newest_valid
from anew.config.config import Config
from anew.training.trainer import train
from tests.faults.common import flags

if os.name == "nt":
    pytest.skip("these tests send POSIX signals", allow_module_level=True)

SECONDS = 120  # to wait for processes on a busy machine
OVER = "lr=1e-3,2e-3"
NAMES = ["lr=0.001", "lr=0.002"]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.1)


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.fixture
def trials(tiny: Config) -> list[Trial]:
    config = tiny.override(val_tokens=500)
    return [Trial(f"seed-{seed}", config.override(seed=seed)) for seed in range(4)]


def test_other_processes_take_runs(
    trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    reported: list[str] = []

    def train_after_another_process(config: Config) -> None:
        own = config.folder.name
        others = [tmp_path / trial.name for trial in trials if trial.name not in [own, *trained]]
        wait_until(lambda: any((folder / "config.json").exists() for folder in others))
        trained.append(own)
        train(config)

    def report(trial: Trial, _: TrialResult) -> None:
        reported.append(trial.name)

    monkeypatch.setattr(sweep, "train", train_after_another_process)
    with stop_after(0) as stop:
        results = run_trials(trials[:2], tmp_path, stop, report, jobs=2)
    assert trained == ["seed-0"]
    assert list(results) == ["seed-0", "seed-1"]
    assert sorted(reported) == ["seed-0", "seed-1"]


def wait_for_ever(pids: Path) -> None:
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(3600)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_runs_of_a_process_that_dies_are_taken_by_the_others(
    trials: list[Trial], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / "pids"
    with other_processes(2, "cpu", wait_for_ever, pids):
        wait_until(lambda: len(lines(pids)) == 2)
        os.kill(int(lines(pids)[0]), signal.SIGKILL)
        with stop_after(0) as stop:
            results = run_trials(trials[:1], tmp_path / "out", stop, lambda *_: None)
    assert list(results) == ["seed-0"]
    assert "ended with exit code -9; the others have taken its runs" in caplog.text
    assert caplog.text.count("ended with exit code") == 1, "the other one was asked to stop"
    assert all(has_ended(int(pid)) for pid in lines(pids))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_process_has_its_share(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = tmp_path / "shares"
    with other_processes(2, device, write_share, found):
        wait_until(lambda: len(lines(found)) == 2)
    assert sorted(lines(found)) == (["1:3", "1:5"] if device == "cuda" else ["1:3,5"] * 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def write_share(found: Path) -> None:
    with found.open("a") as file:
        file.write(f"{os.environ['OMP_NUM_THREADS']}:{os.environ['CUDA_VISIBLE_DEVICES']}\n")


def sweep_command(config: Config, out: Path, jobs: int) -> list[str]:
    settings = flags(config.override(out=str(out), val_tokens=500))
    words = ["bench", "sweep", "demo", *settings, "--over", OVER, "--jobs", str(jobs), "--json"]
    return [sys.executable, "-m", "anew", *words]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def both_have_taken_steps(out: Path) -> bool:
    files = [out / name / "metrics.jsonl" for name in NAMES]
    return all(file.exists() and file.stat().st_size for file in files)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_command_ends_all_its_processes(
    number: signal.Signals, tiny: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = sweep_command(tiny.override(steps=100_000, save_every=100_000), out, jobs=2)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: both_have_taken_steps(out) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    others = children(process.pid)
    assert others
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    wait_until(lambda: all(has_ended(pid) for pid in others))
    expected = 75 if number == signal.SIGTERM else -signal.SIGKILL
    assert process.returncode == expected, errors
    saved = [newest_valid(out / name)[0] for name in NAMES]
    # The process that is killed saves nothing; the other one saves in either case.
    assert sum(folder is not None for folder in saved) == (2 if expected == 75 else 1)


def test_sweep_with_two_jobs_finds_what_one_job_finds(tiny: Config, tmp_path: Path) -> None:
    found = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for jobs in (1, 2):
        command = sweep_command(tiny, tmp_path / str(jobs), jobs)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert all(f"{name} " in done.stdout for name in NAMES)
        found.append(json.loads(done.stdout.splitlines()[-1])["runs"])
    assert found[0] == found[1]
