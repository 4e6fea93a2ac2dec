"""Detects steps whose loss or gradient norm is far above the usual, before they change a weight.

    max_loss, max_norm = detector.limits(z=6.0)
    detector.add(loss, grad_norm)               # of a step that was applied

The mean and the variance are exponential moving averages with a half-life of 35 steps. They are
part of a checkpoint, so a resumed run makes the same decisions.
"""

import math
from dataclasses import dataclass, field

DECAY = 0.98
WARM_UP_STEPS = 50  # there are no limits before this many steps
# A standard deviation counts as at least this share of the mean, so that in a very even run
# ordinary noise is not taken for an outlier.
LEAST_DEVIATION = 0.02


@dataclass
class OutlierDetector:
    """Moving statistics of [loss, gradient norm]. The field names are those of trainer.json."""

    steps: int = 0
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0])
    variance: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def limits(self, z: float) -> tuple[float, float]:
        """Return the largest loss and norm within `z` standard deviations of the mean."""
        if self.steps < WARM_UP_STEPS:
            return math.inf, math.inf
        limits = []
        for mean, variance in zip(self.mean, self.variance, strict=True):
            deviation = max(math.sqrt(variance), LEAST_DEVIATION * mean)
            limits.append(mean + z * deviation)
        return limits[0], limits[1]

    def add(self, loss: float, grad_norm: float) -> None:
        """Update the statistics with one applied step."""
        self.steps += 1
        decay = min(DECAY, 1 - 1 / self.steps)  # a plain mean until there are enough steps
        new = 1 - decay
        for i, value in enumerate((loss, grad_norm)):
            difference = value - self.mean[i]
            self.mean[i] += new * difference
            variance = self.variance[i] + new * difference * difference
            self.variance[i] = decay * variance
