"""Projection onto the vocabulary and cross-entropy in one function, forward and backward.

    loss = HeadLoss.apply(hidden, wte, targets, vocab_size, training)

The logits of a vocabulary of 50,257 are the largest tensor of a training step: 3.3 GB in fp32 at
16 x 1024 tokens, and as much again for each copy that autograd keeps. Here only a chunk of them is
in memory at a time. The loss is the end of the graph, so the gradient of each chunk is computed
together with its loss.

In shape comments, N is the number of tokens, C is n_embd, V is the number of rows of `wte` (padding
included) and n the number of tokens in a chunk.
"""

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anew.utils.compiler import missing_for_triton

# Rows of logits in memory at once, for any batch size.
# Uncompiled code holds a copy of them in fp32, 206 MB.
CHUNK_EAGER = 1024
# Compiled code holds them in bf16 only, 412 MB. Smaller chunks cost 5% of a step on a CPU.
CHUNK_COMPILED = 4096
# The GPU's kernel needs no copy, and each chunk costs a round of the gradient of `wte` through
# memory. The rows take 1.6 GB.
CHUNK_KERNEL = 16_384

FP16_SHRINK = 64.0
IGNORED = -100  # a target that is not counted, as in torch


class HeadLoss(torch.autograd.Function):
    """hidden (N, C), wte (V, C), targets (N,) -> mean loss in nats over targets that are not -100.

    Logits and their gradient have the dtype of `hidden`; softmax, sums and the loss are fp32. Rows
    of `wte` from vocab_size on are padding: they have no share in the softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, wte: Tensor, targets: Tensor, vocab_size: int, training: bool
    ) -> Tensor:
        """Return the loss. With `training`, compute both gradients while the logits exist."""
        N = hidden.size(0)
        weight = wte.to(hidden.dtype)
        count = (targets != IGNORED).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if training else None
        d_wte: Tensor | None = None
        chunk = _chunk_size(hidden.device)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            logits = hidden[rows] @ weight.t()  # (n, V)
            loss, d_logits = chunk_loss(logits, targets[rows], vocab_size, training)
            total = total + loss
            if d_hidden is not None and d_logits is not None:
                d_hidden[rows] = d_logits @ weight  # (n, C)
                part = _d_wte_of_chunk(d_logits, hidden[rows], wte.dtype)  # (V, C)
                d_wte = part if d_wte is None else d_wte + part
        ctx.save_for_backward(d_hidden, d_wte, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden and wte, scaled by that of the loss."""
        d_hidden, d_wte, count = ctx.saved_tensors
        # The scale is fp32: fp16 can represent neither 1 / count times a small probability nor a
        # loss scale of 65536.
        scale = d_loss / count
        d_hidden = (d_hidden.float() * scale).to(d_hidden.dtype)
        d_wte = d_wte * scale
        return d_hidden, d_wte, None, None, None


def _chunk_size(device: torch.device) -> int:
    if has_kernel(device):
        return CHUNK_KERNEL
    if torch.compiler.is_compiling():
        return CHUNK_COMPILED
    return CHUNK_EAGER


def _d_wte_of_chunk(d_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of wte (V, C) from d_logits (n, V) and hidden (n, C).

    In fp16, the row of a frequent token could exceed 65,504 before any loss scale can lower it, so
    the product is made of smaller numbers.
    """
    if hidden.dtype != torch.float16:
        return (d_logits.t() @ hidden).to(dtype)
    shrunk = d_logits.t() @ (hidden / FP16_SHRINK)
    return shrunk.to(dtype) * FP16_SHRINK


def chunk_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, training: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of logits (n, V) and, with `training`, its gradient by the logits.

    The gradient (n, V) is 0 in the padding columns. It may overwrite the logits.
    """
    if has_kernel(logits.device):
        losses = torch.ops.anew.cross_entropy_(logits, targets, vocab_size, training)
        return losses.sum(), logits if training else None
    if torch.compiler.is_compiling():
        return fused_chunk_loss(logits, targets, vocab_size, training)
    return in_place_chunk_loss(logits, targets, vocab_size, training)


def in_place_chunk_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, training: bool
) -> tuple[Tensor, Tensor | None]:
    """`chunk_loss` for uncompiled code: the gradient is written where the logits were."""
    scored = targets != IGNORED  # (n,)
    index = targets.clamp(min=0)[:, None]  # (n, 1)
    log_p = torch.log_softmax(logits[:, :vocab_size], dim=1, dtype=torch.float32)
    log_p_of_target = log_p.gather(1, index)  # (n, 1)
    loss = -(log_p_of_target.squeeze(1) * scored).sum()
    if not training:
        return loss, None
    d_logits = log_p.exp_().scatter_(1, index, log_p_of_target.exp() - 1)
    logits[:, :vocab_size] = d_logits.mul_(scored[:, None])
    logits[:, vocab_size:] = 0
    return loss, logits


def fused_chunk_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, training: bool
) -> tuple[Tensor, Tensor | None]:
    """`chunk_loss` for the compiler: without writes in place, it becomes one pass over memory."""
    column = torch.arange(logits.size(1), device=logits.device)  # (V,)
    is_real = column < vocab_size
    scored = targets != IGNORED  # (n,)
    index = targets.clamp(min=0)[:, None]  # (n, 1)
    x = torch.where(is_real, logits, -math.inf).float()  # (n, V)
    log_sum = x.logsumexp(dim=1, keepdim=True)  # (n, 1)
    losses = (log_sum - x.gather(1, index)).squeeze(1)  # (n,)
    loss = (losses * scored).sum()
    if not training:
        return loss, None
    is_target = column == index  # (n, V)
    d_logits = (x - log_sum).exp() - is_target.float()
    d_logits = d_logits * scored[:, None]
    return loss, d_logits.to(logits.dtype)


def plain_loss(hidden: Tensor, wte: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the same loss of hidden (B, T, C) with all logits in memory, for comparison."""
    logits = F.linear(hidden, wte.to(hidden.dtype))  # (B, T, V)
    logits = logits[..., :vocab_size].flatten(0, 1)  # (B T, vocab_size)
    return F.cross_entropy(logits.float(), targets.flatten())


def has_kernel(device: torch.device) -> bool:
    """Return whether there is a GPU kernel for the loss: on NVIDIA GPUs where Triton can compile.

    The kernel is imported at its first use, because `import anew` must not initialise CUDA: a
    process that has done so cannot be forked, and every rank would occupy memory on GPU 0.
    """
    return device.type == "cuda" and _kernel_is_loaded(device)


# This is what torch.compiler.assume_constant_result does. Calling that function would import the
# compiler in every process, which takes seconds.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _kernel_is_loaded(device: torch.device) -> bool:
    """Return whether torch.ops.anew.cross_entropy_ was registered, by importing its file."""
    if missing_for_triton(device):
        return False
    try:
        importlib.import_module("anew.model.kernels.cross_entropy")
    except ImportError:
        return False
    return True
