"""A power law of loss and compute, fitted to a few sizes, and what can be read off it.

    law = PowerLaw.fit(flops, losses)         # losses: for each size, those of its seeds
    print(law.exponent, law.predict(1e15))    # with 95% intervals
    print(multiplier(before, after, loss=1.5))

The law is loss = constant x FLOPs^-exponent, fitted as a straight line in the logarithms by least
squares. A third parameter, a loss that no amount of compute can go below, cannot be determined from
a few sizes. Without it the law holds near the measured compute only.

Intervals are those of linear regression with Student's t. The variance is the larger of two
estimates: that of the mean losses about the line (n - 2 degrees of freedom for n sizes), and that
of a mean over the seeds of a size. The first may be small by chance, and the second does not know
whether the line is straight. No interval contains a bend that all sizes follow, so a loss predicted
beyond the largest size is an extrapolation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The 97.5% quantile of Student's t for 1, 2, ... degrees of freedom. For more than 30 the last one
# is used, which makes intervals slightly too wide.
T_QUANTILES = [
    float(quantile)
    for quantile in [
        "12.7062",
        "4.3027",
        "3.1824",
        "2.7764",
        "2.5706",
        "2.4469",
        "2.3646",
        "2.3060",
        "2.2622",
        "2.2281",
        "2.2010",
        "2.1788",
        "2.1604",
        "2.1448",
        "2.1314",
        "2.1199",
        "2.1098",
        "2.1009",
        "2.0930",
        "2.0860",
        "2.0796",
        "2.0739",
        "2.0687",
        "2.0639",
        "2.0595",
        "2.0555",
        "2.0518",
        "2.0484",
        "2.0452",
        "2.0423",
    ]
]


def t_quantile(freedom: int) -> float:
    """Return the factor of a standard error that gives a 95% interval."""
    return T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def log_estimate(log_value: float, half_width: float) -> Estimate:
    """Return the estimate of exp(x) whose logarithm has this interval."""
    low = math.exp(log_value - half_width)
    high = math.exp(log_value + half_width)
    return Estimate(math.exp(log_value), low, high)


@dataclass(frozen=True)
class PowerLaw:
    """A line through the logarithms of losses and compute."""

    n: int  # sizes
    centre: float  # mean of ln(flops)
    spread: float  # sum of squared distances of ln(flops) from their mean
    level: float  # ln(loss) at the centre
    slope: float  # how fast ln(loss) falls with ln(flops)
    variance: float  # of ln(mean loss of a size) about the line
    freedom: int  # degrees of freedom of `variance`

    @classmethod
    def fit(cls, flops: Sequence[float], losses: Sequence[Sequence[float]]) -> "PowerLaw":
        """Fit the line to three sizes or more, with equally many seeds each."""
        n = len(flops)
        assert n >= 3
        x = np.log(flops)
        y = np.log(np.mean(losses, axis=1))
        centre = x.mean()
        spread = np.sum((x - centre) ** 2)
        slope = -np.sum((x - centre) * y) / spread
        residuals = y - y.mean() + slope * (x - centre)
        estimates = [(np.sum(residuals**2) / (n - 2), n - 2)]
        seeds = len(losses[0])
        if seeds > 1:
            variance_of_runs = np.var(np.log(losses), axis=1, ddof=1).mean()
            estimates.append((variance_of_runs / seeds, n * (seeds - 1)))
        variance, freedom = max(estimates)
        return cls(
            n=n,
            centre=float(centre),
            spread=float(spread),
            level=float(y.mean()),
            slope=float(slope),
            variance=float(variance),
            freedom=freedom,
        )

    @property
    def exponent(self) -> Estimate:
        """The exponent of compute: loss falls with flops^-exponent."""
        half_width = t_quantile(self.freedom) * math.sqrt(self.variance / self.spread)
        return Estimate(self.slope, self.slope - half_width, self.slope + half_width)

    def leverage(self, log_flops: float) -> float:
        """Return the variance of the line at this compute as a multiple of `variance`."""
        return 1 / self.n + (log_flops - self.centre) ** 2 / self.spread

    def loss_at(self, flops: float) -> float:
        """Return the loss on the line."""
        return math.exp(self.level - self.slope * (math.log(flops) - self.centre))

    def predict(self, flops: float) -> Estimate:
        """Return the loss of another size, with an interval for its measured mean loss."""
        variance = self.variance * (1 + self.leverage(math.log(flops)))
        half_width = t_quantile(self.freedom) * math.sqrt(variance)
        return log_estimate(math.log(self.loss_at(flops)), half_width)

    def log_flops_to(self, loss: float) -> float:
        """Return the logarithm of the compute at which the line reaches a loss."""
        return self.centre + (self.level - math.log(loss)) / self.slope


def multiplier(before: PowerLaw, after: PowerLaw, loss: float) -> Estimate:
    """Return how many times as much compute `before` needs as `after` for the same loss.

    Each line is taken for straight within its own error (the delta method), and the two for
    independent. The degrees of freedom are those of Welch and Satterthwaite, rounded down.
    """
    log_ratio = before.log_flops_to(loss) - after.log_flops_to(loss)
    variance = 0.0
    squares = 0.0
    for law in (before, after):
        part = law.variance * law.leverage(law.log_flops_to(loss)) / law.slope**2
        variance += part
        squares += part**2 / law.freedom
    # The addend keeps a whole number whole. Lines without any error have no use for the number.
    freedom = int(variance**2 / squares + 1e-9) if squares else 1
    return log_estimate(log_ratio, t_quantile(freedom) * math.sqrt(variance))
