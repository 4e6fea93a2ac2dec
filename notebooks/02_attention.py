# %% [markdown]
# # 2. Attention, by hand and in tiles
#
# Each token looks back at those before it and takes a mean of what they offer, weighted by how well its query meets their keys:
# $\mathrm{softmax}(QK^\top/\sqrt{d})\,V$. First as the formula, then as flash attention computes it, and the two are the same.

# %%
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch.nn import functional as F

torch.manual_seed(1)
T, d = 64, 16
q, k, v = (torch.randn(1, 1, T, d, dtype=torch.float64) for _ in range(3))

# %% [markdown]
# ## The formula

# %%
scores = q @ k.mT / math.sqrt(d)  # (1, 1, T, T): how well each query meets each key
causal = torch.ones(T, T, dtype=torch.bool).tril()  # a token sees itself and what came before
weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
out = weights @ v
torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, T, dtype=torch.float64))

plt.figure(figsize=(4, 3.6))
plt.imshow(weights[0, 0], cmap="viridis")
plt.xlabel("key: what is looked at")
plt.ylabel("query: who looks")
plt.title("Attention weights: rows sum to 1")
plt.colorbar()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Why divide by $\sqrt{d}$
#
# A dot product of two random vectors of $d$ numbers has a standard deviation of $\sqrt{d}$. Undivided, the softmax would put nearly all weight
# on one key from the start, where its gradient is almost nothing.

# %%
for size in (16, 64, 256):
    a, b = torch.randn(2000, size), torch.randn(2000, size)
    products = (a * b).sum(-1)
    print(
        f"d = {size:<4} std of q.k = {products.std():5.1f}   after dividing = {(products / math.sqrt(size)).std():.2f}"
    )
    assert abs((products / math.sqrt(size)).std() - 1) < 0.1

# %% [markdown]
# ## Causality, by gradient
#
# If the output at position 20 depended on anything later, its gradient by a later value would not be zero. That is a sharper test than any look
# at the code.

# %%
v_ = v.clone().requires_grad_()
F.scaled_dot_product_attention(q, k, v_, is_causal=True)[0, 0, 20].sum().backward()
assert v_.grad[0, 0, 21:].abs().max() == 0
assert (v_.grad[0, 0, :21].abs().sum(-1) > 0).all()

# %% [markdown]
# ## Flash attention: never the whole matrix
#
# The matrix of weights has T x T numbers; at T = 4096 and 12 heads that is 400 MB a sequence in bf16. Flash attention (Dao et al. 2022) goes through the
# keys in tiles and keeps, for each query, three running things: the largest score so far, the sum of exponentials relative to it, and the weighted
# sum of values. When a larger score comes, what was summed is scaled down.

# %%


def in_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int = 16) -> torch.Tensor:
    T, d = q.shape[-2:]
    result = torch.zeros_like(v)
    for i in range(0, T, tile):  # a tile of queries
        most = torch.full((tile, 1), -torch.inf, dtype=q.dtype)
        total, mixed = torch.zeros(tile, 1, dtype=q.dtype), torch.zeros(tile, d, dtype=q.dtype)
        for j in range(
            0, i + tile, tile
        ):  # tiles of keys behind the diagonal are never touched: half of the work is saved
            s = q[0, 0, i : i + tile] @ k[0, 0, j : j + tile].T / math.sqrt(d)
            if i == j:
                s = s.masked_fill(~torch.ones(tile, tile, dtype=torch.bool).tril(), -torch.inf)
            higher = torch.maximum(most, s.amax(-1, keepdim=True))
            p, shrink = (s - higher).exp(), (most - higher).exp()
            total, mixed, most = (
                total * shrink + p.sum(-1, keepdim=True),
                mixed * shrink + p @ v[0, 0, j : j + tile],
                higher,
            )
        result[0, 0, i : i + tile] = mixed / total
    return result


torch.testing.assert_close(in_tiles(q, k, v), out)
torch.testing.assert_close(in_tiles(q, k, v, tile=32), out)

figure, axes = plt.subplots(figsize=(4.2, 4.2))
number = 0
for i in range(4):
    for j in range(4):
        kind = "#e9ecf1" if j > i else "#f3c88b" if i == j else "#8fb4e8"
        axes.add_patch(Rectangle((j, 3 - i), 1, 1, facecolor=kind, edgecolor="white"))
        if j <= i:
            number += 1
            axes.text(j + 0.5, 3.5 - i, str(number), ha="center", va="center")
