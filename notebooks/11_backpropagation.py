# %% [markdown]
# # 11. Back-propagation by hand
#
# `loss.backward()` hides the part of training that looks most like magic. Here it is written from nothing but NumPy: sixty lines for the rules of
# sums and products, as many again for GPT-2's own layers, and the gradients are PyTorch's: first for one product, then for a bigram model, then for a block of GPT-2
# with its tied head.

# %%
from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

# %% [markdown]
# ## One rule for each operation
#
# A result remembers which arrays it was made of, and for each of them how to turn "how the loss changes with me" into "how the loss changes with it". That
# is the chain rule, one operation at a time. Whatever was broadcast to a larger shape in the forward direction is summed back to its own shape.


# %%
class Var:
    """An array of which a gradient can be had."""

    def __init__(self, data: np.ndarray, made_of: tuple = ()) -> None:
        self.data = np.asarray(data, dtype=np.float64)
        self.made_of = made_of  # pairs: an input, and its rule: gradient of this -> gradient of it
        self.grad = np.zeros_like(self.data)

    def __add__(self, other: Var) -> Var:
        rules = ((self, lambda g: g), (other, lambda g: g))
        return Var(self.data + other.data, rules)

    def __mul__(self, other: Var) -> Var:
        rules = ((self, lambda g: g * other.data), (other, lambda g: g * self.data))
        return Var(self.data * other.data, rules)

    def __matmul__(self, other: Var) -> Var:
        rules = ((self, lambda g: g @ other.data.T), (other, lambda g: self.data.T @ g))
        return Var(self.data @ other.data, rules)

    @property
    def T(self) -> Var:
        return Var(self.data.T, ((self, lambda g: g.T),))

    def take(self, rows: np.ndarray) -> Var:
        """Rows of a table; a row that is taken twice gets both gradients."""

        def rule(g: np.ndarray) -> np.ndarray:
            grad = np.zeros_like(self.data)
            np.add.at(grad, rows, g)
            return grad

        return Var(self.data[rows], ((self, rule),))

    def backward(self) -> None:
        """Set `grad` of everything that this number was made of."""
        order: list[Var] = []
        seen: set[int] = set()

        def visit(var: Var) -> None:
            if id(var) not in seen:
                seen.add(id(var))
                for part, _ in var.made_of:
                    visit(part)
                order.append(var)  # behind everything it was made of

        visit(self)
        self.grad = np.ones_like(self.data)
        for var in reversed(order):
            for part, rule in var.made_of:
                part.grad = part.grad + summed_to(rule(var.grad), part.data.shape)


def summed_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of `shape` was broadcast."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    for axis, size in enumerate(shape):
        if size == 1:
            gradient = gradient.sum(axis, keepdims=True)
    return gradient


# %% [markdown]
# The `+` in the last line of `backward` matters: an array that is used twice, as GPT-2's embedding table is, gets the sum of both gradients. Against PyTorch:

# %%
random = np.random.default_rng(1)
arrays = [random.normal(size=shape) for shape in ((3, 4), (4, 5), (5,))]
a, b, c = (Var(array) for array in arrays)
y = a @ b + c
total = Var(np.ones((1, 3))) @ (y * y) @ Var(np.ones((5, 1)))
total.backward()

theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
((theirs[0] @ theirs[1] + theirs[2]) ** 2).sum().backward()
for mine, other in zip((a, b, c), theirs, strict=True):
    np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-10)
print("gradients of three arrays, equal to PyTorch's to 10 digits")

# %% [markdown]
# ## A bigram model
#
# The smallest language model is a table: row $i$ has the logits of what follows token $i$. Its loss needs one more rule. With $p$ the softmax of the logits,
# the gradient of the cross-entropy is $p - 1$ at the right token and $p$ elsewhere, divided by the number of tokens.


# %%
def cross_entropy(logits: Var, targets: np.ndarray) -> Var:
    """The mean of -log softmax(logits)[target] over rows."""
    shifted = logits.data - logits.data.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    n = len(targets)
    rows = np.arange(n)

    def rule(g: np.ndarray) -> np.ndarray:
        grad = p.copy()
        grad[rows, targets] -= 1
        return g * grad / n

    return Var(-np.log(p[rows, targets]).mean(), ((logits, rule),))


text = Path(heapq.__file__).read_bytes()[:12_000].decode("ascii", "ignore")
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text])
V = len(letters)
inputs, targets = ids[:-1], ids[1:]

table = Var(np.zeros((V, V)))
losses = []
for _ in range(200):
    table.grad[:] = 0
    loss = cross_entropy(table.take(inputs), targets)
    loss.backward()
    table.data -= 30.0 * table.grad
    losses.append(loss.data.item())
counts = np.zeros((V, V))
np.add.at(counts, (inputs, targets), 1)
shares = counts[inputs, targets] / counts[inputs].sum(-1)
best = -np.log(shares).mean()
print(f"{V} letters: loss {losses[0]:.3f} -> {losses[-1]:.3f}; counting pairs gives {best:.3f}")
assert math.isclose(losses[0], math.log(V), rel_tol=1e-9)
assert losses[-1] < best + 0.2

