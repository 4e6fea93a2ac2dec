"""Look inside a model: attention weights, the logit lens, and the model without some of its parts.

    trace = trace_of(model, ids)
    trace.attention[5, 1]                           # (T, T): what head 1 of block 5 attends to
    logit_lens(model, trace.residual[:, -1])        # (layers + 1, 50257): what it would say next
    without(model, [Part(5, "head", 1)])(ids)       # the logits if that head added nothing

Blocks and heads are counted from 0, as in the literature. Sources: nostalgebraist 2020,
"interpreting GPT: the logit lens"; Michel et al. 2019, arXiv 1905.10650 (removing heads).
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from anew.errors import UserError
from anew.model.gpt import GPT, Attention, Block


@dataclass(frozen=True)
class Trace:
    """What a model computes inside while it reads one text of T tokens."""

    attention: Tensor  # (layers, heads, T, T), fp32: row t has the weights of token t, sum 1
    residual: Tensor  # (layers + 1, T, C): the residual stream at the start and after each block
    attention_added: Tensor  # (layers, T, C): what the attention of a block adds to the stream
    mlp_added: Tensor  # (layers, T, C): what the MLP of a block adds to the stream


@torch.no_grad()
def trace_of(model: GPT, ids: Sequence[int]) -> Trace:
    """Return what `model` computes for the token ids of one text, at most n_positions of them.

    `model.head(ln_f(trace.residual[-1]))` are the logits of the model. The model is in evaluation
    mode meanwhile, so nothing is dropped.
    """
    was_training = model.training
    model.eval()
    try:
        return _trace(model, ids)
    finally:
        model.train(was_training)


def _trace(model: GPT, ids: Sequence[int]) -> Trace:
    transformer = model.transformer
    device = transformer.wte.weight.device
    positions = torch.arange(len(ids), device=device)
    embedded = transformer.wte(torch.tensor(ids, device=device)) + transformer.wpe(positions)
    x = embedded.to(model.compute_dtype)[None]  # (1, T, C)
    residual = [x]
    attention = []
    attention_added = []
    mlp_added = []
    for block in cast(Iterable[Block], transformer.h):
        normed = block.ln_1(x)
        attention.append(attention_weights(block.attn, normed))
        attention_added.append(block.attn(normed))
        x = x + attention_added[-1]
        mlp_added.append(block.mlp(block.ln_2(x)))
        x = x + mlp_added[-1]
        residual.append(x)
    return Trace(
        attention=torch.cat(attention),
        residual=torch.cat(residual),
        attention_added=torch.cat(attention_added),
        mlp_added=torch.cat(mlp_added),
    )


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """Return the weights (B, heads, T, T) with which tokens attend to each other.

    `x` (B, T, C) is the input of the layer, after the layer norm. The kernels that the model uses
    never hold these weights in memory, so they are computed here, in fp32.
    """
    B, T, _ = x.shape
    config = attention.config
    qkv = attention.c_attn(x).view(B, T, 3, config.n_head, config.head_dim)
    q, k, _ = qkv.float().permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
    scores = q @ k.transpose(-2, -1) / math.sqrt(config.head_dim)  # (B, heads, T, T)
    is_later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(is_later, -math.inf).softmax(-1)


@torch.no_grad()
def logit_lens(model: GPT, residual: Tensor) -> Tensor:
    """Return log-probabilities (..., 50257) of the next token if the model ended here.

    `residual` (..., C) is the residual stream after any block: the final layer norm and the head
    are applied to it. After the last block, the result is the model's own.
    """
    return model.head(model.transformer.ln_f(residual)).float().log_softmax(-1)


@dataclass(frozen=True)
class Part:
    """A part of one block: the whole attention, one head of it, or the MLP."""

    block: int
    kind: Literal["head", "attention", "mlp"]
    head: int = 0  # if the part is a head


def without(model: GPT, parts: Iterable[Part]) -> GPT:
    """Return a model in which some parts add nothing to the residual stream.

    The rows of the output projection that read a part are zero; without a whole attention or MLP,
    so is the bias. All other weights are shared with `model`. Raises UserError for a part that the
    model does not have.
    """
    config = model.config
    shared = {id(parameter): parameter for parameter in model.parameters()}
    changed = copy.deepcopy(model, shared)
    for part in parts:
        is_head = part.kind == "head"
        has_head = not is_head or 0 <= part.head < config.n_head
        if not 0 <= part.block < config.n_layer or not has_head:
            name = f"head {part.head}" if is_head else part.kind
            raise UserError(
                f"there is no {name} in a block {part.block}; this model has blocks 0 to "
                f"{config.n_layer - 1} with heads 0 to {config.n_head - 1}."
            )
        block = cast(Block, changed.transformer.h[part.block])
        projection = block.mlp.c_proj if part.kind == "mlp" else block.attn.c_proj
        for name in ("weight", "bias"):
            parameter = projection.get_parameter(name)
            if id(parameter) in shared:  # not copied yet for another head
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(projection, name, copied)
        if is_head:
            begin = part.head * config.head_dim
            projection.weight.data[begin : begin + config.head_dim] = 0
        else:
            projection.weight.data.zero_()
            projection.bias.data.zero_()
    return changed
