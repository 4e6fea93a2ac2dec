"""GPT-2, and nothing else: the network that OpenAI released, tensor for tensor.

    model = GPT(GPTConfig())                    # 124M, random weights
    logits = model(ids)                         # (B, T) -> (B, T, 50257)
    loss = model(ids, targets)                  # mean cross-entropy in nats, the training step's one call

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (section 2.3: pre-norm blocks,
residual projections scaled by 1/sqrt(N)); openai/gpt-2 `src/model.py` (tanh GELU, `wpe` std 0.01, layout of the weights).

Weights stay in fp32 and follow the activations: `compute_dtype` is the dtype that `wte` hands to the first block, and each layer
casts its own weights to what it receives. There is no autocast, so what runs in bf16 can be read here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anew.config.schema import GPTConfig, rounded_up
from anew.model.attention import attend
from anew.model.loss import HeadLoss


class Linear(nn.Module):
    """y = x W + b with W stored (in, out), as OpenAI stored it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not is_on_gpu(x):
            return x @ weight + bias
        rows = torch.addmm(
            bias, x.flatten(0, -2), weight
        )  # (B T, out), the bias added as the product is written
        return rows.view(*x.shape[:-1], -1)


def is_on_gpu(x: Tensor) -> bool:
    """Is this tensor on a GPU of any kind? There, code is written for few passes over memory; a CPU prefers other forms of it."""
    return x.device.type != "cpu"


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift. Statistics are fp32 in every precision."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # fp32 weights cost nothing there; rounded to bf16, a weight near 1 moves in steps of 0.004
            normed = F.layer_norm(
                x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps
            )
            return normed.to(x.dtype)
        return F.layer_norm(
            x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


@dataclass
class Cache:
    """Keys and values of the tokens already read, so that each new token costs one row of work.

    `keys` and `values` are (layers, B, heads, capacity, head_dim); `lengths` (B,) says how many slots of each row hold
    tokens. `used` is the largest of them, known without asking the device; `ragged` says that rows differ. The cache is an
    argument: `forward` writes the new tokens behind the old ones and moves `lengths` on.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    used: int = 0
    ragged: bool = False

    @classmethod
    def empty(cls, model: "GPT", batch: int, capacity: int) -> Self:
        """A cache for `batch` rows of at most `capacity` tokens (never more than the model's positions)."""
        c = model.config
        assert capacity <= c.n_positions, (
            f"a cache of {capacity} tokens, but the model has {c.n_positions} positions"
        )
        shape = (c.n_layer, batch, c.n_head, capacity, c.head_dim)
        wte = model.transformer.wte.weight
        keys, values = (
            torch.zeros(shape, dtype=model.compute_dtype, device=wte.device) for _ in range(2)
        )
        return cls(keys, values, torch.zeros(batch, dtype=torch.long, device=wte.device))

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each row: what a padded prefill needs."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.used, self.ragged = max(lengths), len(set(lengths)) > 1

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, heads, T, head_dim) behind each row's tokens; return all that can be attended to."""
        T, end = k.size(2), self.used + k.size(2)
        if self.ragged:
            rows = torch.arange(k.size(0), device=k.device)[:, None]
            slots = self.lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
            self.keys[layer][rows, :, slots] = k.transpose(1, 2)
            self.values[layer][rows, :, slots] = v.transpose(1, 2)
        else:
            self.keys[layer, :, :, self.used : end] = k
            self.values[layer, :, :, self.used : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def positions(self, T: int) -> Tensor:
        """Where T new tokens stand: (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def mask(self, T: int) -> Tensor | None:
        """Which slots may each of T new tokens see: (B, 1, T, used + T), or None: all before it.

        SDPA's `is_causal` aligns the triangle top-left when queries are fewer than keys, so it cannot be used behind a filled cache.
        """
        if self.used == 0 or (T == 1 and not self.ragged):
            return None
        slot = torch.arange(self.used + T, device=self.lengths.device)
        return (slot <= self.positions(T)[:, :, None])[:, None]


class QueryKeyValue(torch.autograd.Function):
    """x W + b as queries, keys and values. For compiled code: x (B, T, C) -> three tensors (B, heads, T, head_dim).

    In the backward pass their gradients are joined into one matrix for the products, and summed for the bias in the same pass over
    memory. Autograd would read the joined matrix again: 3.6 of 60.9 GB at 124M and 64 x 1024. Joined along the last axis and summed over
    positions is a form that Inductor fuses (benchmarks/generated_code.py).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, heads: int
    ) -> tuple[Tensor, ...]:
        """Views of one product."""
        B, T, C = x.shape
        ctx.save_for_backward(x, weight)
        rows = torch.addmm(bias, x.flatten(0, 1), weight)  # (B T, 3 C)
        return rows.view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W and b."""
        x, weight = ctx.saved_tensors
        joined = torch.cat(
            [grad.transpose(1, 2).reshape(x.shape) for grad in grads], dim=-1
        )  # (B, T, 3 C)
        d_bias = joined.sum(1, dtype=torch.float32).sum(0).to(weight.dtype)
        rows = joined.flatten(0, 1)  # (B T, 3 C)
        return (rows @ weight.t()).view(x.shape), x.flatten(0, 1).t() @ rows, d_bias, None


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.config, self.layer = config, layer

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        c = self.config
        if torch.compiler.is_compiling() and is_on_gpu(x):
            weight, bias = self.c_attn.weight.to(x.dtype), self.c_attn.bias.to(x.dtype)
            q, k, v = QueryKeyValue.apply(x, weight, bias, c.n_head)
        else:
            q, k, v = (
                self.c_attn(x).view(B, T, 3, c.n_head, c.head_dim).permute(2, 0, 3, 1, 4)
            )  # each (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        causal = mask is None and (cache is None or k.size(2) == T)
        y = attend(q, k, v, mask, c.dropout if self.training else 0.0, causal, c.attention)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


GELU_SCALE = math.sqrt(8 / math.pi)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). The exact GELU differs from it by up to 4.7e-4.

    Compiled code gets the same function as x sigmoid(2u): Inductor's tanh on a CPU takes 2.3 times as long as its exp.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide * torch.sigmoid(GELU_SCALE * (wide + 0.044715 * wide**3))).to(x.dtype)


class BiasGelu(torch.autograd.Function):
    """gelu(x + bias), and both gradients in one pass over memory. For compiled code: x (B, T, C) in bf16, bias (C,).

    Left to autograd, the bias's gradient is a pass of its own over the largest activation: 4.8 of 65.7 GB at 124M and 64 x 1024. The
    sum over positions, in one loop with the gradient of x, is a form that Inductor fuses (benchmarks/generated_code.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """The activation, in the dtype of x; computed in fp32."""
        ctx.save_for_backward(x, bias)
        return gelu(x.float() + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the bias. With s = sigmoid(2u), the derivative of v s is s + v s (1 - s) 2 du/dv."""
        x, bias = ctx.saved_tensors
        v = x.float() + bias
        s = torch.sigmoid(GELU_SCALE * (v + 0.044715 * v**3))
        slope = s + v * s * (1 - s) * GELU_SCALE * (1 + 3 * 0.044715 * v * v)
        d_x = grad[0].float() * slope
        return d_x.to(x.dtype), d_x.sum(1).sum(0).to(bias.dtype)


class MLP(nn.Module):
    """Four times wider, tanh GELU, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and is_on_gpu(x):
            return self.c_proj(BiasGelu.apply(x @ self.c_fc.weight.to(x.dtype), self.c_fc.bias))
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x), cache, mask), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """The named tensors of a GPT-2: exactly what stands under `transformer.` in a Hugging Face folder."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)


class GPT(nn.Module):
    """GPT-2 with its language-model head, which is `wte` again."""

    def __init__(
        self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32, seed: int | None = 0
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.transformer = Transformer(config)
        if seed is not None:
            self.init_weights(torch.Generator().manual_seed(seed))
        self.transformer.wte.weight.data[config.vocab_size :] = 0.0  # padding rows
        self.head_loss: Callable[..., Tensor] = (
            HeadLoss.apply
        )  # an attribute, so that it can be compiled by itself

    @classmethod
    def from_pretrained(cls, model: str) -> "GPT":
        """The model in a run folder, a checkpoint folder or a Hugging Face folder (see `weights.load_model`)."""
        from anew.checkpoint.huggingface import (
            load_model,
        )  # the one upward import: this method is a public name of the model

        return load_model(model)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """GPT-2's initialisation: std 0.02, residual projections 0.02/sqrt(2 x layers), `wpe` its own, padding rows zero."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if ".ln_" in name:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                std = (
                    residual_std
                    if "c_proj" in name
                    else self.config.wpe_std
                    if "wpe" in name
                    else 0.02
                )
                rows = (
                    rounded_up(p.size(0)) if "wte" in name else p.size(0)
                )  # the same numbers whether padded or not
                p.copy_(
                    torch.empty(rows, *p.shape[1:]).normal_(0.0, std, generator=generator)[
                        : p.size(0)
                    ]
                )

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, C) after the final layer norm, in `compute_dtype`. A cache is filled on the way.

        `position` (B, T) and `mask` (B, 1, T, T) are for rows that are not one text from left to right (see evaluate/score.py).
        """
        t, T = self.transformer, ids.size(1)
        if cache is not None:
            position, mask = cache.positions(T), cache.mask(T)
        if position is None:
            position = torch.arange(T, device=ids.device)
        x = (t.wte(ids) + t.wpe(position)).to(self.compute_dtype)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.config.recompute and torch.is_grad_enabled()
        for block in t.h:
            x = (
                checkpoint(block, x, cache, mask, use_reentrant=False)
                if recompute
                else block(x, cache, mask)
            )
        if cache is not None:
            cache.lengths = cache.lengths + T
            cache.used += T
        return t.ln_f(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., 50257). Padding rows of `wte` are storage; they take no part."""
        return F.linear(
            hidden, self.transformer.wte.weight[: self.config.vocab_size].to(hidden.dtype)
        )

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits (B, T, 50257), or with `targets` (B, T) the mean loss in nats over targets that are not -100."""
        hidden = self.hidden(ids, cache)
        if targets is None:
            return self.head(hidden)
        wte = self.transformer.wte.weight
        if self.config.head == "plain":
            logits = F.linear(hidden, wte.to(hidden.dtype))[
                ..., : self.config.vocab_size
            ]  # (B, T, 50257)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        training = torch.is_grad_enabled()  # inside the function it never is
        return self.head_loss(
            hidden.flatten(0, 1), wte, targets.flatten(), self.config.vocab_size, training
        )


def count_parameters(config: GPTConfig) -> int:
    """Parameters with the padded vocabulary: 124,475,904 for the 124M shape. wte, wpe, per layer 12 C^2 + 13 C, ln_f."""
    C = config.n_embd
    return (
        (config.padded_vocab_size + config.n_positions) * C
        + config.n_layer * (12 * C * C + 13 * C)
        + 2 * C
    )


def flops_per_token(config: GPTConfig, seq_len: int, causal: bool = True) -> int:
    """Floating-point operations a token costs forward and backward: 798 M for 124M at T=1024 (855 M if not causal).

    Counted from the matrix products alone, two operations a multiply-add, backward twice the forward: 6 a weight of the blocks and
    of the padded head, and 12 x layers x C x (mean number of keys seen) for attention.
    """
    C, keys = config.n_embd, (seq_len + 1) / 2 if causal else seq_len
    blocks = 6 * config.n_layer * 12 * C * C
    head = 6 * config.padded_vocab_size * C
    return int(blocks + head + 12 * config.n_layer * C * keys)
