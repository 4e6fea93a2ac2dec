"""Cross-entropy of a row of logits in one visit, for NVIDIA GPUs: the loss, and the gradient written where the logits were.

A row of 50,304 logits in bf16 is 100 KB. It is read once for the sum of exponentials, is still in the L2 cache when it is read again for
the gradient, and is written once: 200 KB a row through memory, where separate softmax, loss and gradient take 400 to 900.

Importing this needs Triton, so `head.py` does it where a GPU is there. TRITON_INTERPRET=1 runs it on a CPU, as the tests do.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16
# The next block is loaded while one is in work. Three stages need 112 registers, which halves the programs on a multiprocessor.
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
    row = tl.program_id(0).to(tl.int64)  # 65,536 rows of 50,304 are more than 2^31
    logits += row * stride
    target = tl.load(targets + row)
    scored = target != -100
    most = -float("inf")
    total = 0.0
    at_target = tl.load(logits + target, mask=scored, other=0.0).to(tl.float32)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < COLUMNS).to(
            tl.float32
        )  # 16 bytes at a time, which a mask of 50,257 would not allow
        x = tl.where(i < VOCABULARY, x, -float("inf"))
        higher = tl.maximum(most, tl.max(x, axis=0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), axis=0)
        most = higher
    tl.store(
        losses + row, tl.where(scored, tl.log(total) - (at_target - most), 0.0)
    )  # most + log(total) would round large logits
    if TRAINING:
        for start in tl.range(0, COLUMNS, BLOCK, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(logits + i, mask=i < COLUMNS).to(tl.float32)
            x = tl.where(i < VOCABULARY, x, -float("inf"))
            gradient = tl.exp(x - most) / total - tl.where(
                i == target, 1.0, 0.0
            )  # 0 in the padding columns
            tl.store(logits + i, tl.where(scored, gradient, 0.0), mask=i < COLUMNS)


@torch.library.custom_op("anew::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int, training: bool) -> Tensor:
    """(N, columns) logits and (N,) targets -> (N,) losses in nats, fp32; 0 where the target is -100.

    In training the logits become the gradient of the losses' sum by them. Columns from `vocab_size` on are padding: no part, gradient 0.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
        _kernel[(len(logits),)](
            logits,
            targets,
            losses,
            logits.stride(0),
            vocab_size,
            logits.size(1),
            training,
            BLOCK,
            num_warps=WARPS,
        )
    return losses


@cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int, training: bool) -> Tensor:  # noqa: ARG001
    return logits.new_empty(len(logits), dtype=torch.float32)
