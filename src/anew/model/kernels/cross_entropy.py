"""Cross-entropy of rows of logits in one visit, for NVIDIA GPUs, written in Triton.

A row of 50,304 logits in bf16 is 100 KB. The kernel reads it from memory once for the sum of
exponentials, finds it in the L2 cache when it reads it again for the gradient, and writes the
gradient in its place once: 200 KB a row through memory. Separate softmax, loss and gradient take
400 to 900 KB.

Importing this file needs Triton, so loss.py imports it only where there is a GPU. With
TRITON_INTERPRET=1 the kernel runs on a CPU, as in the tests.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits that are loaded at a time
WARPS = 16
# The next block is loaded while one is computed. Three stages need 112 registers, which halves the
# number of programs on a multiprocessor.
STAGES = tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    stride,
    VOCABULARY: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # 65,536 rows of 50,304 logits are more than 2^31
    logits += row * stride
    target = tl.load(targets + row)
    scored = target != -100
    most = -float("inf")
    total = 0.0
    at_target = tl.load(logits + target, mask=scored, other=0.0).to(tl.float32)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK)
        # A mask of COLUMNS loads 16 bytes at a time, which one of 50,257 would not allow.
        x = tl.load(logits + i, mask=i < COLUMNS).to(tl.float32)
        x = tl.where(i < VOCABULARY, x, -float("inf"))
        higher = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), axis=0)
        most = higher
    loss = tl.log(total) - (at_target - most)  # most + log(total) would round large logits
    tl.store(losses + row, tl.where(scored, loss, 0.0))
    if TRAINING:
        for start in tl.range(0, COLUMNS, BLOCK, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(logits + i, mask=i < COLUMNS).to(tl.float32)
            x = tl.where(i < VOCABULARY, x, -float("inf"))
            p = tl.exp(x - most) / total  # 0 in the padding columns
            gradient = p - tl.where(i == target, 1.0, 0.0)
            tl.store(logits + i, tl.where(scored, gradient, 0.0), mask=i < COLUMNS)


@torch.library.custom_op("anew::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int, training: bool) -> Tensor:
    """Return the losses (N,) in nats, fp32, of logits (N, columns) and targets (N,).

    The loss is 0 where the target is -100. With `training`, the logits are replaced by the gradient
    of the summed loss. Columns from `vocab_size` on are padding: they have no share in the softmax,
    and their gradient is 0.
    """
    n_rows, n_columns = logits.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with device:
        _kernel[(n_rows,)](
            logits,
            targets,
            losses,
            logits.stride(0),
            vocab_size,
            n_columns,
            training,
            BLOCK,
            num_warps=WARPS,
        )
    return losses


@cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int, training: bool) -> Tensor:  # noqa: ARG001
    return logits.new_empty(len(logits), dtype=torch.float32)