# %% [markdown]
# The untrained table is at $\ln V$, and the best that any bigram model can reach on this text is what counting gives. Gradient descent finds it without being told
# how to count.
#
# ## A block of GPT-2
#
# Three more rules: layer norm, GELU and the softmax of causal attention. Each takes a few lines, and each can be checked by itself.


# %%
def norm(x: Var) -> Var:
    """Each row to mean 0 and variance 1."""
    deviation = x.data - x.data.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-5)
    y = deviation * scale

    def rule(g: np.ndarray) -> np.ndarray:
        # What would change the mean or the variance of the row cannot change the result.
        g_mean = g.mean(-1, keepdims=True)
        gy_mean = (g * y).mean(-1, keepdims=True)
        return scale * (g - g_mean - y * gy_mean)

    return Var(y, ((x, rule),))


def gelu(x: Var) -> Var:
    """GPT-2's GELU, with tanh."""
    k = math.sqrt(2 / math.pi)
    t = np.tanh(k * (x.data + 0.044715 * x.data**3))
    slope = 0.5 * (1 + t) + 0.5 * x.data * (1 - t * t) * k * (1 + 3 * 0.044715 * x.data**2)
    return Var(0.5 * x.data * (1 + t), ((x, lambda g: g * slope),))


def causal_softmax(scores: Var) -> Var:
    """Each row to weights with sum 1; what is above the diagonal gets none."""
    visible = np.where(np.tri(len(scores.data), dtype=bool), scores.data, -np.inf)
    w = np.exp(visible - visible.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    rule = lambda g: w * (g - (g * w).sum(-1, keepdims=True))  # noqa: E731
    return Var(w, ((scores, rule),))


T, C = 32, 24
shapes = {"wte": (V, C), "wpe": (T, C), "q": (C, C), "k": (C, C), "v": (C, C), "o": (C, C)}
shapes |= {"up": (C, 4 * C), "bias": (4 * C,), "down": (4 * C, C)}
weights = {name: Var(random.normal(size=shape) * 0.2) for name, shape in shapes.items()}


def loss_of(w: dict[str, Var], ids: np.ndarray, targets: np.ndarray) -> Var:
    """The loss of a GPT-2 with one block and one head."""
    x = w["wte"].take(ids) + w["wpe"]
    n = norm(x)
    scores = (n @ w["q"]) @ (n @ w["k"]).T * Var(np.array(1 / math.sqrt(C)))
    x = x + causal_softmax(scores) @ (n @ w["v"]) @ w["o"]
    x = x + gelu(norm(x) @ w["up"] + w["bias"]) @ w["down"]
    return cross_entropy(norm(x) @ w["wte"].T, targets)  # the head is the embedding table


# %% [markdown]
# The same model in PyTorch, and its gradients beside ours:


# %%
def loss_in_torch(w: dict[str, torch.Tensor], ids: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    x = w["wte"][ids] + w["wpe"]
    n = F.layer_norm(x, (C,))
    q, k, v = (n @ w[name] for name in "qkv")
    x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True) @ w["o"]
    hidden = F.gelu(F.layer_norm(x, (C,)) @ w["up"] + w["bias"], approximate="tanh")
    x = x + hidden @ w["down"]
    return F.cross_entropy(F.layer_norm(x, (C,)) @ w["wte"].T, torch.from_numpy(targets))


mine = loss_of(weights, ids[:T], ids[1 : T + 1])
mine.backward()
in_torch = {name: torch.tensor(var.data, requires_grad=True) for name, var in weights.items()}
other = loss_in_torch(in_torch, ids[:T], ids[1 : T + 1])
other.backward()
print(f"loss {mine.data.item():.9f} here, {other.item():.9f} in PyTorch")
worst = 0.0
for name, var in weights.items():
    difference = np.abs(var.grad - in_torch[name].grad.numpy()).max()
    worst = max(worst, difference / np.abs(var.grad).max())
print(f"largest relative difference of any gradient: {worst:.1e}")
assert worst < 1e-6

# %% [markdown]
# ## Training it
#
# Plain gradient descent with momentum, 1,000 steps of 32 letters. No PyTorch from here on.

# %%
speed = {name: np.zeros_like(var.data) for name, var in weights.items()}
curve = []
for _ in range(1000):
    begin = random.integers(len(ids) - T)
    for var in weights.values():
        var.grad = np.zeros_like(var.data)
    loss = loss_of(weights, ids[begin : begin + T], ids[begin + 1 : begin + T + 1])
    loss.backward()
    for name, var in weights.items():
        speed[name] = 0.9 * speed[name] + var.grad
        var.data -= 0.02 * speed[name]
    curve.append(loss.data.item())

mean = np.convolve(curve, np.ones(25) / 25, "valid")
plt.figure(figsize=(6, 2.9))
plt.plot(curve, color="#c9d3e3", linewidth=0.8, label="one step")
plt.plot(range(12, 12 + len(mean)), mean, color="#1f5fbf", label="mean of 25")
plt.axhline(math.log(V), color="#9aa3b2", linestyle=":", label="all letters equally likely")
plt.xlabel("step")
plt.ylabel("loss, nats a letter")
plt.title("A block of GPT-2, trained with NumPy alone")
plt.legend()
plt.tight_layout()
plt.show()
print(f"loss {mean[0]:.2f} -> {mean[-1]:.2f}")
assert mean[-1] < mean[0] - 0.8

# %% [markdown]
# ## What the gradient of a token depends on
#
# The gradient that reaches the input shows which letters the prediction at the end depends on. It is zero for what comes later than the token whose loss is
# taken: causal attention takes nothing from later tokens, so no gradient goes to them.

# %%
w = weights
x = Var(w["wte"].data[ids[:T]] + w["wpe"].data)
n = norm(x)
scores = (n @ w["q"]) @ (n @ w["k"]).T * Var(np.array(1 / math.sqrt(C)))
h = x + causal_softmax(scores) @ (n @ w["v"]) @ w["o"]
h = h + gelu(norm(h) @ w["up"] + w["bias"]) @ w["down"]
place = 20
loss = cross_entropy((norm(h) @ w["wte"].T).take(np.array([place])), ids[place + 1 : place + 2])
loss.backward()
size = np.linalg.norm(x.grad, axis=-1)
plt.figure(figsize=(6, 2.2))
plt.bar(range(T), size, color=["#1f5fbf" if i <= place else "#c13515" for i in range(T)])
plt.xticks(range(T), [repr(letter)[1:-1] for letter in text[:T]], fontsize=8)
plt.ylabel("gradient's norm")
plt.title(f"Which letters the prediction after letter {place} depends on")
plt.tight_layout()
plt.show()
assert size[place + 1 :].max() == 0
assert size[: place + 1].min() > 0

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Write the gradient of the cross-entropy of *one* row of logits with respect to the logits.


# %%
def gradient_of_logits(logits: np.ndarray, target: int) -> np.ndarray | None:
    return None  # your answer


# %%
def check_1(gradient_of_logits: Callable[..., np.ndarray | None]) -> str:
    logits = np.array([1.0, -2.0, 0.5, 3.0])
    found = gradient_of_logits(logits.copy(), 2)
    if found is None:
        return "not answered yet"
    p = np.exp(logits) / np.exp(logits).sum()
    if np.allclose(found, p):
        return "wrong: the right token's share needs 1 less; its logit should rise"
    if np.allclose(found, np.eye(4)[2] - p):
        return "wrong: the sign is turned; this would make the loss larger"
    if not np.allclose(found, p - np.eye(4)[2]):
        return f"wrong: {np.round(found, 3)} instead of {np.round(p - np.eye(4)[2], 3)}"
    large = gradient_of_logits(np.array([1000.0, 0.0, 0.0, 0.0]), 1)
    if np.isnan(large).any() or not np.allclose(large, [1, -1, 0, 0]):
        return "wrong: exp(1000) is too large for a float; subtract the largest logit first"
    return "right: it sums to 0, since only differences of logits matter"


print(check_1(gradient_of_logits))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def gradient_of_logits(logits: np.ndarray, target: int) -> np.ndarray:
#     p = np.exp(logits - logits.max())
#     p /= p.sum()
#     p[target] -= 1
#     return p
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** In y = x W + b, x is (T, in) and `g` (T, out) is the gradient of y. Return the gradients of x, W and b.


# %%
def gradients(
    x: np.ndarray, W: np.ndarray, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    return None  # your answer


# %%
def check_2(gradients: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray] | None]) -> str:
    source = np.random.default_rng(2)
    x, W, g = (source.normal(size=shape) for shape in ((5, 3), (3, 4), (5, 4)))
    found = gradients(x, W, g)
    if found is None:
        return "not answered yet"
    if len(found) != 3:
        return "wrong: there are three gradients, those of x, W and b"
    expected = {"x": g @ W.T, "W": x.T @ g, "b": g.sum(0)}
    for part, (name, right) in zip(found, expected.items(), strict=True):
        if np.shape(part) != right.shape:
            return (
                f"wrong: the gradient of {name} has the shape {np.shape(part)}, not {right.shape}"
            )
        if not np.allclose(part, right):
            if name == "b" and np.allclose(part, g.mean(0)):
                return "wrong: b was added to each row, so its gradients are summed, not averaged"
            return f"wrong: the gradient of {name}"
    return "right: two matrix products backward for one forward, hence 6 operations a parameter"


print(check_2(gradients))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def gradients(
#     x: np.ndarray, W: np.ndarray, g: np.ndarray
# ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
#     return g @ W.T, x.T @ g, g.sum(0)
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Write the rule of dropout. Which array has to be remembered from the forward direction?
# 2. Replace momentum by AdamW, as lesson 5 has it. How much lower is the loss after 1,000 steps?
# 3. Every `Var` keeps its data until the end. Which of them could be computed again in the backward direction instead (`--recompute`)?
