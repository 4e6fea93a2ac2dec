"""The protocol of the recipe experiment, and the tokens read off between horizons."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from anew.bench import time_to_loss
from anew.bench.time_to_loss import Arm, Bounded, Experiment, Ratio, against, crossing
from anew.cli import experiments
from anew.config.config import Config
from anew.errors import UserError
from anew.optim.schedule import learning_rate_factor


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({"val_tokens": 0}, (), "held-out loss"),
        ({"disk_budget": "1GB"}, (), "disk budget"),
        ({}, ("min_lr",), "--min-lr is a setting in which the arms differ"),
    ],
)
def test_settings_that_spoil_the_comparison_are_refused(
    tiny: Config, settings: dict[str, Any], given: tuple[str, ...], words: str
) -> None:
    arguments = SimpleNamespace(seeds=1, minutes=0.0, jobs=1, picture="")
    config = tiny.override(**{"val_tokens": 500, **settings})
    with pytest.raises(UserError, match=words):
        experiments.recipe(config, "cpu", arguments, given)


def test_diverged_runs_are_left_out_of_a_curve() -> None:
    assert crossing([(100.0, math.inf), (200.0, 4.9), (300.0, 4.0)], 4.9) == (200.0, "at most ")
    assert crossing([(100.0, math.inf), (200.0, math.inf)], 4.9) == (200.0, "at least ")


def test_ratio_says_which_bounds_it_has() -> None:
    one_bound = Ratio.of([Bounded(2.0, "at least "), Bounded(3.0)])
    assert str(one_bound).startswith("at least 2.50")
    two_bounds = Ratio.of([Bounded(2.0, "at least "), Bounded(3.0, "at most ")])
    assert str(two_bounds).startswith("about 2.50")


def test_tokens_at_a_loss_are_interpolated_and_never_extrapolated() -> None:
    points = [(100.0, 5.0), (200.0, 4.0), (400.0, 3.5)]
    assert tuple(crossing(points, 4.0)) == (pytest.approx(200), "")
    assert tuple(crossing(points, 4.5)) == (pytest.approx(math.sqrt(100 * 200)), "")
    assert crossing(points, 6.0) == (100.0, "at most ")
    assert crossing(points, 3.0) == (400.0, "at least ")
    fast = [Arm("fast", int(x), (x / 10,) * 2, (y, y)) for x, y in points]
    within = Arm("adamw", 800, (50.0, 50.0), (4.0, 4.5))
    assert str(against(within, fast)) == "4.83 (4.00 to 5.66)"
    outside = Arm("adamw", 800, (50.0, 50.0), (6.0, 4.0))
    assert str(against(outside, fast)).startswith("at least ")


@pytest.mark.parametrize("width", [32, 768])
def test_protocol_favours_no_arm(tiny: Config, width: int) -> None:
    """AdamW has no fewer tuning runs, and tuning uses a seed that no arm uses.

    All arms read the same tokens for a seed, and every arm anneals to its own end.
    """
    config = tiny.override(steps=200, n_embd=width, val_tokens=500)
    experiment = Experiment(config, (1, 2, 3), time_to_loss.tuning(config))
    assert len(experiment.tuning["adamw"]) >= len(experiment.tuning["fast"])
    best = {arm: settings[0] for arm, settings in experiment.tuning.items()}
    for arm in experiment.arms(best):
        for seed, trial in zip(experiment.seeds, arm.trials, strict=True):
            run, optim = trial.config.run, trial.config.optim
            assert run.seed == seed
            assert run.seed != time_to_loss.TUNING_SEED
            assert run.steps == round(arm.share * 200)
            assert trial.config.data == config.data
            assert trial.config.model.n_embd == config.model.n_embd
            assert optim.beta2 == config.optim.beta2
            assert optim.optimizer == ("muon" if arm.name == "fast" else "adamw")
            expected_tokens = arm.share * config.total_tokens
            assert trial.config.total_tokens == pytest.approx(expected_tokens, rel=0.02)
            last_rate = 0.1 if arm.name == "reference" else 0.0
            assert learning_rate_factor(run.steps, run.steps, optim) == pytest.approx(last_rate)
