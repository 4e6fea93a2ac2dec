"""From gradients to updates: parameter groups, AdamW, Muon, and the learning rate as a pure function of the step.

`build` gives the optimizers of a run; `train.train_step` is their one caller. State is named by parameter, so a checkpoint does
not depend on how parameters were grouped.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from anew.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that drives singular values to about 1 in five steps (Jordan et al. 2024, "Muon")


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): (step + 1) / warmup up to 1, then down towards min_lr / lr.

    The decay reaches its floor at `steps`, one past the last step, as in the reference runs; it is never zero on the way.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * shape


def build(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """The optimizers of a run. Matrices are decayed, vectors are not; Muon takes the matrices of the blocks if asked to."""
    named = dict(model.named_parameters())
    block = {n for n, p in named.items() if ".h." in n and p.ndim == 2} if config.optimizer == "muon" else set()
    rest = [(n, p) for n, p in named.items() if n not in block]
    groups = [
        {"params": [(n, p) for n, p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=config.fused or None)
    optimizers: list[Optimizer] = [adamw]
    if block:
        optimizers.append(Muon([(n, named[n]) for n in sorted(block)], lr=config.muon_lr, weight_decay=config.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def set_rate(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every group's learning rate to `share` of its own peak."""
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["peak_lr"] * share


class Muon(Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves equally far (Jordan et al. 2024).

    Takes the (in, out) matrices of GPT-2's blocks. Query, key and value are three matrices, so `c_attn` is cut in three; all
    matrices of one shape go through Newton-Schulz as one batch. The rate is scaled by 0.2 sqrt(max(in, out)), which gives an update
    the size of AdamW's (Liu et al. 2025, "Muon is Scalable").
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf: Tensor | None = None  # as in the fused AdamW: 1 leaves weights and state as they are

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            grads = [p.grad for p in params]
            if self.found_inf is not None and self.found_inf.item():
                continue
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for p, g in zip(params, nesterov, strict=True):
                for part, update in zip(_square_parts(p), _square_parts(g), strict=True):
                    wide = (part, update) if part.size(0) <= part.size(1) else (part.t(), update.t())
                    by_shape.setdefault(tuple(wide[0].shape), []).append(wide)
            for shape, pairs in by_shape.items():
                dtype = torch.float32 if pairs[0][0].device.type == "mps" else torch.bfloat16  # MPS: fp32 throughout
                updates = orthogonalise(torch.stack([u for _, u in pairs]), dtype=dtype)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_([part for part, _ in pairs], list(updates.to(pairs[0][0].dtype).unbind()), alpha=-scale)


def _square_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """`c_attn` (C, 3C) as its query, key and value; any other matrix as it is."""
    n_in, n_out = matrix.shape
    return matrix.split(n_in, dim=1) if n_out == 3 * n_in else (matrix,)


def orthogonalise(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, rows, columns), rows <= columns -> the nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x
