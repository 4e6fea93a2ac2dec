"""Learning rate and momentum against the values of the reference runs."""

import itertools
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anew.config.schema import OptimConfig
from anew.optim.schedule import learning_rate_factor, muon_momentum


def test_learning_rate_of_the_reference_run() -> None:
    config = OptimConfig()
    rates = [6e-4 * learning_rate_factor(step, 19_073, config) for step in range(19_073)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == pytest.approx(6e-4)
    assert rates[715] == pytest.approx(6e-4)
    middle = 715 + (19_073 - 715) / 2
    assert rates[round(middle)] == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-3)
    assert rates[-1] == pytest.approx(6e-5, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[714:]))


@given(
    steps=st.integers(1, 30),
    warmup=st.integers(0, 40),
    schedule=st.sampled_from(["cosine", "linear"]),
    min_lr=st.sampled_from([0.0, 1e-5]),
)
def test_learning_rate_is_above_zero_in_runs_of_any_length(
    steps: int, warmup: int, schedule: Literal["cosine", "linear"], min_lr: float
) -> None:
    config = OptimConfig(warmup_steps=warmup, schedule=schedule, min_lr=min_lr)
    assert all(0 < learning_rate_factor(step, steps, config) <= 1 for step in range(steps))


def test_learning_rate_is_constant_before_a_decay_share() -> None:
    config = OptimConfig(schedule="linear", warmup_steps=10, decay_share=0.4, min_lr=0.0)
    factors = [learning_rate_factor(step, 110, config) for step in range(110)]
    assert factors[9:70] == [1.0] * 61
    assert factors[70] == pytest.approx(1.0)
    assert factors[90] == pytest.approx(0.5)
    assert factors[109] == pytest.approx(1 / 40)


def test_muon_momentum_rises_during_its_warmup_and_stays() -> None:
    config = OptimConfig(muon_warmup=10)
    momenta = [round(muon_momentum(step, config), 4) for step in (0, 5, 10, 1000)]
    assert momenta == [0.85, 0.9, 0.95, 0.95]
    assert muon_momentum(0, OptimConfig()) == 0.95
