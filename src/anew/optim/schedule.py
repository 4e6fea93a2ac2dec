"""Learning rate and momentum as functions of the training step and the configuration alone.

    factor = learning_rate_factor(step, steps, config)     # share of the peak learning rate
    momentum = muon_momentum(step, config)

Steps count from 0. There is no scheduler object and no state, so a resumed run continues with the
values it would have had.
"""

import math

from anew.config.schema import OptimConfig

MUON_FIRST_MOMENTUM = 0.85
MUON_MOMENTUM = 0.95


def learning_rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Return the share of the peak learning rate at `step` of a run of `steps` steps.

    The factor rises linearly to 1 in `warmup_steps` steps, stays there, and falls in the last
    `decay_share` of the remaining steps towards min_lr / lr. It reaches that value at `steps`, one
    after the last step, as in the reference runs, so it is never 0 during the run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    steps_after_warmup = max(1, steps - config.warmup_steps)
    decay_steps = steps_after_warmup * config.decay_share
    progress = max(0.0, 1 - (steps - step) / decay_steps)  # 0 before the decay, 1 at its end
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        remaining = 1 - progress
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * remaining


def muon_momentum(step: int, config: OptimConfig) -> float:
    """Return Muon's momentum, which rises linearly to 0.95 in the first `muon_warmup` steps.

    Early in training the gradient changes its direction within a few steps, so older gradients
    count less then.
    """
    if step >= config.muon_warmup:
        return MUON_MOMENTUM
    rise = MUON_MOMENTUM - MUON_FIRST_MOMENTUM
    return MUON_FIRST_MOMENTUM + rise * step / config.muon_warmup
