"""Checkpoints beside training: what is saved is the step it says, when it is due, by one process,
and the rest may go.
"""

import hashlib
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anew import UserError
from anew.checkpoint import folder as checkpoint
from anew.training.outlier_detector import WARM_UP_STEPS, OutlierDetector
from anew.training.train_state import Snapshot
from anew.training.trainer import train
from tests.faults.common import flags, tiny


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of the weights that a checkpoint holds: padding rows left out."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        rows = tensors[name][:257] if name.endswith("wte.weight") else tensors[name]
        found.update(rows.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_checkpoint_has_the_weights_of_its_step_while_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save is held up until three more steps were trained."""
    config = tiny(tmp_path / "run", steps=20, save_every=5, keep=0)
    module = importlib.import_module("anew.training.trainer")
    original_step, original_write = module.train_step, Snapshot.write
    expected: dict[int, str] = {}
    further: dict[int, int] = {}
    went_on = threading.Event()
    saving = 0

    def step(loss_of: Any, state: Any, *rest: Any, **more: Any) -> Any:
        outcome = original_step(loss_of, state, *rest, **more)
        expected[state.step + 1] = digest(dict(state.model.named_parameters()))
        if state.step + 1 >= saving + 3:
            went_on.set()
        return outcome

    def write(self: Snapshot, *rest: Any) -> None:
        nonlocal saving
        saving = self.step
        went_on.clear()
        if self.step < 20:
            assert went_on.wait(30), "training waited for the save"
            further[self.step] = max(expected)
        original_write(self, *rest)

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(Snapshot, "write", write)
    train(config)
    saved = {
        int(p.name[5:]): digest(load_file(p / "model.safetensors"))
        for p in checkpoint.list_checkpoints(config.folder)
    }
    assert saved == {step: expected[step] for step in (5, 10, 15, 20)}
    assert len(set(saved.values())) == 4
    assert all(further[step] >= step + 3 for step in (5, 10, 15))


def test_newest_checkpoints_and_multiples_of_keep_every_are_kept(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", steps=40, save_every=5, keep=2, keep_every=15)
    train(config)
    assert [int(p.name[5:]) for p in checkpoint.list_checkpoints(config.folder)] == [15, 30, 35, 40]


def test_checkpoints_are_saved_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the saver goes three minutes a step."""
    config = tiny(tmp_path / "run", steps=22, save_every=1000, keep=0, save_minutes=10.0)
    module, saver = (
        importlib.import_module("anew.training.trainer"),
        importlib.import_module("anew.training.async_checkpoint"),
    )
    now = 0.0
    original = module.train_step

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal now
        now += 180
        return original(*arguments, **named)

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(saver.time, "monotonic", lambda: now)
    train(config)
    assert [int(p.name[5:]) for p in checkpoint.list_checkpoints(config.folder)] == [
        5,
        10,
        15,
        20,
        22,
    ]


def test_failed_save_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise RuntimeError("the disk has gone")

    monkeypatch.setattr(Snapshot, "write", write)
    config = tiny(tmp_path / "run")
    with pytest.raises(RuntimeError, match="the disk has gone"):
        train(config)
    state = json.loads((config.folder / "run_state.json").read_text())
    assert (state["status"], state["error"], state["saved_step"]) == (
        "failed",
        "the disk has gone",
        0,
    )


def test_only_one_process_writes_to_a_run(tmp_path: Path) -> None:
    """A second one is refused while the first runs, and may go on once it is gone, however it
    went.
    """
    config = tiny(tmp_path / "run", steps=100_000, save_every=20, log_every=1)
    command = [sys.executable, "-m", "anew", "train", "shakespeare", *flags(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if " loss " in line:
                break
        state = json.loads((config.folder / "run_state.json").read_text())
        assert (state["status"], state["pid"], state["steps"]) == ("running", first.pid, 100_000)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"another process is training in {config.folder}" in second.stderr
        assert first.poll() is None
        first.kill()
    third = config.override(steps=100_000)
    with pytest.raises(UserError, match="is another run"):
        train(third.override(lr=1e-3))  # it looks at the settings first
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as again:
        assert again.stderr is not None
        for line in again.stderr:
            if " loss " in line:
                break
        assert json.loads((config.folder / "run_state.json").read_text())["starts"] == 2
        again.terminate()
        assert again.wait(30) == 75
    state = json.loads((config.folder / "run_state.json").read_text())
    newest, skipped = checkpoint.newest_valid(config.folder)
    assert newest is not None
    assert not skipped
    assert (state["status"], state["saved_step"]) == ("preempted", int(newest.name[5:]))


def test_outlier_limits() -> None:
    usual = OutlierDetector()
    for i in range(WARM_UP_STEPS):
        assert usual.limits(6.0) == (float("inf"), float("inf"))
        usual.add(2.0 + 0.1 * (-1) ** i, 1.0)
    loss, norm = usual.limits(6.0)
    assert 2.5 < loss < 2.8  # 6 deviations of 0.1 above 2
    assert norm == pytest.approx(
        1.12
    )  # an even run: at least 2% of the mean counts as its deviation
    for _ in range(400):  # it follows a level that has changed, slowly
        usual.add(1.0, 3.0)
    loss, norm = usual.limits(6.0)
    assert loss < 1.5
    assert 3 < norm < 4
