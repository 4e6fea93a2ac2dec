"""The fit of loss and compute: against numpy, and on data with a known answer."""

import math
from typing import Any

import numpy as np
import pytest

from anew.bench.power_law import PowerLaw, multiplier, t_quantile

FLOPS = np.array([1e12, 2e12, 5e12, 1e13, 3e13, 6e13])
SIMULATIONS = 2000


def fit(losses: Any) -> PowerLaw:
    """Fit losses of one seed for each of FLOPS."""
    return PowerLaw.fit(FLOPS.tolist(), np.reshape(losses, (-1, 1)).tolist())


def noisy_law(
    random: np.random.Generator, constant: float, exponent: float, noise: float, seeds: int = 1
) -> PowerLaw:
    """Fit constant * FLOPS^-exponent with noise in the logarithm of each run's loss."""
    log_losses = math.log(constant) - exponent * np.log(FLOPS)[:, None]
    log_losses = log_losses + noise * random.standard_normal((len(FLOPS), seeds))
    return PowerLaw.fit(FLOPS.tolist(), np.exp(log_losses).tolist())


def covers(low: float, high: float, truth: float) -> bool:
    return low <= truth <= high


@pytest.mark.parametrize("freedom", range(1, 31))
def test_student_t_lies_within_its_quantiles_with_95_percent(freedom: int) -> None:
    t = np.linspace(0, t_quantile(freedom), 100_001)
    constant = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    probability = 2 * constant / math.sqrt(freedom * math.pi) * np.trapezoid(density, t)
    assert probability == pytest.approx(0.95, abs=5e-6)
    assert t_quantile(100) == t_quantile(30)


def test_line_and_its_errors_are_those_of_numpy() -> None:
    law = noisy_law(np.random.default_rng(0), constant=20.0, exponent=0.08, noise=0.02)
    losses = [law.loss_at(flops) * (1 + 0.01 * (-1) ** i) for i, flops in enumerate(FLOPS)]
    law = fit(losses)
    x = np.log(FLOPS)
    (slope, intercept), covariance = np.polyfit(x, np.log(losses), 1, cov=True)
    assert law.slope == pytest.approx(-slope)
    assert math.log(law.loss_at(1.0)) == pytest.approx(intercept)
    half_width = t_quantile(4) * math.sqrt(covariance[0, 0])
    assert law.exponent.high - law.exponent.value == pytest.approx(half_width)
    # The variance of the line at x is (x, 1) covariance (x, 1)^T.
    at = np.array([math.log(3e14), 1.0])
    line_variance = at @ covariance @ at
    assert law.variance * law.leverage(at[0]) == pytest.approx(line_variance)
    predicted = law.predict(3e14)
    half_width = t_quantile(4) * math.sqrt(law.variance + line_variance)
    assert math.log(predicted.high / predicted.value) == pytest.approx(half_width)


def test_exact_law_is_recovered_without_an_interval() -> None:
    law = fit(30 * FLOPS**-0.09)
    assert law.exponent == pytest.approx((0.09, 0.09, 0.09))
    assert law.predict(1e15) == pytest.approx((30 * 1e15**-0.09,) * 3)


def test_intervals_contain_the_truth_at_their_stated_rate() -> None:
    """In 2,000 simulations a rate of 95% has a standard error of 0.5%."""
    random = np.random.default_rng(1)
    held_out = 2e14
    exponents = predictions = 0
    for _ in range(SIMULATIONS):
        law = noisy_law(random, constant=20.0, exponent=0.08, noise=0.01)
        _, low, high = law.exponent
        exponents += covers(low, high, 0.08)
        measured = 20.0 * held_out**-0.08 * math.exp(0.01 * random.standard_normal())
        _, low, high = law.predict(held_out)
        predictions += covers(low, high, measured)
    assert exponents / SIMULATIONS == pytest.approx(0.95, abs=0.02)
    assert predictions / SIMULATIONS == pytest.approx(0.95, abs=0.02)


def test_sizes_that_happen_to_lie_on_the_line_do_not_narrow_the_interval() -> None:
    """The mean of two seeds is exact here, while the seeds differ by 4%."""
    exact = 30 * FLOPS**-0.09
    seeds = np.stack([exact * 1.02, exact * 0.98], axis=1)
    law = PowerLaw.fit(FLOPS.tolist(), seeds.tolist())
    assert law.slope == pytest.approx(0.09)
    assert law.freedom == len(FLOPS)
    variance_of_means = np.log(seeds).var(axis=1, ddof=1).mean() / 2
    assert law.variance == pytest.approx(variance_of_means)


def test_two_seeds_never_cover_less_than_stated() -> None:
    """The larger of two estimates of one variance gives intervals that are a little too wide."""
    random = np.random.default_rng(3)
    noise = 0.01
    hits = 0
    for _ in range(SIMULATIONS):
        law = noisy_law(random, constant=20.0, exponent=0.08, noise=noise, seeds=2)
        error = noise / math.sqrt(2) * random.standard_normal()
        _, low, high = law.predict(2e14)
        hits += covers(low, high, 20.0 * 2e14**-0.08 * math.exp(error))
    assert 0.945 < hits / SIMULATIONS < 0.99


def test_multiplier_of_two_arms_with_a_known_ratio() -> None:
    """The second arm needs 2.5 times less compute at a loss of 1.6, and another ratio elsewhere."""
    random = np.random.default_rng(2)
    loss, ratio = 1.6, 2.5
    flops_before = 2e13
    before_exponent, after_exponent = 0.08, 0.09
    before_constant = loss * flops_before**before_exponent
    after_constant = loss * (flops_before / ratio) ** after_exponent
    exact_before = fit(before_constant * FLOPS**-before_exponent)
    exact_after = fit(after_constant * FLOPS**-after_exponent)
    assert multiplier(exact_before, exact_after, loss) == pytest.approx((ratio,) * 3)
    elsewhere = multiplier(exact_before, exact_after, 1.7)
    assert elsewhere.value != pytest.approx(ratio, rel=0.01)
    hits = 0
    for _ in range(SIMULATIONS):
        before = noisy_law(random, before_constant, before_exponent, noise=0.01)
        after = noisy_law(random, after_constant, after_exponent, noise=0.01)
        _, low, high = multiplier(before, after, loss)
        hits += covers(low, high, ratio)
    assert hits / SIMULATIONS == pytest.approx(0.95, abs=0.02)
