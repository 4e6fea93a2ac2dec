# %% [markdown]
# # 13. Why Muon orthogonalises
#
# The fast recipe of this project trains the matrices of the blocks with Muon (Jordan et al. 2024) instead of AdamW, and needs fewer tokens for the same loss. Its step is the
# momentum of the gradient (Nesterov's; plain momentum below), made orthogonal: all its singular values become about 1. This lesson looks at the singular values before and after, computes the
# step by hand, and compares the losses.

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

import anew
from anew import GPT, GPTConfig
from anew.bench.timing import standard_library_files
from anew.config.schema import OptimConfig
from anew.optim.build import build_optimizers, set_learning_rates
from anew.optim.muon import NEWTON_SCHULZ, orthogonalise
from anew.optim.schedule import learning_rate_factor
from anew.utils.device import set_up_device

set_up_device(anew.recipe("demo").run)
T, B = 64, 16
config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=T, vocab_size=257)
text = torch.tensor(list(b"".join(path.read_bytes() for path in standard_library_files()[:40])))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(text) - T - 1, (B,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([text[start : start + T + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


# %% [markdown]
# ## The gradient is nearly of low rank
#
# A gradient is a sum over tokens, and what most tokens agree on dominates it. Of its 64 singular values a few are large; the directions that belong to the
# others hardly move, however long the training goes on. Here is the momentum of one matrix after 60 steps of AdamW:

# %%
model = GPT(config, seed=1)
settings = OptimConfig(lr=6e-3, min_lr=6e-4, warmup_steps=10)
[optimizer] = build_optimizers(model, settings)
matrix = model.transformer.h[1].mlp.c_fc.weight  # (64, 256)
momentum = torch.zeros_like(matrix)
for step in range(60):
    model(*batch(step)).backward()
    momentum.lerp_(matrix.grad, 0.05)
    optimizer.step()
    optimizer.zero_grad()
moments = optimizer.state[matrix]
of_adam = moments["exp_avg"] / (moments["exp_avg_sq"].sqrt() + 1e-8)
of_muon = orthogonalise(momentum[None], dtype=torch.float32)[0]

plt.figure(figsize=(6, 3))
for label, update in (("momentum", momentum), ("AdamW's step", of_adam), ("Muon's step", of_muon)):
    values = torch.linalg.svdvals(update)
    plt.semilogy(values / values[0], label=label)
    energy = (values**2 / (values**2).sum())[:8].sum().item()
    print(f"{label:>12}: {energy:5.0%} of the square in the 8 largest of 64 singular values")
plt.ylim(1e-3, 2)
plt.xlabel("singular value, from the largest")
plt.ylabel("share of the largest")
plt.title("Muon moves all directions about equally far")
plt.legend()
plt.tight_layout()
plt.show()
assert energy < 0.35  # of Muon's step, the last of the three

# %% [markdown]
# ## Orthogonal without a singular value decomposition
#
# With $G = U S V^T$, the step wanted is $U V^T$. A decomposition is slow on a GPU. A polynomial of the matrix is not: an odd polynomial $a X + b X X^T X + c (X X^T)^2 X$ changes the
# singular values only, each by $a s + b s^3 + c s^5$. Applied five times, Jordan's coefficients drive every value between 0.01 and 1 to somewhere between 0.7 and 1.2,
# which is near enough. Smaller ones rise too, but not all the way.

# %%
a, b, c = NEWTON_SCHULZ
s = torch.linspace(0, 1, 500)
plt.figure(figsize=(6, 3))
for steps in range(6):
    plt.plot(torch.linspace(0, 1, 500), s, label=f"{steps} steps", alpha=0.3 + 0.14 * steps)
    s = a * s + b * s**3 + c * s**5
plt.axhline(1, color="#9aa3b2", linestyle=":")
plt.xlabel("singular value before")
plt.ylabel("after")
plt.title("Five iterations of Newton and Schulz")
plt.legend(fontsize=8)
plt.tight_layout()
plt.show()

x = momentum / momentum.norm()  # the largest singular value is at most 1 from here on
for _ in range(5):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
torch.testing.assert_close(x, of_muon, rtol=1e-3, atol=1e-4)
u, _, vt = torch.linalg.svd(momentum, full_matrices=False)
cosine = torch.nn.functional.cosine_similarity(x.flatten(), (u @ vt).flatten(), dim=0)
print(f"cosine between five iterations and the exact U V^T: {cosine:.3f}")
assert cosine > 0.95

# %% [markdown]
# ## Does it pay?
#
# Both optimizers train the same model on the same 150 batches, each with three learning rates, since a comparison at one rate says nothing. Embeddings, norms and biases
# have AdamW in both.

# %%
STEPS = 150


def final_loss(settings: OptimConfig) -> float:
    model = GPT(config, seed=1)
    optimizers = build_optimizers(model, settings)
    losses = []
    for step in range(STEPS):
        set_learning_rates(optimizers, learning_rate_factor(step, STEPS, settings))
        loss = model(*batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-15:]) / 15


best = {}
for name, rates in (("adamw", (3e-3, 6e-3, 1.2e-2)), ("muon", (1e-2, 2e-2, 4e-2))):
    found = {}
    for rate in rates:
        chosen = {"muon_lr": rate, "lr": 6e-3} if name == "muon" else {"lr": rate}
        found[rate] = final_loss(
            OptimConfig(optimizer=name, min_lr=1e-5, schedule="linear", warmup_steps=10, **chosen)
        )
    best[name] = min(found.values())
    listed = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in found.items())
    print(f"{name:>5}: {listed}")
assert best["muon"] < best["adamw"]

# %% [markdown]
# The gain shrinks with longer training and with better tuned AdamW. The figures that this project measured, with seeds, are in docs/log.md.

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Make a matrix orthogonal with the singular value decomposition: what is the step that Muon approximates?


# %%
def nearest_orthogonal(g: torch.Tensor) -> torch.Tensor | None:
    return None  # your answer


# %%
def check_1(nearest_orthogonal: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = nearest_orthogonal(g)
    if found is None:
        return "not answered yet"
    if found.shape != g.shape:
        return f"wrong: the shape is {tuple(found.shape)}, not (4, 6)"
    if torch.allclose(found, g, atol=1e-5):
        return "wrong: with the singular values in it, this is the matrix itself"
    values = torch.linalg.svdvals(found)
    if not torch.allclose(values, torch.ones(4), atol=1e-4):
        listed = ", ".join(f"{value:.2f}" for value in values.tolist())
        return f"wrong: the singular values are {listed}, and all should be 1"
    if (found * g).sum() < 0.999 * torch.linalg.svdvals(g).sum():
        return "wrong: it is orthogonal, but not the nearest to the matrix"
    return "right: U V^T, the steepest step if no direction may move further than 1"


print(check_1(nearest_orthogonal))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def nearest_orthogonal(g: torch.Tensor) -> torch.Tensor:
#     u, _, vt = torch.linalg.svd(g, full_matrices=False)
#     return u @ vt
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** The iteration needs a largest singular value of at most about 1. To what does it drive a singular value `s` in `steps` steps?


# %%
def driven_to(s: float, steps: int) -> float | None:
    return None  # your answer, with NEWTON_SCHULZ's three coefficients


# %%
def check_2(driven_to: Callable[[float, int], float | None]) -> str:
    found = driven_to(0.5, 1)
    if found is None:
        return "not answered yet"
    a, b, c = 3.4445, -4.7750, 2.0315
    if abs(found - (a * 0.5 + b * 0.5**2 + c * 0.5**3)) < 1e-6:
        return "wrong: the powers are 1, 3 and 5; even ones would change U and V"
    if abs(found - (a * 0.5 + b * 0.5**3 + c * 0.5**5)) > 1e-6:
        return f"wrong: {found:.4f} after one step from 0.5"
    right = 0.02
    for _ in range(5):
        right = a * right + b * right**3 + c * right**5
    if abs(driven_to(0.02, 5) - right) > 1e-6:
        return "wrong: right for one step; apply it again and again"
    return "right: even 0.02 is near 1 after five steps"


print(check_2(driven_to))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def driven_to(s: float, steps: int) -> float:
#     a, b, c = NEWTON_SCHULZ
#     for _ in range(steps):
#         s = a * s + b * s**3 + c * s**5
#     return s
# ```
#
# From a value of 1.5 the iteration explodes within five steps, which is why the matrix is divided by its norm first.
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Give Muon the embedding table too. What happens, and why is it usually left to AdamW?
# 2. `c_attn` holds queries, keys and values side by side. Why does Muon orthogonalise them as three matrices?
# 3. `anew bench recipe` compares the fast recipe with AdamW at equal tokens on your machine.
