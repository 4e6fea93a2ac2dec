"""Linear layers and GELU in forms that read memory less often, with the gradients of their biases.

Left to autograd, the gradient of a bias is a pass of its own over a large activation. Here the sum
over positions stands in one loop with other work, which is a form that Inductor fuses
(benchmarks/generated_code.py counts the bytes). The two autograd functions are for compiled code on
GPUs; uncompiled they would be slower than plain layers.
"""

import math
from typing import Any

import torch
from torch import Tensor

GELU_SCALE = math.sqrt(8 / math.pi)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W + b, the bias added while the product is written: (..., in) -> (..., out)."""
    rows = x.flatten(0, -2)  # (B T, in)
    rows = torch.addmm(bias, rows, weight)  # (B T, out)
    return rows.view(*x.shape[:-1], -1)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """Return the tanh GELU of x as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), in fp32.

    In compiled code on a CPU, Inductor's tanh takes 2.3 times as long as its exp.
    """
    v = x.float()
    y = v * _sigmoid_of_2u(v)
    return y.to(x.dtype)


def _sigmoid_of_2u(v: Tensor) -> Tensor:
    u_times_2 = GELU_SCALE * (v + 0.044715 * v**3)
    return torch.sigmoid(u_times_2)


class QueryKeyValue(torch.autograd.Function):
    """x W + b as queries, keys and values: (B, T, C) -> three tensors (B, heads, T, head_dim).

    The backward pass joins the three gradients into one matrix for the products, and sums that
    matrix for the bias in the same pass over memory. Autograd would read it again: 3.6 of 60.9 GB
    at 124M and 64 x 1024 tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        heads: int,
    ) -> tuple[Tensor, ...]:
        """Return three views of one product."""
        B, T, C = x.shape
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, 1)  # (B T, C)
        rows = torch.addmm(bias, rows, weight)  # (B T, 3 C)
        qkv = rows.view(B, T, 3, heads, C // heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, T, head_dim)
        return qkv.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        joined = torch.cat(
            [grad.transpose(1, 2).reshape(x.shape) for grad in grads],
            dim=-1,
        )  # (B, T, 3 C)
        d_bias = joined.sum(1, dtype=torch.float32)
        d_bias = d_bias.sum(0).to(weight.dtype)
        rows = joined.flatten(0, 1)  # (B T, 3 C)
        d_x = rows @ weight.t()
        d_x = d_x.view(x.shape)
        inputs = x.flatten(0, 1)  # (B T, C)
        d_weight = inputs.t() @ rows  # (C, 3 C)
        return d_x, d_weight, d_bias, None


class BiasGelu(torch.autograd.Function):
    """gelu(x + bias), with both gradients in one pass over memory: x (B, T, C), bias (C,).

    Left to autograd, the gradient of the bias is 4.8 of 65.7 GB at 124M and 64 x 1024 tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """Return the activation in the dtype of x; it is computed in fp32."""
        ctx.save_for_backward(x, bias)
        y = gelu_by_sigmoid(x.float() + bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the bias.

        With v = x + bias and s = sigmoid(2u), the derivative of v s is s + v s (1 - s) 2 du/dv.
        """
        x, bias = ctx.saved_tensors
        v = x.float() + bias
        s = _sigmoid_of_2u(v)
        slope = s + v * s * (1 - s) * GELU_SCALE * (1 + 3 * 0.044715 * v * v)
        d_v = d_y.float() * slope  # (B, T, C)
        d_x = d_v.to(x.dtype)
        d_bias = d_v.sum(1).sum(0)
        return d_x, d_bias.to(bias.dtype)
