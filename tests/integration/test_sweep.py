"""Experiments of many runs: whole trials, cut into pieces, as one person would run them."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from anew.bench import sweep as trials_module
from anew.bench import time_to_loss
from anew.bench.sweep import Ended, Trial, ended, limited, run_all
from anew.bench.time_to_loss import Arm, Plan, Ratio, against, crossing
from anew.checkpoint import folder as checkpoint
from anew.cli import experiments
from anew.config.schema import Config
from anew.errors import Preempted, UserError
from anew.optim import build as optim
from anew.training.trainer import train
from anew.utils.signals import stop_on_signals
from tests.unit.training.test_trainer import StopAt


@pytest.fixture
def small(tiny: Config) -> Config:
    return tiny.override(steps=20, val_tokens=500)


def test_trials_that_are_stopped_go_on_and_the_complete_are_not_run_again(
    small: Config, tmp_path: Path
) -> None:
    trials = [Trial(f"lr-{lr:g}", small.override(lr=lr)) for lr in (1e-3, 3e-3)]
    told: list[str] = []
    with limited(0) as stop, pytest.raises(Preempted):
        stop_in_second = lambda trial, end: (told.append(trial.name), stop.set())  # noqa: E731
        run_all(trials, tmp_path, stop, stop_in_second)
    assert told == ["lr-0.001"]
    assert not (tmp_path / "lr-0.003").exists()
    before = (tmp_path / "lr-0.001" / "metrics.jsonl").read_bytes()
    with limited(0) as stop:
        ends = run_all(trials, tmp_path, stop, lambda *_: None)
    assert (tmp_path / "lr-0.001" / "metrics.jsonl").read_bytes() == before
    assert {name: end.tokens for name, end in ends.items()} == {
        "lr-0.001": 20 * 128,
        "lr-0.003": 20 * 128,
    }
    assert ends["lr-0.001"].loss > ends["lr-0.003"].loss


def _one_of_two(config: Config, out: Path, mine: Path) -> None:
    """Another terminal: all trials of an experiment, and which of them this process has trained."""
    import torch

    torch.set_num_threads(1)
    trained = []
    with limited(0) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials_module, "train", lambda c: (trained.append(c.folder.name), train(c)))
        ends = run_all(
            [Trial(f"seed-{seed}", config.override(seed=seed)) for seed in range(6)],
            out,
            stop,
            lambda *_: None,
        )
    mine.write_text(
        json.dumps({"trained": trained, "losses": {name: end.loss for name, end in ends.items()}})
    )


def test_two_processes_share_an_experiment(small: Config, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found = [tmp_path / "first.json", tmp_path / "second.json"]
    processes = [
        context.Process(target=_one_of_two, args=(small, tmp_path / "out", mine)) for mine in found
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    first, second = (json.loads(path.read_text()) for path in found)
    assert sorted(first["trained"] + second["trained"]) == [f"seed-{seed}" for seed in range(6)]
    assert first["losses"] == second["losses"]
    assert list(first["losses"]) == [f"seed-{seed}" for seed in range(6)]


def test_a_trial_stopped_in_the_middle_is_no_result(small: Config, tmp_path: Path) -> None:
    trial = Trial("one", small)
    with pytest.raises(Preempted):
        train(small.override(out=str(tmp_path / "one")), StopAt(7))
    assert ended(trial, tmp_path) is None
    with limited(0) as stop:
        assert run_all([trial], tmp_path, stop, lambda *_: None)["one"].tokens == 20 * 128


def test_a_folder_of_another_trial_is_refused(small: Config, tmp_path: Path) -> None:
    with limited(0) as stop:
        run_all([Trial("one", small)], tmp_path, stop, lambda *_: None)
    with pytest.raises(UserError, match=re.escape("lr: 0.003 -> 0.001")):
        ended(Trial("one", small.override(lr=1e-3)), tmp_path)


def test_the_time_limit_is_a_real_signal(small: Config, tmp_path: Path) -> None:
    newest = None
    for seconds in (1, 5, 25, 125):  # on a busy machine the first may be over before the first step
        with limited(seconds / 60) as stop, pytest.raises(Preempted):
            run_all([Trial("long", small.override(steps=100_000))], tmp_path, stop, lambda *_: None)
        newest, _ = checkpoint.newest(tmp_path / "long")
        if newest is not None:
            break
    assert newest is not None, "the run under way was asked to save"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_trial_whose_checkpoint_was_lost_is_run_again(small: Config, tmp_path: Path) -> None:
    """The last validation is written down before the last checkpoint is whole."""
    with limited(0) as stop:
        run_all([Trial("one", small)], tmp_path, stop, lambda *_: None)
        folder = checkpoint.folder_of(tmp_path / "one", 20)
        shutil.rmtree(folder)
        assert ended(Trial("one", small), tmp_path) is None
        run_all([Trial("one", small)], tmp_path, stop, lambda *_: None)
    assert folder.is_dir()


def test_a_signal_that_comes_while_a_trial_ends_is_for_the_experiment() -> None:
    with limited(0) as stop:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.is_set()
        assert stop.is_set()


def test_a_run_that_diverges_is_a_result_and_not_the_end(small: Config, tmp_path: Path) -> None:
    trials = [Trial("wild", small.override(lr=1e30, min_lr=0.0, bad_steps=3)), Trial("tame", small)]
    for _ in range(2):  # the second time nothing is run
        with limited(0) as stop:
            ends = run_all(trials, tmp_path, stop, lambda *_: None)
        assert math.isinf(ends["wild"].loss)
        assert ends["tame"].loss < 5


@pytest.mark.parametrize(("settings", "given", "words"), [
    ({"val_tokens": 0}, (), "held-out loss"),
    ({"disk_budget": "1GB"}, (), "disk budget"),
    ({}, ("min_lr",), "--min-lr is what the arms differ in"),
])  # fmt: skip
def test_what_would_spoil_the_comparison_is_refused(
    small: Config, settings: dict[str, Any], given: tuple[str, ...], words: str
) -> None:
    class Wishes:
        seeds, minutes, picture = 1, 0.0, ""

    with pytest.raises(UserError, match=words):
        experiments.recipe(small.override(**settings), "cpu", Wishes(), given)


def test_a_run_that_diverged_is_no_point_of_a_curve() -> None:
    assert crossing([(100.0, math.inf), (200.0, 4.9), (300.0, 4.0)], 4.9) == (200.0, "at most ")
    assert crossing([(100.0, math.inf), (200.0, math.inf)], 4.9) == (200.0, "at least ")
    assert str(Ratio.of([(2.0, "at least "), (3.0, "")])).startswith("at least 2.50")
    assert str(Ratio.of([(2.0, "at least "), (3.0, "at most ")])).startswith("about 2.50")


def test_tokens_at_a_loss_are_read_off_between_horizons_and_never_beyond() -> None:
    points = [(100.0, 5.0), (200.0, 4.0), (400.0, 3.5)]
    assert crossing(points, 4.0) == (pytest.approx(200), "")
    assert crossing(points, 4.5) == (pytest.approx(math.sqrt(100 * 200)), "")
    assert crossing(points, 6.0) == (100.0, "at most ")
    assert crossing(points, 3.0) == (400.0, "at least ")
    fast = [Arm("fast", int(x), (x / 10,) * 2, (y, y)) for x, y in points]
    assert str(against(Arm("adamw", 800, (50.0, 50.0), (4.0, 4.5)), fast)) == "4.83 (4.00 to 5.66)"
    assert str(against(Arm("adamw", 800, (50.0, 50.0), (6.0, 4.0)), fast)).startswith("at least ")


@pytest.mark.parametrize("width", [32, 768])
def test_the_protocol_is_fair(small: Config, width: int) -> None:
    """AdamW has no fewer tuning runs, no arm a seed that tuning has seen; a seed is the same tokens; every arm anneals to its own end."""
    config = small.override(steps=200, n_embd=width)
    plan = Plan(config, (1, 2, 3), time_to_loss.tuning(config))
    assert len(plan.tuning["adamw"]) >= len(plan.tuning["fast"])
    best = {arm: settings[0] for arm, settings in plan.tuning.items()}
    for name, share, trials in plan.arms(best):
        for seed, trial in zip(plan.seeds, trials, strict=True):
            c = trial.config
            assert c.run.seed == seed != time_to_loss.TUNING_SEED
            assert c.run.steps == round(share * 200)
            assert (c.data, c.model.n_embd, c.optim.beta2) == (
                config.data,
                config.model.n_embd,
                config.optim.beta2,
            )
            assert c.optim.optimizer == ("muon" if name == "fast" else "adamw")
            assert c.total_tokens == pytest.approx(share * config.total_tokens, rel=0.02)
            assert optim.rate(c.run.steps, c.run.steps, c.optim) == pytest.approx(
                0.1 if name == "reference" else 0.0
            )


def test_the_whole_experiment_in_pieces(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        time_to_loss,
        "tuning",
        lambda _: {"adamw": ({"lr": 3e-3},), "fast": ({"lr": 3e-3, "muon_lr": 0.02},)},
    )
    config = small.override(out=str(tmp_path / "out"), steps=30)

    class Wishes:
        seeds, minutes, picture = 2, 1.5 / 60, str(tmp_path / "picture.png")

    for _ in range(100):
        with contextlib.suppress(Preempted):
            facts = experiments.recipe(config, "cpu", Wishes())
            break
    assert _ > 0, "it was stopped at least once"
    shown = capsys.readouterr().out.rpartition("runs in")[2]
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["tuned"] == facts["tuned"]
    assert [arm["name"] for arm in facts["arms"]] == [
        "reference",
        "adamw",
        *["fast"] * len(time_to_loss.SHARES),
    ]
    assert all(len(line) <= 80 for line in shown.split("losses of the")[1].splitlines()), shown
    for arm in facts["arms"]:
        for seed, loss in zip((1, 2), arm["losses"], strict=True):
            runs = [
                p
                for p in (tmp_path / "out").iterdir()
                if p.name.startswith(arm["name"]) and p.name.endswith(f"seed-{seed}")
            ]
            ours = [
                Ended(
                    run,
                    config,
                    0,
                    0,
                    json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"],
                )
                for run in runs
            ]
            assert min(abs(end.loss - loss) for end in ours) < 1e-5, (
                "transformers finds the loss that training wrote down"
            )


def test_a_sweep_shows_every_run_and_the_best(small: Config, tmp_path: Path, capsys: Any) -> None:
    class Wishes:
        over, minutes, picture = (
            "lr=1e-3,4e-3 weight-decay=0.0,0.1",
            0.0,
            str(tmp_path / "curves.png"),
        )

    facts = experiments.sweep(small.override(out=str(tmp_path / "out")), "cpu", Wishes())
    shown = capsys.readouterr().out
    assert [(run["lr"], run["weight_decay"]) for run in facts["runs"]] == [
        (1e-3, 0.0),
        (1e-3, 0.1),
        (4e-3, 0.0),
        (4e-3, 0.1),
    ]
    best = min(run["loss"] for run in facts["runs"])
    assert f"{best:.4f}*" in shown
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_sweep_over_seeds_is_judged_by_the_mean(
    small: Config, tmp_path: Path, capsys: Any
) -> None:
    class Wishes:
        over, minutes, picture = "lr=1e-3,4e-3 seed=1,2", 0.0, ""

    facts = experiments.sweep(small.override(out=str(tmp_path / "out")), "cpu", Wishes())
    *_, slow, fast = [
        line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("0.00")
    ]
    losses = [run["loss"] for run in facts["runs"]]
    assert f"{sum(losses[2:]) / 2:.4f}*" in fast
    assert f"{sum(losses[:2]) / 2:.4f}" in slow
    assert (slow + fast).count("*") == 1


@pytest.mark.parametrize("over", ["", "lr", "speed=1,2", "steps=ten", "lr=1 steps=2 seed=3"])
def test_what_is_no_sweep_is_refused_in_words(small: Config, over: str) -> None:
    class Wishes:
        minutes, picture = 0.0, ""

    wishes = Wishes()
    wishes.over = over
    with pytest.raises(UserError, match="over"):
        experiments.sweep(small, "cpu", wishes)
