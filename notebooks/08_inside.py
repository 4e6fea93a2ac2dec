# %% [markdown]
# # 8. Inside: sampling, attention maps, the logit lens
#
# A small GPT-2 is trained for some seconds on a pattern whose rule we know. Then we look at how it chooses, what its heads look at, and what it
# would say after each layer.

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

from anew import GPT, GPTConfig, generate
from anew.config.schema import OptimConfig
from anew.inference.generate import sample
from anew.inference.interpret import Part, trace_of, without
from anew.optim.build import build_optimizers, set_learning_rates
from anew.optim.schedule import learning_rate_factor

torch.manual_seed(0)

# %% [markdown]
# ## A pattern that needs looking back
#
# A few random letters, again and again: "qwertqwertqwer". How many is not known, so what comes next can be found only by looking where the present letter stood
# before, and what followed it. Models solve this with induction heads (Olsson et al. 2022): one head marks what came before each token, another looks
# for the place where the present token was marked.

# %%
T = 32


def batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, T + 1) letters that repeat with periods of 5 to 12, and the periods."""
    periods = torch.randint(5, 13, (count,), generator=generator)
    letters = (
        torch.rand(count, 26, generator=generator).argsort(1) + 97
    )  # no letter twice in a period
    places = torch.arange(T + 1) % periods[:, None]
    return letters.gather(1, places), periods


config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=T, vocab_size=257, attention="plain")
model = GPT(config, seed=1)
settings = OptimConfig(
    optimizer="muon", muon_lr=0.02, lr=6e-3, min_lr=1e-5, schedule="linear", warmup_steps=50
)  # AdamW alone has not begun to learn it by step 800
optimizers = build_optimizers(model, settings)
generator = torch.Generator().manual_seed(1)
curve, steps = [], 400
for step in range(steps):
    set_learning_rates(optimizers, learning_rate_factor(step, steps, settings))
    ids, periods = batch(32, generator)
    targets = ids[:, 1:].clone()
    targets[torch.arange(T) < periods[:, None] - 1] = -100  # the first time round cannot be known
    loss = model(ids[:, :-1], targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    curve.append(loss.item())
print(f"loss {curve[0]:.2f} -> {curve[-1]:.3f}")
plt.figure(figsize=(5.5, 2.6))
plt.plot(curve)
plt.xlabel("step")
plt.ylabel("loss")
plt.title("First which letters there are, then which one follows")
plt.tight_layout()
plt.show()
assert curve[-1] < 0.5

P = 9
test = [ord("qxmzbktwf"[i % P]) for i in range(T + 1)]
[answer] = generate(model.eval(), [test[: P + 3]], T - P - 3, temperature=0.0)
print("asked ", bytes(test[: P + 3]).decode())
print("writes", " " * (P + 3) + bytes(answer).decode())
assert sum(a == b for a, b in zip(answer, test[P + 3 :], strict=False)) >= len(answer) - 2

# %% [markdown]
# ## What the heads look at

# %%
ids = torch.tensor([test[:-1]])
maps = []
with torch.no_grad():
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.size(1)]
    streams = [x]
    for block in model.transformer.h:
        B, T, C = x.shape
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(B, T, 3, 2, 32).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 32**0.5).masked_fill(
            ~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf
        )
        maps.append(scores.softmax(-1)[0])
        x = block(x)
        streams.append(x)
    logits = model(ids)

# `trace_of` does the same for any model, and is tested against transformers
trace = trace_of(model, test[:-1])
torch.testing.assert_close(torch.stack(maps), trace.attention)
torch.testing.assert_close(torch.cat(streams), trace.residual)

figure, axes = plt.subplots(1, 4, figsize=(14, 3.6))
letters = list(bytes(test[:-1]).decode())
for n, axis in enumerate(axes):
    axis.imshow(maps[n // 2][n % 2])
    axis.set(
        title=f"block {n // 2}, head {n % 2}",  # counted from 0
        xticks=range(len(letters)),
        yticks=range(len(letters)),
    )
    axis.set_xticklabels(letters, fontsize=7)
    axis.set_yticklabels(letters, fontsize=7)
plt.tight_layout()
plt.show()
# the induction diagonal: a head of block 1 looks at what followed the same letter last time, P - 1 back
rows = range(2 * P, T)
strength = max(
    sum(maps[1][h][r, [c for c in range(r) if c % P == (r + 1) % P]].sum().item() for r in rows)
    / len(rows)
    for h in range(2)
)
chance = sum(len([c for c in range(r) if c % P == (r + 1) % P]) / (r + 1) for r in rows) / len(rows)
print(
    f"weight on the letters that came next before: {strength:.2f} (a look at random: {chance:.2f})"
)
assert strength > 3 * chance

# %% [markdown]
# ## The logit lens
#
# The residual stream can be read at any depth with the model's own last norm and head (nostalgebraist 2020): what would it say if it stopped here?

# %%
with torch.no_grad():
    probabilities = [
        model.head(model.transformer.ln_f(stream))[0].softmax(-1) for stream in streams
    ]
    torch.testing.assert_close(
        probabilities[-1], logits[0].softmax(-1)
    )  # at the last layer the lens is the model
truth = torch.tensor(test[1:])
for depth, p in enumerate(probabilities):
    share = p[torch.arange(len(truth)), truth][P:].mean().item()
    print(
        f"after {depth} blocks: probability of the right letter from the second round on {share:.2f}"
    )
assert probabilities[-1][torch.arange(len(truth)), truth][P:].mean() > 0.5

# %% [markdown]
# ## Which parts are needed?
#
# A map shows where a head looks, not whether it matters. To learn that, switch it off: `without` gives the model in which a head, an attention or an MLP adds
# nothing to the residual stream (Michel et al. 2019). `anew serve` does this on its page.


# %%
@torch.no_grad()
def share_of_right(model: GPT) -> float:
    """The mean probability of the right letter from the second round on."""
    p = model(torch.tensor([test[:-1]]))[0].softmax(-1)
    return p[torch.arange(len(truth)), truth][P:].mean().item()


parts = {"nothing": []}
for block in range(2):
    for head in range(2):
        parts[f"head {block}.{head}"] = [Part(block, "head", head)]
    parts[f"MLP {block}"] = [Part(block, "mlp")]
needed = {name: share_of_right(without(model, removed)) for name, removed in parts.items()}
plt.figure(figsize=(6, 2.6))
plt.bar(list(needed), list(needed.values()), color=["#1f5fbf"] + ["#9aa3b2"] * (len(needed) - 1))
plt.ylabel("probability of\nthe right letter")
plt.title("What is left of it if a part is switched off")
plt.xticks(rotation=20)
plt.tight_layout()
plt.show()
for name, share in needed.items():
    print(f"without {name:<9} {share:.2f}")
assert min(needed.values()) < 0.5 * needed["nothing"]

# %% [markdown]
# ## Sampling: temperature, top-k, top-p
#
# The model gives probabilities; how to choose is up to us. Temperature divides the logits, top-k keeps the k likeliest, top-p the likeliest that together
# hold the share p.

# %%
x = torch.tensor([[3.0, 2.0, 1.5, 0.5, 0.0, -1.0]])
figure, axes = plt.subplots(1, 4, figsize=(13, 2.6), sharey=True)
for axis, (title, rules) in zip(axes, [("as it is", (1.0, 0, 1.0)), ("temperature 0.5", (0.5, 0, 1.0)), ("top-k 3", (1.0, 3, 1.0)),
                                       ("top-p 0.8", (1.0, 0, 0.8))], strict=True):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    drawn = sample(x.repeat(4000, 1), *rules, generator)
    axis.bar(range(6), [(drawn == i).float().mean().item() for i in range(6)])
    axis.set(title=title, xlabel="token")
    if title == "as it is":
        for i, p in enumerate(x[0].softmax(0).tolist()):
            assert abs((drawn == i).float().mean().item() - p) < 0.03
    elif "top" in title:
        assert int(drawn.max()) <= 2
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Top-p keeps the likeliest tokens until their probabilities sum to at least `p`. Which ids are kept?


# %%
def kept(probabilities: torch.Tensor, p: float) -> set[int] | None:
    return None  # your answer


# %%
def check_1(kept: Callable[..., set[int] | None]) -> str:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    found = kept(probabilities, 0.7)
    if found is None:
        return "not answered yet"
    if set(found) == {1}:
        return "wrong: the token that crosses p belongs to those that are kept"
    if set(found) == {0, 1}:
        return "wrong: sort by probability first"
    if set(found) != {1, 3} or set(kept(probabilities, 0.01)) != {1}:
        return f"wrong: {found} are kept at p = 0.7, instead of 1 and 3"
    if set(kept(probabilities, 1.0)) != {0, 1, 2, 3}:
        return "wrong: with p = 1 all are kept"
    if set(kept(torch.tensor([0.5, 0.25, 0.25]), 0.5)) != {0}:
        return "wrong: at a sum of exactly p nothing more is needed"
    return "right: at least one token is always kept"


print(check_1(kept))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def kept(probabilities: torch.Tensor, p: float) -> set[int]:
#     shares, order = probabilities.sort(descending=True)
#     before = shares.cumsum(0) - shares
#     return set(order[before < p].tolist())
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** In a text of period P, an induction head looks from a token to the one *behind* its last occurrence. `weights` (T, T) are a head's. What is its induction
# score: the mean weight that goes there, from the second period on?


# %%
def induction_score(weights: torch.Tensor, P: int) -> float | None:
    return None  # your answer


# %%
def check_2(induction_score: Callable[..., float | None]) -> str:
    T, P = 12, 4
    perfect, same = torch.zeros(2, T, T)
    for t in range(P, T):
        perfect[t, t - P + 1] = same[t, t - P] = 1
    perfect[:P, 0] = same[:P, 0] = 1
    found = induction_score(perfect, P)
    if found is None:
        return "not answered yet"
    if induction_score(same, P) > 0.5:
        return "wrong: this is the token itself, one period ago; what followed it is one further"
    if 0 < found < 0.99:
        return "wrong: the first period has no earlier occurrence; leave it out of the mean"
    half = perfect.clone()
    half[2 * P :] /= 2
    if abs(found - 1) > 1e-6 or abs(induction_score(half, P) - 0.75) > 1e-6:
        return f"wrong: {found:.2f} for a head that only looks there, or no mean over the tokens"
    return "right: 1 for a perfect induction head"


print(check_2(induction_score))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def induction_score(weights: torch.Tensor, P: int) -> float:
#     t = torch.arange(P, len(weights))
#     return weights[t, t - P + 1].mean().item()
# ```
#
# Compute it for the four heads of the model above: `weights` are those of the attention maps.
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Train with one block instead of two. Does it learn the pattern? Why must there be two?
# 2. Ask it with a period of 14, which it has never seen. What does it write?
# 3. `anew serve MODEL` shows the same inside a model of yours: press "Look inside", choose a head, and switch it off.
