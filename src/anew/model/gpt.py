"""The GPT-2 network as OpenAI released it: the same layers, arithmetic and tensor names.

    model = GPT(GPTConfig())      # 124M, random weights
    logits = model(ids)           # (B, T) -> (B, T, 50257)
    loss = model(ids, targets)    # mean cross-entropy in nats

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3
(layer norm before each sub-layer, residual projections scaled by 1/sqrt(N)); `src/model.py` of
openai/gpt-2 (tanh GELU, `wpe` std 0.01, layout of the weights).

Weights are stored in fp32. The sum of the embeddings is cast to `compute_dtype`, and each layer
casts its weights to the dtype of its input. There is no autocast, so this file shows what is
computed in bf16.

In shape comments, B is the number of sequences, T the number of tokens in each and C is n_embd. S
is the number of keys that attention sees: T, and with a cache the tokens in it too.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anew.config.schema import GPTConfig, rounded_up
from anew.model.attention import attend
from anew.model.kernels.fused_bias import BiasGelu, QueryKeyValue, fused_linear, gelu_by_sigmoid
from anew.model.kv_cache import Cache
from anew.model.loss import IGNORED, HeadLoss, plain_loss


def is_on_gpu(x: Tensor) -> bool:
    """Return whether x is on a GPU of any kind, where fused layers save passes over memory."""
    return x.device.type != "cpu"


def is_compiled_for_gpu(x: Tensor) -> bool:
    """Return whether this code is being compiled for a GPU."""
    return torch.compiler.is_compiling() and is_on_gpu(x)


class Linear(nn.Module):
    """y = x W + b, with W stored as (in, out) as OpenAI stored it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        if is_on_gpu(x):
            return fused_linear(x, weight, bias)
        return x @ weight + bias  # (..., out)


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it.

    Mean and variance are computed in fp32 in every precision.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Compiled code computes in fp32 at no cost. Rounded to bf16, a weight near 1 would move in
        # steps of 0.004.
        dtype = torch.float32 if torch.compiler.is_compiling() else x.dtype
        weight = self.weight.to(dtype)
        bias = self.bias.to(dtype)
        normed = F.layer_norm(x.to(dtype), weight.shape, weight, bias, self.eps)
        return normed.to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.config = config
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        B, T, C = x.shape
        config = self.config
        if is_compiled_for_gpu(x):
            weight = self.c_attn.weight.to(x.dtype)
            bias = self.c_attn.bias.to(x.dtype)
            q, k, v = QueryKeyValue.apply(x, weight, bias, config.n_head)
        else:
            qkv = self.c_attn(x).view(B, T, 3, config.n_head, config.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # each (B, heads, S, head_dim)
        # Behind a filled cache, a mask says what is visible; without one it is every key.
        causal = mask is None and (cache is None or cache.used == 0)
        dropout = config.dropout if self.training else 0.0
        y = attend(
            q,
            k,
            v,
            causal=causal,
            mask=mask,
            dropout=dropout,
            kernel=config.attention,
        )  # (B, heads, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


def gelu(x: Tensor) -> Tensor:
    """Return GPT-2's GELU: x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3).

    The exact GELU, with the error function, differs from it by up to 4.7e-4.
    """
    if torch.compiler.is_compiling():
        return gelu_by_sigmoid(x)
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if is_compiled_for_gpu(x):
            weight = self.c_fc.weight.to(x.dtype)
            x = BiasGelu.apply(x @ weight, self.c_fc.bias)  # (B, T, 4 C)
        else:
            x = gelu(self.c_fc(x))  # (B, T, 4 C)
        return self.c_proj(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        attended = self.attn(self.ln_1(x), cache, mask)  # (B, T, C)
        x = x + F.dropout(attended, self.dropout, self.training)
        transformed = self.mlp(self.ln_2(x))  # (B, T, C)
        return x + F.dropout(transformed, self.dropout, self.training)


class Transformer(nn.Module):
    """The tensors of a GPT-2, under the names that they have in a Hugging Face folder."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)


class GPT(nn.Module):
    """GPT-2 with its language-model head, whose matrix is the token embedding `wte`.

    `seed` is that of the initial weights. With None they are not initialised, for a caller that
    loads weights.
    """

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = Transformer(config)
        if seed is not None:
            self.init_weights(torch.Generator().manual_seed(seed))
        self.transformer.wte.weight.data[config.vocab_size :] = 0.0  # padding rows
        # An attribute, so that the loss can be compiled by itself.
        self.head_loss: Callable[..., Tensor] = HeadLoss.apply

    @classmethod
    def from_pretrained(cls, model: str | Path) -> "GPT":
        """Return the model of a run, checkpoint or Hugging Face folder (see `load_model`)."""
        # This is the one import of a room above: `from_pretrained` is a public name of the model.
        from anew.checkpoint.huggingface import load_model

        return load_model(model)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw every matrix from a normal distribution. Biases are 0 and layer-norm weights 1."""
        config = self.config
        std = {
            "wte": 0.02,
            "wpe": config.wpe_std,
            "c_attn": 0.02,
            "c_fc": 0.02,
            "c_proj": 0.02 / math.sqrt(2 * config.n_layer),  # added to the residual stream
        }
        for name, parameter in self.named_parameters():
            module = name.split(".")[-2]  # "transformer.h.0.mlp.c_proj.weight" -> "c_proj"
            if parameter.ndim == 2:
                n_rows, n_columns = parameter.shape
                # The numbers are the same whether `wte` has padding rows or not.
                n_drawn = rounded_up(n_rows) if module == "wte" else n_rows
                drawn = torch.empty(n_drawn, n_columns)
                drawn.normal_(0.0, std[module], generator=generator)
                parameter.copy_(drawn[:n_rows])

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        position: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, C) of token ids (B, T), in `compute_dtype`.

        Keys and values are added to `cache`. `position` (B, T) and `mask` (B, 1, T, T) are for rows
        that are not one text from left to right (see evaluate/scorer.py).
        """
        transformer = self.transformer
        T = ids.size(1)
        if cache is not None:
            position = cache.positions(T)  # (B, T)
            mask = cache.mask(T)  # (B, 1, T, S)
        elif position is None:
            position = torch.arange(T, device=ids.device)
        embedded = transformer.wte(ids) + transformer.wpe(position)  # (B, T, C)
        x = F.dropout(embedded.to(self.compute_dtype), self.config.dropout, self.training)
        recompute = self.config.recompute and torch.is_grad_enabled()
        for block in transformer.h:
            if recompute:
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)  # (B, T, C)
        if cache is not None:
            cache.advance(T)
        return transformer.ln_f(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., 50257) of hidden states (..., C), without padding rows."""
        wte = self.transformer.wte.weight[: self.config.vocab_size]
        return F.linear(hidden, wte.to(hidden.dtype))

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        few_targets: bool = False,
    ) -> Tensor:
        """Return the logits (B, T, 50257) of ids (B, T), or with `targets` (B, T) the loss.

        The loss is the mean cross-entropy in nats over the targets that are not -100. With
        `few_targets`, logits are computed where there is a target only. The result is the same, and
        it takes less time if most targets are -100, but compiled code would be compiled again for
        each number of targets.
        """
        hidden = self.hidden(ids, cache)  # (B, T, C)
        if targets is None:
            return self.head(hidden)
        wte = self.transformer.wte.weight
        vocab_size = self.config.vocab_size
        if self.config.head == "plain":
            return plain_loss(hidden, wte, targets, vocab_size)
        rows = hidden.flatten(0, 1)  # (B T, C)
        row_targets = targets.flatten()
        if few_targets:
            is_target = row_targets != IGNORED
            rows, row_targets = rows[is_target], row_targets[is_target]
        return self.head_loss(
            rows,
            wte,
            row_targets,
            vocab_size,
            torch.is_grad_enabled(),  # inside the function, gradients are always disabled
        )
