"""Projection onto the vocabulary and cross-entropy as one function, forward and backward together.

    loss = HeadLoss.apply(hidden, wte, targets, vocab_size, training)

The logits of a 50k vocabulary are the biggest tensor of a training step: 3.3 GB in fp32 at 16 x 1024 tokens, and as much again for each
copy that autograd keeps. Here a chunk of them lives at a time, and since the loss is the end of the graph, its gradient is taken at once.
"""

import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anew.utils.compiler import missing_for_triton

# Rows of logits alive at once, whatever the batch. Eager code holds an fp32 copy of them (206 MB at 1024); compiled code
# holds bf16 only (412 MB at 4096), where smaller chunks cost 5% of a CPU step. The GPU's kernel needs no copy, and each chunk costs it a
# round of `wte`'s gradient through memory (1.6 GB at 16,384).
CHUNK, CHUNK_COMPILED, CHUNK_KERNEL = 1024, 4096, 16_384
FP16_SHRINK = 64.0


class HeadLoss(torch.autograd.Function):
    """hidden (N, C), wte (rows, C), targets (N,) -> mean loss in nats, fp32, over the targets that are not -100.

    Logits and their gradient are in the dtype of `hidden`; softmax and sums are fp32. Rows of `wte` from vocab_size on take no part.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, wte: Tensor, targets: Tensor, vocab_size: int, training: bool
    ) -> Tensor:
        """The loss; when `training` also both gradients, while the logits are there."""
        weight = wte.to(hidden.dtype)
        count = (targets != -100).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if training else None
        d_wte: Tensor | None = None
        by_kernel = has_kernel(hidden.device)
        d_logits: Tensor | None
        for rows in _chunks(hidden.size(0), by_kernel):
            logits = hidden[rows] @ weight.t()
            if by_kernel:
                losses = torch.ops.anew.cross_entropy_(logits, targets[rows], vocab_size, training)
                loss, d_logits = losses.sum(), logits
            else:
                loss, d_logits = chunk_loss(logits, targets[rows], vocab_size, training)
            total = total + loss
            if d_hidden is not None and d_logits is not None:
                d_hidden[rows] = d_logits @ weight
                part = _product_of_chunk(d_logits, hidden[rows], wte.dtype)
                d_wte = part if d_wte is None else d_wte + part
        ctx.save_for_backward(d_hidden, d_wte, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_wte, count = ctx.saved_tensors
        scale = (
            grad[0] / count
        )  # in fp32: fp16 holds neither 1 / count times a small probability nor a loss scale of 65536
        return (d_hidden.float() * scale).to(d_hidden.dtype), d_wte * scale, None, None, None


def _product_of_chunk(d_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """d_logits^T hidden, (rows of wte, C). In fp16 a frequent token's row could pass 65,504 before any loss scale can lower it."""
    if hidden.dtype != torch.float16:
        return (d_logits.t() @ hidden).to(dtype)
    return (d_logits.t() @ (hidden / FP16_SHRINK)).to(dtype) * FP16_SHRINK


def chunk_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, training: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and, in training, the gradient of that sum by its logits (padding columns zero), in their place."""
    if torch.compiler.is_compiling():
        return fused_chunk_loss(logits, targets, vocab_size, training)
    scored = targets != -100
    index = targets.clamp(min=0)[:, None]
    log_p = torch.log_softmax(logits[:, :vocab_size], dim=1, dtype=torch.float32)
    of_target = log_p.gather(1, index)
    loss = -(of_target.squeeze(1) * scored).sum()
    if not training:
        return loss, None
    d_logits = log_p.exp_().scatter_(1, index, of_target.exp() - 1)
    logits[:, :vocab_size] = d_logits.mul_(scored[:, None])
    logits[:, vocab_size:] = 0
    return loss, logits


def fused_chunk_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, training: bool
) -> tuple[Tensor, Tensor | None]:
    """The same without writes in place, which keep a compiler from making one pass of it."""
    real = torch.arange(logits.size(1), device=logits.device) < vocab_size
    scored = targets != -100
    index = targets.clamp(min=0)[:, None]
    x = torch.where(real, logits, -math.inf).float()
    log_sum = x.logsumexp(dim=1, keepdim=True)
    loss = ((log_sum - x.gather(1, index)).squeeze(1) * scored).sum()
    if not training:
        return loss, None
    one_hot = torch.arange(logits.size(1), device=logits.device) == index
    d_logits = ((x - log_sum).exp() - one_hot.float()) * scored[:, None]
    return loss, d_logits.to(logits.dtype)


def has_kernel(device: torch.device) -> bool:
    """Is there a GPU kernel for the loss of a chunk? Not on other devices, nor where Triton or what it compiles with is missing.

    The kernel is imported at its first use, because `import anew` must not initialise CUDA: a process that did could not be forked,
    and every rank would occupy memory on GPU 0.
    """
    return device.type == "cuda" and _kernel_is_loaded(device)


# What torch.compiler.assume_constant_result does. That function would import the compiler, for seconds, in every process.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _kernel_is_loaded(device: torch.device) -> bool:
    if missing_for_triton(device):
        return False
    try:
        importlib.import_module(
            "anew.model.kernels.cross_entropy"
        )  # registers torch.ops.anew.cross_entropy_
    except ImportError:
        return False
    return True


def _chunks(n: int, by_kernel: bool) -> Iterator[slice]:
    rows = CHUNK_KERNEL if by_kernel else CHUNK_COMPILED if torch.compiler.is_compiling() else CHUNK
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
