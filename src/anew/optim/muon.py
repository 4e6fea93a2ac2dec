"""The Muon optimizer: momentum whose update is orthogonalised (Jordan et al. 2024).

    optimizer = Muon(named_matrices, lr=0.02, weight_decay=0.1)

An orthogonal update moves every direction of a matrix equally far. Muon takes the (in, out)
matrices of GPT-2's blocks. Query, key and value are three matrices, so `c_attn` is split.

Matrices of one shape go through the Newton-Schulz iteration as one batch, of which each rank
computes its share. The learning rate is scaled by 0.2 sqrt(max(in, out)), which gives an update the
size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training").
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from anew.distributed.world import ALONE, World, full_tensor, shard_like

# Coefficients of the quintic polynomial that drives singular values to about 1 in five steps
# (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay.

    `dtype` is that of the Newton-Schulz iteration. The state of a parameter is "momentum_buffer".
    """

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
        self.dtype = dtype
        self.world = world
        # As in the fused AdamW: at 1.0 a step changes neither weights nor state.
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters.

        A rank that left the step early has no gradients. It takes zeros instead, so that it still
        computes its share of the updates.
        """
        for group in self.param_groups:
            params = group["params"]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            keep: float | Tensor = 1.0
            if self.found_inf is not None:
                # Multiplying by 0 or 1 on the device avoids a wait of the host.
                keep = 1 - self.found_inf
                for grad in grads:
                    grad.masked_fill_(self.found_inf > 0, 0.0)
            self._apply_momentum(params, grads, group["momentum"], keep)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * keep)
            shapes = dict.fromkeys(p.shape for p in params)
            for shape in shapes:  # in turn, so that only the updates of one shape are in memory
                updates = self._orthogonal([grad for grad in grads if grad.shape == shape])
                torch._foreach_mul_(updates, keep)
                same_shape = [p for p in params if p.shape == shape]
                torch._foreach_add_(same_shape, updates, alpha=-group["lr"])

    def _apply_momentum(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momentum: float,
        keep: float | Tensor,
    ) -> None:
        """Update the momentum buffers, unless `keep` is 0, and replace grads by Nesterov's."""
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        fresh = 1 - momentum
        torch._foreach_mul_(buffers, 1 - fresh * keep)
        torch._foreach_add_(buffers, grads, alpha=fresh)
        torch._foreach_lerp_(grads, buffers, momentum)

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return the updates of matrices of one shape at a learning rate of 1.

        Matrices that are sharded over ranks are gathered, and their updates are sharded again.
        """
        stacked = torch.stack(
            [part for matrix in matrices for part in _square_parts(full_tensor(matrix))],
        )  # (n, rows, columns)
        n_rows = stacked.size(1)
        n_columns = stacked.size(2)
        is_tall = n_rows > n_columns
        result = self.world.divide_rows(
            stacked.mT if is_tall else stacked,
            lambda share: orthogonalise(share, dtype=self.dtype),
            self.dtype,
        )
        scale = 0.2 * math.sqrt(max(n_rows, n_columns))
        result = result.to(torch.float32, copy=True).mul_(scale)
        if is_tall:
            result = result.mT
        updates = []
        parts_per_matrix = len(stacked) // len(matrices)
        for matrix, own in zip(matrices, result.split(parts_per_matrix), strict=True):
            update = torch.cat(tuple(own), dim=1)
            updates.append(shard_like(matrix, update))
        return updates


def _square_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return the query, key and value parts of `c_attn` (C, 3 C); any other matrix as it is."""
    n_in, n_out = matrix.shape
    if n_out == 3 * n_in:
        return matrix.split(n_in, dim=1)
    return (matrix,)


def orthogonalise(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices, by Newton-Schulz in `dtype`.

    g is (n, rows, columns) with rows <= columns. An iteration is three batched products, each with
    its sum. This is as fast as compiled code on a CPU, and needs no compiler (docs/log.md, 12).
    """
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        polynomial = torch.baddbmm(s, s, s, beta=b, alpha=c)  # b s + c s^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b s + c s^2) x
    return x
