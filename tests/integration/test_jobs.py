"""Experiments with several runs at a time: `--jobs`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anew.bench import sweep
from anew.bench.jobs import other_processes
from anew.bench.sweep import Trial, TrialResult, run_trials, stop_after, take_trials
from anew.checkpoint.folder import newest_valid
from anew.config.config import Config
from anew.training.run_log import read_run_state
from anew.training.trainer import train
from tests.faults.common import flags

if not Path("/proc/self/task").exists():
    pytest.skip("these tests read the processes of Linux", allow_module_level=True)

SECONDS = 90  # to wait for processes on a busy machine
OVER = "lr=1e-3,2e-3"
NAMES = ["lr=0.001", "lr=0.002"]
LONG = {"steps": 100_000, "save_every": 100_000}


def wait_until(condition: Callable[[], bool]) -> None:
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


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def has_taken_steps(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


@pytest.fixture
def trials(tiny: Config) -> list[Trial]:
    config = tiny.override(val_tokens=500)
    return [Trial(f"seed-{seed}", config.override(seed=seed)) for seed in range(2)]


def test_another_process_takes_runs(
    trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    reported: list[str] = []

    def train_after_the_other_has_begun(config: Config) -> None:
        trained.append(config.folder.name)
        [other] = [tmp_path / trial.name for trial in trials if trial.name != trained[0]]
        wait_until(lambda: (other / "config.json").exists())
        train(config)

    def report(trial: Trial, _: TrialResult) -> None:
        reported.append(trial.name)

    monkeypatch.setattr(sweep, "train", train_after_the_other_has_begun)
    with stop_after(0) as stop:
        results = run_trials(trials, tmp_path, stop, report, jobs=2)
    assert trained == ["seed-0"]
    assert list(results) == ["seed-0", "seed-1"]
    assert sorted(reported) == ["seed-0", "seed-1"]
    log = (tmp_path / "seed-1" / "log.txt").read_text()
    assert "12/12 loss" in log, "the log file is as detailed as in a single process"


def test_run_of_a_process_that_dies_is_continued(
    trials: list[Trial], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [trial, _] = trials
    trial = Trial(trial.name, trial.config.override(steps=1000, save_every=100))
    run = tmp_path / trial.name
    with other_processes(1, "cpu", 1, take_trials, ([trial], tmp_path)):
        wait_until(lambda: newest_valid(run)[0] is not None)
        other = read_run_state(run)["pid"]
        assert other != os.getpid()
        os.kill(other, signal.SIGKILL)
        with stop_after(0) as stop:
            run_trials([trial], tmp_path, stop, lambda *_: None)
    assert read_run_state(run)["starts"] == 2
    assert "ended with exit code -9; its unfinished run is continued" in caplog.text


def test_processes_that_are_asked_to_stop_are_not_reported(
    trials: list[Trial], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [trial, _] = trials
    trial = Trial(trial.name, trial.config.override(**LONG))
    run = tmp_path / trial.name
    with other_processes(2, "cpu", 1, take_trials, ([trial], tmp_path)):
        wait_until(lambda: has_taken_steps(run))
        pid = read_run_state(run)["pid"]
    assert has_ended(pid)
    assert newest_valid(run)[0] is not None, "it has saved"
    assert "exit code" not in caplog.text


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("3,5", ["5", "3"]),
        ("GPU-a,GPU-b,GPU-c", ["GPU-b", "GPU-a"]),
        (None, ["1", "0"]),
    ],
)
def test_processes_get_the_gpus_in_turn(
    visible: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process uses the first GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = tmp_path / "environments"
    with threads(6), other_processes(2, "cuda", 3, write_environment, (found,)):
        assert torch.get_num_threads() == 3
        wait_until(lambda: found.exists() and len(found.read_text().split()) == 2)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert sorted(found.read_text().split()) == sorted(f"3:3:{gpu}" for gpu in seen)


def write_environment(found: Path) -> None:
    values = (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"])
    with found.open("a") as file:
        file.write(f"{torch.get_num_threads()}:{':'.join(values)}\n")


def sweep_command(config: Config, out: Path, jobs: int) -> list[str]:
    settings = flags(config.override(out=str(out), val_tokens=500))
    words = ["bench", "sweep", "demo", *settings, "--over", OVER, "--jobs", str(jobs), "--json"]
    return [sys.executable, "-m", "anew", *words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_command_ends_all_its_processes(
    number: signal.Signals, tiny: Config, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs = [out / name for name in NAMES]
    command = sweep_command(tiny.override(**LONG), out, jobs=2)
    others: list[int] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: all(map(has_taken_steps, runs)) or process.poll() is not None)
            others = children(process.pid)
            assert others, process.communicate()[1]
            process.send_signal(number)
            _, errors = process.communicate(timeout=SECONDS)
            wait_until(lambda: all(map(has_ended, others)))
        finally:
            for pid in (process.pid, *others):
                if not has_ended(pid):
                    os.kill(pid, signal.SIGKILL)
    is_killed = number == signal.SIGKILL
    assert process.returncode == (-signal.SIGKILL if is_killed else 75), errors
    saved = [run for run in runs if newest_valid(run)[0] is not None]
    # The process that is killed saves nothing; the other one saves in either case.
    assert len(saved) == (1 if is_killed else 2)


def test_sweep_with_two_jobs_finds_what_one_job_finds(tiny: Config, tmp_path: Path) -> None:
    found = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    config = tiny.override(steps=800)  # long enough for the second process to start
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        command = sweep_command(config, out, jobs)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert all(f"{name} " in done.stdout for name in NAMES)
        assert len({read_run_state(out / name)["pid"] for name in NAMES}) == jobs
        found.append(json.loads(done.stdout.splitlines()[-1])["runs"])
    assert found[0] == found[1]
