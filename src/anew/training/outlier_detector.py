"""Loss and gradient norm as they usually are, so that a step far outside is known before it changes a weight.

    limits = spikes.limits(z=6.0)         # the step is not applied if its loss or norm is above; infinite for the first 50 steps
    spikes.add(loss, norm)                # of a step that was applied

The running mean and variance forget with a half-life of 35 steps. They go into the checkpoint, so a resumed run judges alike.
"""

import math
from dataclasses import dataclass, field

KEEP, WARM_STEPS = 0.98, 50
LEAST_SHARE = 0.02  # of the mean: a very even run must not take its own noise for a spike


@dataclass
class Spikes:
    """What was usual lately: [loss, gradient norm]."""

    steps: int = 0
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0])
    variance: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def limits(self, z: float) -> tuple[float, float]:
        """The largest loss and the largest norm that are not spikes."""
        if self.steps < WARM_STEPS:
            return math.inf, math.inf
        loss, norm = (
            m + z * max(math.sqrt(v), LEAST_SHARE * m)
            for m, v in zip(self.mean, self.variance, strict=True)
        )
        return loss, norm

    def add(self, loss: float, norm: float) -> None:
        """Take one applied step into account."""
        self.steps += 1
        keep = min(KEEP, 1 - 1 / self.steps)  # a plain mean until there are enough
        for i, value in enumerate((loss, norm)):
            away = value - self.mean[i]
            self.mean[i] += (1 - keep) * away
            self.variance[i] = keep * (self.variance[i] + (1 - keep) * away * away)
