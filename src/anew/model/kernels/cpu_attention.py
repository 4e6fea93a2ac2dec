"""Attention on CPUs in two cases where torch's kernel is slow: one query, and the backward pass.

q is (B, heads, T, head_dim); k and v are (B, heads, S, head_dim).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Keys in a tile. A layer of 124M at 4 x 1024 tokens takes 53 ms with 256, 58 ms with 128, 63 ms
# with 512, and 74 ms in torch's kernel.
TILE = 256


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of one new token (T = 1) in bf16. `mask` is boolean, (B, 1, 1, S).

    This takes half the time of torch's kernel, which is made for many queries.
    """
    scores = (q * k).sum(-1, dtype=torch.float32)  # (B, heads, S)
    scores = scores / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -math.inf)
    weights = F.softmax(scores, dim=-1).to(v.dtype)  # (B, heads, S)
    weighted = weights[..., None] * v  # (B, heads, S, head_dim)
    y = weighted.sum(-2, keepdim=True, dtype=torch.float32)
    return y.to(v.dtype)  # (B, heads, 1, head_dim)


class TiledBackward(torch.autograd.Function):
    """Causal attention: torch's CPU kernel forward, matrix products over tiles of keys backward.

    The backward pass of torch's kernel takes a fifth of a 124M step on two cores, at a tenth of the
    rate of the matrix units. Here each tile of keys meets the queries from its first key on in five
    batched products, and the compiler fuses what lies between them. The softmax is computed again
    from the log-sums of the forward pass, so no tensor of T x T elements is kept
    (Dao et al. 2022, "FlashAttention", algorithm 4). T must be a multiple of TILE.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return torch's result; keep its log-sums (B, heads, T)."""
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = flash_attention(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = 1 / math.sqrt(q.size(-1))
        delta = d_out.float() * out.float()
        delta = delta.sum(-1, keepdim=True)  # (B, heads, T, 1)
        q = (q * scale).contiguous()
        k = k.contiguous()
        v = v.contiguous()
        d_out = d_out.contiguous()
        d_q = []
        d_k = []
        d_v = []
        for start in range(0, q.size(2), TILE):
            end = start + TILE
            d_queries, d_keys, d_values = _gradients_of_tile(
                k[:, :, start:end],
                v[:, :, start:end],
                q[:, :, start:],
                d_out[:, :, start:],
                log_sum[:, :, start:, None],
                delta[:, :, start:],
            )
            d_q.append(d_queries)
            d_k.append(d_keys)
            d_v.append(d_values)
        return (
            _sum_over_tiles(d_q, scale).to(q.dtype),
            torch.cat(d_k, dim=2),
            torch.cat(d_v, dim=2),
        )


def _gradients_of_tile(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    d_out: Tensor,
    log_sum: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one tile of keys adds to the gradients of queries, keys and values.

    keys and values are (B, heads, TILE, head_dim). The other tensors are those of the n queries
    from the first key of the tile on: (B, heads, n, head_dim), log_sum and delta (B, heads, n, 1).
    """
    dtype = queries.dtype
    scores = queries @ keys.mT  # (B, heads, n, TILE)
    d_p = d_out @ values.mT  # (B, heads, n, TILE)
    query = torch.arange(queries.size(2), device=queries.device)
    key = torch.arange(TILE, device=queries.device)
    visible = query[:, None] >= key  # (n, TILE)
    p = torch.exp(scores.float() - log_sum)
    p = torch.where(visible, p, 0.0)
    d_scores = p * (d_p.float() - delta)
    d_scores = d_scores.to(dtype)
    p = p.to(dtype)
    d_values = p.mT @ d_out  # (B, heads, TILE, head_dim)
    d_keys = d_scores.mT @ queries  # (B, heads, TILE, head_dim)
    d_queries = d_scores @ keys  # (B, heads, n, head_dim)
    return d_queries, d_keys, d_values


def _sum_over_tiles(parts: list[Tensor], scale: float) -> Tensor:
    """Return the sum of the tiles' gradients of q: (B, heads, T, head_dim) in fp32.

    parts[j] belongs to the queries from the j-th tile on: (B, heads, T - j TILE, head_dim).
    """
    tiles = [part.split(TILE, dim=2) for part in parts]
    sums = []
    for i in range(len(parts)):
        gradients = [tiles[j][i - j].float() for j in range(i + 1)]
        total = torch.stack(gradients).sum(0)  # (B, heads, TILE, head_dim)
        sums.append(total * scale)
    return torch.cat(sums, dim=2)
