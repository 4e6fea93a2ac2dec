# %% [markdown]
# # 8. Inside: sampling, attention maps, the logit lens
#
# A small GPT-2 is trained for some seconds on a pattern whose rule we know. Then we look at how it chooses, what its heads look at, and what it
# would say after each layer.

# %%
import matplotlib.pyplot as plt
import torch

from anew import GPT, GPTConfig, generate
from anew.config.schema import OptimConfig
from anew.inference.generate import sample
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

# the attention recomputed here is the model's own: with it, the first block gives the same output
block = model.transformer.h[0]
with torch.no_grad():
    v = (
        block.attn.c_attn(block.ln_1(streams[0]))
        .view(1, ids.size(1), 3, 2, 32)
        .permute(2, 0, 3, 1, 4)[2]
    )
    mixed = streams[0] + block.attn.c_proj(
        (maps[0][None] @ v).transpose(1, 2).reshape(1, ids.size(1), 64)
    )
    torch.testing.assert_close(
        mixed + block.mlp(block.ln_2(mixed)), streams[1], rtol=1e-4, atol=1e-5
    )

figure, axes = plt.subplots(1, 4, figsize=(14, 3.6))
letters = list(bytes(test[:-1]).decode())
for n, axis in enumerate(axes):
    axis.imshow(maps[n // 2][n % 2])
    axis.set(
        title=f"block {n // 2 + 1}, head {n % 2 + 1}",
        xticks=range(len(letters)),
        yticks=range(len(letters)),
    )
    axis.set_xticklabels(letters, fontsize=7)
    axis.set_yticklabels(letters, fontsize=7)
plt.tight_layout()
plt.show()
# the induction diagonal: a head of block 2 looks at what followed the same letter last time, P - 1 back
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
# 1. Train with one block instead of two. Does it learn the pattern? Why must there be two?
# 2. Ask it with a period of 14, which it has never seen. What does it write?
# 3. `anew serve MODEL` shows the same choices token by token for a model of yours. Find a place where the second choice would have been better.
