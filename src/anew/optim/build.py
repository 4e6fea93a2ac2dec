"""The optimizers of a run and their parameter groups.

    optimizers = build_optimizers(model, config.optim)
    set_learning_rates(optimizers, factor, momentum)     # before each step (see schedule.py)

AdamW updates every parameter, or with `optimizer="muon"` all but the matrices of the blocks.
Checkpoints name the state of each parameter by the parameter's name, so they do not depend on the
grouping.
"""

from collections.abc import Iterable

import torch
from torch.optim import AdamW, Optimizer

from anew.config.schema import OptimConfig
from anew.distributed.world import ALONE, World
from anew.model.gpt import GPT
from anew.optim.muon import Muon
from anew.optim.schedule import MUON_MOMENTUM


def build_optimizers(model: GPT, config: OptimConfig, world: World = ALONE) -> list[Optimizer]:
    """Return the optimizers of a run: AdamW, and Muon if the configuration asks for it.

    Matrices are decayed, vectors are not. The token embedding has a group of its own because its
    learning rate may differ. Each group keeps its peak learning rate as "peak_lr".
    """
    embedding = []
    block_matrices = []
    other_matrices = []
    vectors = []
    for name, parameter in model.named_parameters():
        named = (name, parameter)
        if parameter.ndim < 2:
            vectors.append(named)
        elif ".wte." in name:
            embedding.append(named)
        elif ".h." in name and config.optimizer == "muon":
            block_matrices.append(named)
        else:
            other_matrices.append(named)
    decay = config.weight_decay
    adamw = AdamW(
        [
            {"params": embedding, "lr": config.wte_lr or config.lr, "weight_decay": decay},
            {"params": other_matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.fused or None,
    )
    optimizers: list[Optimizer] = [adamw]
    if block_matrices:
        muon = Muon(
            sorted(block_matrices, key=lambda named: named[0]),
            lr=config.muon_lr,
            weight_decay=decay,
            dtype=_newton_schulz_dtype(model, config),
            world=world,
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _newton_schulz_dtype(model: GPT, config: OptimConfig) -> torch.dtype:
    """Return bf16 only for a model that computes in it: elsewhere the device may be slow at it."""
    if config.newton_schulz == "bf16" and model.compute_dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def set_learning_rates(
    optimizers: Iterable[Optimizer],
    factor: float,
    momentum: float = MUON_MOMENTUM,
) -> None:
    """Set the learning rate of every group to `factor` of its peak, and Muon's momentum."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if "momentum" in group:
                group["momentum"] = momentum