axes.set(
    xlim=(0, 4),
    ylim=(0, 4),
    xticks=[],
    yticks=[],
    xlabel="tiles of keys",
    ylabel="tiles of queries",
    title="The order of the tiles; grey: never computed",
)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Many heads
#
# GPT-2 124M has 12 heads of 64 dimensions. They are one matrix product: `c_attn` gives all queries, keys and values at once, and a reshape
# makes heads of them. Here against the project's own module, in fp64:

# %%
from anew import GPT, GPTConfig

config = GPTConfig(n_layer=1, n_head=4, n_embd=32, n_positions=16, vocab_size=257)
module = GPT(config, torch.float64, seed=2).double().transformer.h[0].attn
x = torch.randn(2, 10, 32, dtype=torch.float64)
projected = (x @ module.c_attn.weight + module.c_attn.bias).split(
    32, dim=-1
)  # three times (2, 10, 32)
heads = [part.view(2, 10, 4, 8).transpose(1, 2) for part in projected]  # (2, 4, 10, 8)
s = (heads[0] @ heads[1].mT / math.sqrt(8)).masked_fill(
    ~torch.ones(10, 10, dtype=torch.bool).tril(), -torch.inf
)
mine = (s.softmax(-1) @ heads[2]).transpose(1, 2).reshape(
    2, 10, 32
) @ module.c_proj.weight + module.c_proj.bias
torch.testing.assert_close(mine, module(x))

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Write the weights of causal attention: `q` and `k` are (T, d), and row t of the result has the weights with which token t attends to the others.


# %%
def causal_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    return None  # your answer


# %%
def check_1(causal_weights: Callable[..., torch.Tensor | None]) -> str:
    q, k = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3))
    found = causal_weights(q, k)
    if found is None:
        return "not answered yet"
    if found.shape != (6, 6):
        return f"wrong: the shape is {tuple(found.shape)}, not (6, 6)"
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    right = (q @ k.T / 4).masked_fill(later, -torch.inf).softmax(-1)
    if torch.allclose(found, right, atol=1e-6):
        return "right: each row sums to 1, and nothing is above the diagonal"
    if found[later].abs().max() > 1e-6:
        return "wrong: a token attends to later ones"
    if torch.allclose(found.sum(0), torch.ones(6)):
        return "wrong: the columns sum to 1; the softmax goes along the last axis"
    if (found.sum(-1) - 1).abs().max() > 1e-4:
        return "wrong: the rows do not sum to 1; mask the scores before the softmax"
    unscaled = (q @ k.T).masked_fill(later, -torch.inf).softmax(-1)
    if torch.allclose(found, unscaled, atol=1e-6):
        return "wrong: the scores are not divided by the square root of d"
    return "wrong: the rows sum to 1, but the weights are others"


print(check_1(causal_weights))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def causal_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
#     T, d = q.shape
#     later = torch.ones(T, T, dtype=torch.bool).triu(1)
#     return (q @ k.T / math.sqrt(d)).masked_fill(later, -torch.inf).softmax(-1)
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** With a sliding window, a token sees itself and the `w` - 1 tokens before it. Write the mask (T, T): true where a row may look.


# %%
def window_mask(T: int, w: int) -> torch.Tensor | None:
    return None  # your answer


# %%
def check_2(window_mask: Callable[[int, int], torch.Tensor | None]) -> str:
    found = window_mask(6, 3)
    if found is None:
        return "not answered yet"
    if found[0].sum() > 1:
        return "wrong: the first token sees later ones"
    counts = found.sum(-1).tolist()
    if counts == [1, 2, 3, 4, 4, 4]:
        return "wrong: the window is one too wide; it includes the token itself"
    places = torch.arange(6)
    distance = places[:, None] - places
    if not torch.equal(found.bool(), (distance >= 0) & (distance < 3)):
        return f"wrong: with a window of 3, the rows see {counts} tokens, or the wrong ones"
    return "right: T x w scores instead of T x T / 2"


print(check_2(window_mask))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def window_mask(T: int, w: int) -> torch.Tensor:
#     row, column = torch.arange(T)[:, None], torch.arange(T)
#     return (column <= row) & (column > row - w)
# ```
#
# Mistral's first model had such a window; GPT-2 sees everything.
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Leave out `shrink` in `in_tiles`. Which queries go wrong, and why not the first tile's?
# 2. Count how many numbers `in_tiles` holds at once for T = 4096, tile = 128, and compare with T x T.
# 3. `anew bench attention` times both kinds on your machine. From which T on is the fused kernel faster?
