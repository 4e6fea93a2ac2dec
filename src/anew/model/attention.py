"""softmax(q k^T / sqrt(d)) v in three ways, one function: the formula to read, torch's fused kernel, and a faster backward for CPUs.

Everywhere q, k, v are (B, heads, T, head_dim). The model calls `attend`; the tests hold the three to each other.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TILE = 256  # keys a tile: 53 ms a layer of 124M at 4 x 1024 tokens, 58 with 128, 63 with 512, and 74 in torch's kernel

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, kind: str
) -> Tensor:
    """Attention of queries to keys: causal from the first position on, or where `mask` (B, 1, T, S) is true, or to all.

    `kind` names the kernel: `plain` is the formula; on NVIDIA GPUs `flash` is FlashAttention, `cudnn` is cuDNN's, and `auto` is what
    torch chooses, which since torch 2.11 is cuDNN's on the H100 and H200. A mask of floating-point numbers is added to the scores.
    """
    if kind == "plain":
        return plain_attention(q, k, v, mask, dropout, causal)
    if q.device.type == "cuda" and (kernels := kernels_for(kind, torch.is_grad_enabled())):
        with sdpa_kernel(kernels, set_priority=True):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
    if (
        q.device.type == "mps"
    ):  # torch 2.11 returns wrong values there for permuted tensors (pytorch 181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if (
        q.size(2) == 1
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
    ):
        return one_query(q, k, v, mask)
    in_tiles = (
        causal and mask is None and dropout == 0.0 and q.size(2) % TILE == 0 and q.size(2) > TILE
    )
    if in_tiles and q.device.type == "cpu" and q.requires_grad and torch.compiler.is_compiling():
        return TiledBackward.apply(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


def kernels_for(kind: str, training: bool) -> list[SDPBackend]:
    """The kernels that torch may use on an NVIDIA GPU, the preferred one first; none named means that torch chooses.

    cuDNN makes an execution plan for each new shape, which takes 55 to 400 ms (flashinfer PR 5245, sglang PR 4650). Training has one
    shape; evaluation and serving have a new one with almost every batch, so they do without cuDNN.
    """
    if not training or kind == "flash":
        return WITHOUT_CUDNN
    return CUDNN_FIRST if kind == "cudnn" else []


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """The formula as the paper writes it: the reference that the others are tested against."""
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if (
        mask is not None
    ):  # added, which costs nothing backward; filled in, it is a third of this function's time on a CPU
        scores = scores + as_added(mask, q.dtype)
    weights = F.softmax(scores, dim=-1)  # sums in fp32 in every precision
    return F.dropout(weights, dropout) @ v  # (B, heads, T, head_dim)


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: 0 where it is true, and minus infinity elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A single new token's attention in bf16 on a CPU: half the time of torch's kernel, which is made for many queries."""
    scores = (q * k).sum(-1, dtype=torch.float32) / math.sqrt(q.size(-1))  # (B, heads, S)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -math.inf)
    weights = F.softmax(scores, dim=-1).to(v.dtype)
    return (
        (weights[..., None] * v).sum(-2, keepdim=True, dtype=torch.float32).to(v.dtype)
    )  # (B, heads, 1, head_dim)


class TiledBackward(torch.autograd.Function):
    """Causal attention with torch's CPU kernel forward and matrix products over tiles of keys backward.

    The kernel's own backward is a fifth of a 124M step on two cores, at a tenth of the matrix units' rate. Here each tile of keys meets
    the queries behind its first key in five batched products, and the compiler fuses what lies between them. Softmax is rebuilt
    from the forward's log-sums, so nothing of size T x T outlives a tile. (Dao et al. 2022, "FlashAttention", algorithm 4.)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """torch's kernel, as it is."""
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, tile by tile."""
        q, k, v, out, log_sum = ctx.saved_tensors
        dtype, T, scale = q.dtype, q.size(2), 1 / math.sqrt(q.size(-1))
        delta = (grad[0].float() * out.float()).sum(-1, keepdim=True)  # (B, heads, T, 1)
        q, k, v, d_out = (
            (q * scale).contiguous(),
            k.contiguous(),
            v.contiguous(),
            grad[0].contiguous(),
        )
        d_q_parts, d_k, d_v = [], [], []
        for start in range(0, T, TILE):
            keys, values = k[:, :, start : start + TILE], v[:, :, start : start + TILE]
            queries, d_o = q[:, :, start:], d_out[:, :, start:]
            scores, d_p = queries @ keys.mT, d_o @ values.mT  # (B, heads, T - start, TILE)
            visible = torch.arange(T - start, device=q.device)[:, None] >= torch.arange(
                TILE, device=q.device
            )
            p = torch.where(visible, torch.exp(scores.float() - log_sum[:, :, start:, None]), 0.0)
            d_s = (p * (d_p.float() - delta[:, :, start:])).to(dtype)
            d_v.append(p.to(dtype).mT @ d_o)
            d_k.append(d_s.mT @ queries)
            d_q_parts.append(
                d_s @ keys
            )  # what this tile of keys adds to every query behind its start
        d_q = []
        for i in range(T // TILE):
            rows = [
                part[:, :, (i - j) * TILE : (i - j + 1) * TILE].float()
                for j, part in enumerate(d_q_parts[: i + 1])
            ]
            d_q.append(torch.stack(rows).sum(0) * scale)
        return torch.cat(d_q, 2).to(dtype), torch.cat(d_k, 2), torch.cat(d_v, 2)
