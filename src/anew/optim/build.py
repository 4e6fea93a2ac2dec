"""From gradients to updates: parameter groups, their optimizers, and rate and momentum as pure functions of the step.

`build` gives the optimizers of a run; `train.train_step` is their one caller. State is named by parameter, so a checkpoint does
not depend on how parameters were grouped.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from anew.config.schema import OptimConfig
from anew.distributed.world import ALONE, World
from anew.optim.muon import Muon

MOMENTUM = (0.85, 0.95)  # Muon's, at its first step and from the end of muon_warmup on


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): (step + 1) / warmup up to 1, constant, then down towards min_lr / lr.

    The decay reaches its floor at `steps`, one past the last step, as in the reference runs; it is never zero on the way.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = max(1, steps - config.warmup_steps) * config.decay_share
    done = max(0.0, 1 - (steps - step) / decay_steps)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * shape


def momentum(step: int, config: OptimConfig) -> float:
    """Muon's at `step`: early gradients point elsewhere within a few steps, so what was is forgotten sooner."""
    first, last = MOMENTUM
    return (
        last if step >= config.muon_warmup else first + (last - first) * step / config.muon_warmup
    )


def build(model: nn.Module, config: OptimConfig, world: World = ALONE) -> list[Optimizer]:
    """The optimizers of a run. Matrices are decayed, vectors are not; Muon takes the matrices of the blocks if asked to."""
    named = dict(model.named_parameters())
    block = (
        {n for n, p in named.items() if ".h." in n and p.ndim == 2}
        if config.optimizer == "muon"
        else set()
    )
    rest = [(n, p) for n, p in named.items() if n not in block]
    wte, matrices, vectors = (
        [(n, p) for n, p in rest if kind == _kind(n, p)] for kind in ("wte", "matrix", "vector")
    )
    groups = [
        {"params": wte, "lr": config.wte_lr or config.lr, "weight_decay": config.weight_decay},
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused or None,
    )
    optimizers: list[Optimizer] = [adamw]
    if block:
        has_bf16 = (
            getattr(model, "compute_dtype", torch.float32) == torch.bfloat16
        )  # where it is slow, nothing computes in it
        dtype = torch.bfloat16 if has_bf16 and config.newton_schulz == "bf16" else torch.float32
        optimizers.append(
            Muon(
                [(n, named[n]) for n in sorted(block)],
                config.muon_lr,
                weight_decay=config.weight_decay,
                dtype=dtype,
                world=world,
            )
        )
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def _kind(name: str, p: nn.Parameter) -> str:
    return "wte" if ".wte." in name else "matrix" if p.ndim >= 2 else "vector"


def set_rate(optimizers: Iterable[Optimizer], share: float, momentum: float = MOMENTUM[1]) -> None:
    """Set every group's learning rate to `share` of its own peak, and Muon's momentum."""
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * share
        if "momentum" in group:
            group["momentum"] = momentum
