"""Scaled dot-product attention: softmax(q k^T / sqrt(head_dim)) v.

    y = attend(q, k, v, causal=True)

Throughout, q is (B, heads, T, head_dim), k and v are (B, heads, S, head_dim), and the result has
the shape of q. `plain_attention` is the formula; `attend` chooses the fastest kernel for the
device. Tests compare all of them with the formula.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anew.model.kernels.cpu_attention import TILE, TiledBackward, attend_one_query

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """Return the attention of T queries to S keys.

    With `causal`, query t sees the keys 0 to t. With a boolean `mask` (B, 1, T, S), a query sees
    the keys where it is true; a floating-point mask is added to the scores. Otherwise every query
    sees every key. `dropout` is the share of attention weights that are set to zero.

    `kernel` is "plain" for the formula on any device. On NVIDIA GPUs "flash" is FlashAttention,
    "cudnn" is cuDNN's kernel, and "auto" is torch's choice, which since torch 2.11 is cuDNN's on
    the H100 and H200.
    """
    if kernel == "plain":
        return plain_attention(q, k, v, causal=causal, mask=mask, dropout=dropout)
    device = q.device.type
    if device == "cuda":
        backends = kernels_for(kernel, training=torch.is_grad_enabled())
        if backends:
            with sdpa_kernel(backends, set_priority=True):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
                )
    elif device == "mps":
        # torch 2.11 returns wrong values on MPS for permuted tensors (pytorch issue 181133).
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif device == "cpu":
        if _is_one_query_in_bf16(q):
            return attend_one_query(q, k, v, mask)
        is_plain_causal = causal and mask is None and dropout == 0.0
        if is_plain_causal and _has_tiled_backward(q):
            return TiledBackward.apply(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


def kernels_for(kernel: str, training: bool) -> list[SDPBackend]:
    """Return the kernels that torch may use on an NVIDIA GPU, the preferred one first.

    An empty list leaves the choice to torch. cuDNN makes an execution plan for each new shape,
    which takes 55 to 400 ms (flashinfer PR 5245, sglang PR 4650). Training has one shape.
    Evaluation and serving have a new shape in almost every batch, so they never use cuDNN.
    """
    if kernel == "flash" or not training:
        return WITHOUT_CUDNN
    if kernel == "cudnn":
        return CUDNN_FIRST
    return []


def _is_one_query_in_bf16(q: Tensor) -> bool:
    """Whether this is the attention of a single new token during generation."""
    return q.size(2) == 1 and q.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def _has_tiled_backward(q: Tensor) -> bool:
    """Whether causal attention of these queries is to be differentiated, in several whole tiles."""
    T = q.size(2)
    is_training = q.requires_grad and torch.compiler.is_compiling()
    return is_training and T > TILE and T % TILE == 0


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return attention by the formula: the reference for all kernels. Arguments as in `attend`."""
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # An added mask costs nothing in the backward pass. `masked_fill` of the scores takes a
        # third of this function's time on a CPU.
        scores = scores + additive_mask(mask, q.dtype)
    weights = F.softmax(scores, dim=-1)  # (B, heads, T, S), summed in fp32 in every precision
    return F.dropout(weights, dropout) @ v  # (B, heads, T, head_dim)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to be added to the scores: 0 where `mask` is true, minus infinity elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, -math.inf)
