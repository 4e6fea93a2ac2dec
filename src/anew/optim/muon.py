"""Muon: momentum whose update is orthogonalised, so that every direction of a matrix moves equally far (Jordan et al. 2024).

    optimizer = Muon(named_matrices, lr=0.02, weight_decay=0.1)

Takes the (in, out) matrices of GPT-2's blocks. Query, key and value are three matrices, so `c_attn` is cut in three; parameters of one
shape go through Newton-Schulz as one batch, of which each rank does its share. The rate is scaled by 0.2 sqrt(max(in, out)), which gives an
update the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training").
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anew.distributed.world import ALONE, World, full_tensor, shard_like

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic that drives singular values to about 1 in five steps (Jordan et al. 2024)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. `dtype` is that of Newton-Schulz."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        world: World = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.world = dtype, world
        self.found_inf: Tensor | None = (
            None  # as in the fused AdamW: 1.0 leaves weights and state as they are, 0.0 does not
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update. A rank that broke a step off has no gradients, and takes its share of the work like the others."""
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in params
            ]  # scratch: nobody reads them after the step
            good: float | Tensor = 1.0
            if (
                self.found_inf is not None
            ):  # what is multiplied by 0 need not be asked for: the host does not wait
                good = 1 - self.found_inf
                for grad in grads:
                    grad.masked_fill_(self.found_inf > 0, 0.0)
            fresh = 1 - group["momentum"]
            torch._foreach_mul_(buffers, 1 - fresh * good)
            torch._foreach_add_(buffers, grads, alpha=fresh)
            torch._foreach_lerp_(grads, buffers, group["momentum"])  # Nesterov
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * good)
            for shape in dict.fromkeys(
                p.shape for p in params
            ):  # one shape's updates at a time are in memory
                updates = self._orthogonal([g for g in grads if g.shape == shape])
                torch._foreach_mul_(updates, good)
                torch._foreach_add_(
                    [p for p in params if p.shape == shape], updates, alpha=-group["lr"]
                )

    def _orthogonal(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The updates of matrices of one shape, at a rate of 1. Those that are cut over ranks are put together, and cut again."""
        stacked = torch.stack(
            [part for matrix in matrices for part in _square_parts(full_tensor(matrix))]
        )
        is_wide = stacked.size(1) <= stacked.size(2)
        done = self.world.divide_rows(
            stacked if is_wide else stacked.mT,
            lambda share: orthogonalise(share, dtype=self.dtype),
            self.dtype,
        )
        done = done.to(torch.float32, copy=True).mul_(0.2 * math.sqrt(max(stacked.shape[1:])))
        parts = (done if is_wide else done.mT).split(len(stacked) // len(matrices))
        return [
            shard_like(matrix, torch.cat(tuple(own), dim=1))
            for matrix, own in zip(matrices, parts, strict=True)
        ]


def _square_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """`c_attn` (C, 3C) as its query, key and value; any other matrix as it is."""
    n_in, n_out = matrix.shape
    return matrix.split(n_in, dim=1) if n_out == 3 * n_in else (matrix,)


def orthogonalise(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, rows, columns), rows <= columns -> the nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz, in `dtype`.

    Three batched products an iteration, each with its sum: as fast as compiled code on a CPU, and nothing to compile (docs/log.md, 12).
    """
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        polynomial = torch.baddbmm(s, s, s, beta=b, alpha=c)  # b s + c s^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
