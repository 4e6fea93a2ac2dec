# %% [markdown]
# # 4. A transformer from nothing
#
# GPT-2 in one cell, without this project's code: it reads a real Hugging Face folder and gives the same logits as `transformers` and as `anew`.
# Set GPT2_FOLDER to OpenAI's weights to see it with them; otherwise a small random one is made, of the same files.

# %%
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

folder = Path(os.environ.get("GPT2_FOLDER") or tempfile.mkdtemp())
if "GPT2_FOLDER" not in os.environ:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=128)).save_pretrained(
        folder
    )
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## The whole network

# %%
shape = json.loads((folder / "config.json").read_text())
w = {
    name.removeprefix("transformer."): tensor
    for name, tensor in load_file(folder / "model.safetensors").items()
}


def norm(x, name):  # each token's vector to mean 0 and variance 1, then scaled and shifted
    x = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, unbiased=False) + shape["layer_norm_epsilon"]
    ).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, name):  # OpenAI stores matrices as (in, out)
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(
    x,
):  # OpenAI's, by tanh: the exact one differs from it in the fourth decimal, and a loaded GPT-2 notices
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, name):
    B, T, C = x.shape
    q, k, v = (
        part.view(B, T, shape["n_head"], -1).transpose(1, 2)
        for part in linear(x, f"{name}.c_attn").split(C, dim=-1)
    )
    scores = (q @ k.mT / math.sqrt(C // shape["n_head"])).masked_fill(
        ~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf
    )
    return linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), f"{name}.c_proj")


