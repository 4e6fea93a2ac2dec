"""Experiments of many runs: whole trials, interrupted and continued as a user would."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anew.bench import sweep, time_to_loss
from anew.bench.sweep import Trial, TrialResult, result_of, run_trials, stop_after
from anew.checkpoint.folder import checkpoint_folder, newest_valid
from anew.cli import experiments
from anew.config.config import Config
from anew.errors import Preempted, UserError
from anew.training.trainer import train

SEEDS = [f"seed-{seed}" for seed in range(6)]


@pytest.fixture
def small(tiny: Config) -> Config:
    return tiny.override(steps=20, val_tokens=500)


def run(trials: list[Trial], out: Path) -> dict[str, TrialResult]:
    with stop_after(0) as stop:
        return run_trials(trials, out, stop, lambda *_: None)


def test_stopped_trials_continue_and_complete_ones_are_not_run_again(
    small: Config, tmp_path: Path
) -> None:
    trials = [Trial(f"lr-{lr:g}", small.override(lr=lr)) for lr in (1e-3, 3e-3)]
    reported: list[str] = []
    with stop_after(0) as stop, pytest.raises(Preempted):

        def report(trial: Trial, _: TrialResult) -> None:
            reported.append(trial.name)
            stop.set()

        run_trials(trials, tmp_path, stop, report)
    assert reported == ["lr-0.001"]
    assert not (tmp_path / "lr-0.003").exists()
    metrics = tmp_path / "lr-0.001" / "metrics.jsonl"
    before = metrics.read_bytes()
    results = run(trials, tmp_path)
    assert metrics.read_bytes() == before
    assert results["lr-0.001"].tokens == 20 * 128
    assert results["lr-0.003"].tokens == 20 * 128
    assert len(results) == 2
    assert results["lr-0.001"].loss > results["lr-0.003"].loss


def _one_of_two(config: Config, out: Path, mine: Path) -> None:
    """Run all trials of an experiment; write down which of them this process has trained."""
    import torch

    torch.set_num_threads(1)
    trained = []

    def recorded_train(config: Config) -> None:
        trained.append(config.folder.name)
        train(config)

    trials = [Trial(f"seed-{seed}", config.override(seed=seed)) for seed in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "train", recorded_train)
        results = run(trials, out)
    losses = {name: result.loss for name, result in results.items()}
    mine.write_text(json.dumps({"trained": trained, "losses": losses}))


def test_two_processes_share_an_experiment(small: Config, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    processes = [
        context.Process(target=_one_of_two, args=(small, tmp_path / "out", path)) for path in paths
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    first, second = (json.loads(path.read_text()) for path in paths)
    assert sorted(first["trained"] + second["trained"]) == SEEDS
    assert first["losses"] == second["losses"]
    assert list(first["losses"]) == SEEDS


def test_interrupted_trial_has_no_result(small: Config, tmp_path: Path) -> None:
    def stop_at_step_7(row: dict[str, Any]) -> None:
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    trial = Trial("one", small)
    with pytest.raises(Preempted):
        train(small.override(out=str(tmp_path / "one")), stop_at_step_7)
    assert result_of(trial, tmp_path) is None
    assert run([trial], tmp_path)["one"].tokens == 20 * 128


def test_folder_of_another_trial_is_refused(small: Config, tmp_path: Path) -> None:
    run([Trial("one", small)], tmp_path)
    with pytest.raises(UserError, match=re.escape("lr: 0.003 -> 0.001")):
        result_of(Trial("one", small.override(lr=1e-3)), tmp_path)


def test_time_limit_sends_a_signal_that_saves_the_run(small: Config, tmp_path: Path) -> None:
    trial = Trial("long", small.override(steps=100_000))
    saved = None
    # On a busy machine a short limit may be over before the first step.
    for seconds in (1, 5, 25, 125):
        with stop_after(seconds / 60) as stop, pytest.raises(Preempted):
            run_trials([trial], tmp_path, stop, lambda *_: None)
        saved, _ = newest_valid(tmp_path / "long")
        if saved is not None:
            break
    assert saved is not None, "the current run saved a checkpoint"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_trial_without_its_checkpoint_is_run_again(small: Config, tmp_path: Path) -> None:
    """The last validation is recorded before the last checkpoint is complete."""
    trial = Trial("one", small)
    run([trial], tmp_path)
    folder = checkpoint_folder(tmp_path / "one", 20)
    shutil.rmtree(folder)
    assert result_of(trial, tmp_path) is None
    run([trial], tmp_path)
    assert folder.is_dir()


def test_divergence_is_a_result_and_does_not_end_the_experiment(
    small: Config, tmp_path: Path
) -> None:
    trials = [Trial("wild", small.override(lr=1e30, min_lr=0.0, bad_steps=3)), Trial("tame", small)]
    for _ in range(2):  # the second time nothing is run
        results = run(trials, tmp_path)
        assert math.isinf(results["wild"].loss)
        assert results["tame"].loss < 5


def test_recipe_experiment_in_pieces(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tuning = {"adamw": ({"lr": 3e-3},), "fast": ({"lr": 3e-3, "muon_lr": 0.02},)}
    monkeypatch.setattr(time_to_loss, "tuning", lambda _: tuning)
    out = tmp_path / "out"
    config = small.override(out=str(out), steps=30)
    picture = tmp_path / "picture.png"
    arguments = SimpleNamespace(seeds=2, minutes=1.5 / 60, jobs=1, picture=str(picture))
    stops = 0
    facts = None
    while facts is None:
        assert stops < 100
        with contextlib.suppress(Preempted):
            facts = experiments.recipe(config, "cpu", arguments)
        stops += facts is None
        arguments.minutes *= 1.1  # on a busy machine the first times may be too short for a step
    assert stops > 0, "it was stopped at least once"
    shown = capsys.readouterr().out.rpartition("runs in")[2]
    assert picture.stat().st_size > 5000
    assert json.loads((out / "recipe.json").read_text())["tuned"] == facts["tuned"]
    fast_arms = ["fast"] * len(time_to_loss.SHARES)
    assert [arm["name"] for arm in facts["arms"]] == ["reference", "adamw", *fast_arms]
    verdict = shown.split("losses are computed")[1]
    assert all(len(line) <= 80 for line in verdict.splitlines()), shown
    for arm in facts["arms"]:
        for seed, loss in zip((1, 2), arm["losses"], strict=True):
            folders = out.glob(f"{arm['name']}*seed-{seed}")
            losses = [_last_validation_loss(folder) for folder in folders]
            difference = min(abs(own - loss) for own in losses)
            assert difference < 1e-5, "transformers computes the loss that training recorded"


def _last_validation_loss(run: Path) -> float:
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["val/loss"])


def test_sweep_prints_every_run_and_marks_the_best(
    small: Config, tmp_path: Path, capsys: Any
) -> None:
    picture = tmp_path / "curves.png"
    over = "lr=1e-3,4e-3 weight-decay=0.0,0.1"
    arguments = SimpleNamespace(over=over, minutes=0.0, jobs=1, picture=str(picture))
    facts = experiments.sweep(small.override(out=str(tmp_path / "out")), "cpu", arguments)
    shown = capsys.readouterr().out
    grid = [(1e-3, 0.0), (1e-3, 0.1), (4e-3, 0.0), (4e-3, 0.1)]
    assert [(run["lr"], run["weight_decay"]) for run in facts["runs"]] == grid
    best = min(run["loss"] for run in facts["runs"])
    assert f"{best:.4f}*" in shown
    assert picture.stat().st_size > 5000


def test_sweep_over_seeds_marks_the_best_mean(small: Config, tmp_path: Path, capsys: Any) -> None:
    arguments = SimpleNamespace(over="lr=1e-3,4e-3 seed=1,2", minutes=0.0, jobs=1, picture="")
    facts = experiments.sweep(small.override(out=str(tmp_path / "out")), "cpu", arguments)
    shown = capsys.readouterr().out.splitlines()
    *_, slow, fast = [line for line in shown if line.strip().startswith("0.00")]
    losses = [run["loss"] for run in facts["runs"]]
    assert f"{sum(losses[2:]) / 2:.4f}*" in fast
    assert f"{sum(losses[:2]) / 2:.4f}" in slow
    assert (slow + fast).count("*") == 1
