# %% [markdown]
# # 3. The loss, and what 10.8 means
#
# A GPT-2 that has learnt nothing starts at a loss of about 10.8 to 11, and one of OpenAI's ends near 3.1 to 3.3. What are these numbers?

# %%
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import anew
from anew import GPT, GPTConfig
from anew.bench import timing as bench
from anew.model.loss import HeadLoss

# %% [markdown]
# ## Surprise
#
# The model gives each of 50,257 tokens a probability. The loss is $-\ln p$ of the token that came, the mean over all tokens: its surprise, in nats.
# Whoever spreads the probability evenly is surprised by $\ln 50257$ every time. An untrained GPT-2 comes near that. Since the table that reads tokens
# also names them, it expects most of all the token that it has just read; source code, which repeats itself, is a little easier for it than chance.

# %%
print(f"ln 50257 = {math.log(50257):.3f} nats = {math.log2(50257):.2f} bits")
tokenizer = anew.Tokenizer.named("gpt2")
ids = torch.tensor(
    [tokenizer.encode(bench.standard_library_files()[3].read_text(encoding="utf-8"))[:257]]
)
model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256), seed=1)
with torch.no_grad():
    logits = model(ids[:, :-1])  # (1, 256, 50257)
    start = model(ids[:, :-1], ids[:, 1:]).item()
    same = model(ids[:, :-1], ids[:, :-1]).item()
print(f"a GPT-2 before training: {start:.3f}; if each token were followed by itself: {same:.3f}")
assert abs(start - math.log(50257)) < 0.6
assert same < start

# %% [markdown]
# ## By hand
#
# $-\ln \mathrm{softmax}(x)_t = \ln\sum_i e^{x_i} - x_t$. And its gradient is as simple as it gets: the probabilities, less 1 at the target.

# %%
x = logits[0].double().requires_grad_()
t = ids[0, 1:]
by_hand = (x.logsumexp(-1) - x.gather(1, t[:, None]).squeeze(1)).mean()
torch.testing.assert_close(by_hand, F.cross_entropy(x, t))
by_hand.backward()
expected = (x.detach().softmax(-1) - F.one_hot(t, 50257)) / len(t)
torch.testing.assert_close(x.grad, expected)

# %% [markdown]
# ## Perplexity, bits, bytes
#
# $e^{\text{loss}}$ is the perplexity: as unsure as between so many equally likely tokens. A token of GPT-2 holds about 4 bytes of English, so losses
# of different tokenizers compare only when they are counted by byte.

# %%
text = tokenizer.decode(ids[0, 1:].tolist())
for name, loss in (
    ("untrained", start),
    ("GPT-2 124M on web text", 3.29),
    ("trained on one batch only", 0.01),
):
    per_byte = loss / math.log(2) * len(t) / len(text.encode())
    print(
        f"{name:<28} loss {loss:6.3f}   perplexity {math.exp(loss):>9,.1f}   {per_byte:5.2f} bits a byte of this text"
    )

p = torch.linspace(0.001, 1, 400)
plt.figure(figsize=(5.5, 3))
plt.plot(p, -p.log())
for q, label in ((1 / 50257, ""), (0.037, "GPT-2's geometric mean: 0.037"), (0.5, "a coin: 0.69")):
    if label:
        plt.plot(q, -math.log(q), "o")
        plt.annotate(label, (q, -math.log(q)), (q + 0.04, -math.log(q) + 0.3))
plt.xlabel("probability given to the token that came")
plt.ylabel("surprise, nats")
plt.title("Confident and wrong is what costs")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## In chunks
#
# The logits are the biggest tensor of a training step: 16 x 1024 tokens x 50,257 x 4 bytes = 3.3 GB, and their gradient as much again. `HeadLoss` projects
# a chunk of rows, takes loss and gradient at once and forgets the chunk. Same loss, same gradients:

# %%
hidden = torch.randn(3000, 64, dtype=torch.float64) * 0.5
wte = torch.randn(384, 64, dtype=torch.float64) * 0.1
targets = torch.randint(257, (3000,))
targets[::7] = -100  # not scored
results = []
for chunked in (False, True):
    h, w = hidden.clone().requires_grad_(), wte.clone().requires_grad_()
    loss = (
        HeadLoss.apply(h, w, targets, 257, True)
        if chunked
        else F.cross_entropy((h @ w.T)[:, :257], targets, ignore_index=-100)
    )
    loss.backward()
    results.append((loss.double().detach(), h.grad, w.grad))
for plain, chunk in zip(*results, strict=True):
    torch.testing.assert_close(plain, chunk, rtol=1e-5, atol=1e-9)

# %% [markdown]
# ## Why the vocabulary is padded
#
# 50257 is odd; 50304 is 393 x 128, which matrix units like. The 47 rows are storage only: their logits are cut off before the softmax, so they take
# no probability and get no gradient.

# %%
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32), seed=1)
assert model.transformer.wte.weight.shape == (50304, 32)
assert model(ids[:, :8]).shape == (1, 8, 50257)
model(ids[:, :8], ids[:, 1:9]).backward()
assert model.transformer.wte.weight.grad[50257:].abs().max() == 0

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** One model gives the right token a probability of 0.9 half of the time and 0.001 otherwise. Another always gives it 0.2. What are their losses, in nats?

# %%
losses = None  # your answer: two numbers


# %%
def check_1(losses: tuple[float, float] | None) -> str:
    if losses is None:
        return "not answered yet"
    first, second = losses
    if abs(first + math.log(0.4505)) < 0.01:
        return "wrong: this is the logarithm of the mean; the loss is the mean of the logarithms"
    if abs(first - 5.059) < 0.01:
        return "wrong: these are bits"
    if abs(first - 3.507) > 0.01 or abs(second - 1.609) > 0.01:
        return "wrong: take -log of each probability, then the mean"
    return (
        "right: the first has the higher mean probability and twice the loss; confident errors cost"
    )


print(check_1(losses))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# losses = (-(math.log(0.9) + math.log(0.001)) / 2, -math.log(0.2))
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** A model that knows only how often each token occurs gives each token its share in the text. What is its loss on that text, in nats a token?


# %%
def unigram_loss(ids: list[int]) -> float | None:
    return None  # your answer


# %%
def check_2(unigram_loss: Callable[[list[int]], float | None]) -> str:
    found = unigram_loss([1, 1, 1, 2])
    if found is None:
        return "not answered yet"
    right = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    if abs(found - right / math.log(2)) < 1e-6:
        return "wrong: these are bits"
    if abs(found + (math.log(0.75) + math.log(0.25)) / 2) < 1e-6:
        return "wrong: a token that occurs three times counts three times"
    if abs(found - right) > 1e-6 or abs(unigram_loss([7] * 9)) > 1e-6:
        return f"wrong: for [1, 1, 1, 2] it is {right:.4f}, not {found:.4f}"
    return "right: the entropy of the counts, about 7.6 nats for GPT-2's tokens of web text"


print(check_2(unigram_loss))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def unigram_loss(ids: list[int]) -> float:
#     counts = torch.tensor(ids).unique(return_counts=True)[1].double()
#     shares = counts / counts.sum()
#     return -(shares * shares.log()).sum().item()
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Label smoothing, dropout, weight decay: which of them can make the training loss higher than the validation loss?
# 2. Compute the unigram loss on a text of yours with `anew.Tokenizer`. How far is an untrained model above it, and a trained one below?