def gpt2(ids):
    x = w["wte.weight"][ids] + w["wpe.weight"][: ids.size(1)]
    for n in range(shape["n_layer"]):
        x = x + attention(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn")  # what tokens tell each other
        x = x + linear(
            gelu(linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")), f"h.{n}.mlp.c_proj"
        )  # what each makes of it
    return (
        norm(x, "ln_f") @ w["wte.weight"].T
    )  # the table that read the tokens also names the next one


ids = torch.randint(50257, (2, 48), generator=torch.Generator().manual_seed(1))
mine = gpt2(ids)

# %% [markdown]
# ## Three implementations, one function

# %%
import anew

with torch.no_grad():
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits
    ours = anew.GPT.from_pretrained(str(folder)).eval()(ids)
print(
    f"largest difference from transformers {(mine - theirs).abs().max():.1e}, from anew {(mine - ours).abs().max():.1e}"
)
torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

x = torch.linspace(-4, 4, 400)
plt.figure(figsize=(5.5, 2.8))
plt.plot(x, gelu(x) - F.gelu(x))
plt.title("tanh GELU less the exact one: small, and not zero")
plt.xlabel("x")
plt.tight_layout()
plt.show()
assert 4e-4 < (gelu(x) - F.gelu(x)).abs().max() < 5e-4

# %% [markdown]
# ## Where the parameters are, and what tying saves

# %%
C, L, V, P = 768, 12, 50257, 1024
parts = {
    "token table": V * C,
    "positions": P * C,
    "attention": L * (4 * C * C + 4 * C),
    "feed-forward": L * (8 * C * C + 5 * C),
    "norms": L * 4 * C + 2 * C,
}
total = sum(parts.values())
assert total == 124_439_808  # "124M"
for name, count in parts.items():
    print(f"{name:<13} {count:>12,}  {100 * count / total:5.1f}%")
print(
    f"{'all':<13} {total:>12,}; with a head of its own it would be {total + V * C:,}: tying saves {100 * V * C / (total + V * C):.0f}%"
)
plt.figure(figsize=(5.5, 2.4))
plt.barh(list(parts), [n / 1e6 for n in parts.values()])
plt.gca().invert_yaxis()
plt.xlabel("millions of parameters in GPT-2 124M")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Against the transformer of 2017
#
# "Attention is all you need" had an encoder and a decoder, norms behind each sublayer, sines for positions and ReLU. GPT-2 keeps the decoder alone, norms in
# front (so the residual stream is a plain sum from the first block to the last), learnt positions and GELU. Norm in front is why deep stacks train
# without tricks: each block adds to the stream, and `c_proj` starts 1/sqrt(2 L) smaller so that the sum does not grow with depth.
#
# First the parameters: a decoder of 2017 has a second attention in each block, to the encoder, and the encoder beside it. Then the stream at initialisation:
# norms behind set it to 1 again after every sublayer, so nothing of it passes through unchanged; in front, it is a sum.

# %%
base = torch.nn.Transformer(512, 8, 6, 6, 2048, batch_first=True, device="meta")
table = 37_000 * 512
both = sum(p.numel() for p in base.parameters())
alone = sum(
    p.numel()
    for name, p in base.decoder.named_parameters()
    if "multihead_attn" not in name and "norm2" not in name
)
print(
    f"the base model of 2017, 6 + 6 layers of 512: {both + table:,} (the paper says 65M); its decoder as GPT-2 has it: {alone + table:,}"
)
assert abs((both + table) / 65e6 - 1) < 0.05

stds = {}
for name in (
    "norms in front, c_proj scaled by 1/sqrt(2 layers)",
    "norms in front, not scaled",
    "norms behind, 2017",
):
    model = anew.GPT(
        anew.GPTConfig(n_layer=24, n_head=4, n_embd=128, n_positions=64, vocab_size=257), seed=3
    )
    with torch.no_grad():
        if "not scaled" in name:
            for parameter, p in model.named_parameters():
                if parameter.endswith("c_proj.weight"):
                    p.mul_(math.sqrt(2 * 24))
        x, found = (
            model.transformer.wte(torch.randint(257, (4, 64))) + model.transformer.wpe.weight,
            [],
        )
        for block in model.transformer.h:
            if "behind" in name:
                x = block.ln_1(x + block.attn(x))
                x = block.ln_2(x + block.mlp(x))
            else:
                x = block(x)
            found.append(x.std().item())
    stds[name] = found
    plt.plot(range(1, 25), found, label=name)
scaled, unscaled, behind = stds.values()
assert unscaled[-1] > 3 * scaled[-1]
assert all(abs(std - 1) < 1e-3 for std in behind)
plt.yscale("log")
plt.xlabel("block")
plt.ylabel("std of the residual stream")
plt.legend()
plt.title("At initialisation, 24 layers")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Write layer normalisation without `F.layer_norm`.


# %%
def my_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    return None  # your answer; eps is 1e-5


# %%
def check_1(my_norm: Callable[..., torch.Tensor | None]) -> str:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, generator=generator) * 0.01 + 2
    weight, bias = torch.randn(2, 8, generator=generator)
    found = my_norm(x, weight, bias)
    if found is None:
        return "not answered yet"
    if torch.allclose(found, F.layer_norm(x, (8,), weight, bias), rtol=1e-3, atol=1e-4):
        return "right"
    deviation = x - x.mean(-1, keepdim=True)
    mistakes = {
        "torch.var divides by n - 1; layer norm divides by n": deviation
        / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
        "eps belongs under the root, beside the variance": deviation
        / (x.std(-1, keepdim=True, unbiased=False) + 1e-5),
        "the mean is not subtracted (this is RMSNorm)": x
        / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt(),
    }
    for reason, normed in mistakes.items():
        if torch.allclose(found, normed * weight + bias, rtol=1e-3, atol=1e-4):
            return f"wrong: {reason}"
    return "wrong: the result differs from F.layer_norm"


print(check_1(my_norm))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def my_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
#     deviation = x - x.mean(-1, keepdim=True)
#     variance = (deviation**2).mean(-1, keepdim=True)
#     return deviation / (variance + 1e-5).sqrt() * weight + bias
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** Each block adds twice to the residual stream. With which standard deviation are the two matrices initialised that write into it, if all others have 0.02?


# %%
def std_of_c_proj(n_layer: int) -> float | None:
    return None  # your answer


# %%
def check_2(std_of_c_proj: Callable[[int], float | None]) -> str:
    found = std_of_c_proj(12)
    if found is None:
        return "not answered yet"
    if math.isclose(found, 0.02 / math.sqrt(12), rel_tol=1e-3):
        return "wrong: a block adds twice, so 12 blocks add 24 times"
    if math.isclose(found, 0.02 / 24, rel_tol=1e-3):
        return "wrong: variances add up, not deviations; so it is a square root"
    for n_layer in (12, 48):
        if not math.isclose(std_of_c_proj(n_layer), 0.02 / math.sqrt(2 * n_layer), rel_tol=1e-3):
            return f"wrong: {std_of_c_proj(n_layer):.5f} for {n_layer} blocks"
    return "right: the sum of all 24 has the variance of one that is not scaled"


print(check_2(std_of_c_proj))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def std_of_c_proj(n_layer: int) -> float:
#     return 0.02 / math.sqrt(2 * n_layer)
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Replace `gelu` by `F.gelu` above: which assert fails, and by how much?
# 2. Train both forms with 24 layers, with and without a warm-up. Which needs it?
# 3. GPT-2's `wpe` is learnt. Load OpenAI's weights and plot a few of its columns: what do you see?
