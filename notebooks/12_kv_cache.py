# %% [markdown]
# # 12. The key-value cache
#
# A model writes one token at a time. Read naively, the whole text goes through the network again for each token. With a cache of keys and values only the new
# token does. The result is the same; this lesson shows why, what it saves and what it costs.

# %%
import math
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

from anew import GPT, GPTConfig, generate
from anew.model.kv_cache import Cache

torch.manual_seed(0)

# %% [markdown]
# ## Why nothing is lost
#
# Causal attention lets a token see only what comes before it. So what the network computes for token 5 cannot change when token 6 arrives. Of all that was
# computed, later tokens need two things only: the keys and the values of each layer. Here one attention layer reads eight tokens at once, then one by one:

# %%
T, C = 8, 16
x = torch.randn(T, C, dtype=torch.float64)
to_q, to_k, to_v = torch.randn(3, C, C, dtype=torch.float64) / math.sqrt(C)

q, k, v = x @ to_q, x @ to_k, x @ to_v
later = torch.ones(T, T, dtype=torch.bool).triu(1)
at_once = (q @ k.T / math.sqrt(C)).masked_fill(later, -torch.inf).softmax(-1) @ v  # (T, C)

keys, values, one_by_one = [], [], []
for token in x:  # (C,)
    keys.append(token @ to_k)
    values.append(token @ to_v)
    scores = torch.stack(keys) @ (token @ to_q) / math.sqrt(C)  # no mask: the future is not here
    one_by_one.append(scores.softmax(-1) @ torch.stack(values))
torch.testing.assert_close(torch.stack(one_by_one), at_once, rtol=1e-12, atol=1e-12)
print("the same to 12 digits, and no mask was needed")

# %% [markdown]
# ## The same in a GPT-2
#
# `Cache` holds the keys and values of all layers. A prompt fills it in one pass; after that, each new token is one row. The logits agree with those of reading everything
# again, up to the rounding of fp32: sums are taken in another order.

# %%
config = GPTConfig(n_layer=6, n_head=6, n_embd=192, n_positions=512, vocab_size=257)
model = GPT(config, seed=1).eval()
ids = torch.randint(257, (1, 300), generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    everything = model(ids)  # (1, 300, 257)
    cache = Cache.empty(model, batch=1, capacity=300)
    model(ids[:, :290], cache=cache)  # the prompt, at once
    difference = 0.0
    for place in range(290, 300):
        logits = model(ids[:, place : place + 1], cache=cache)  # (1, 1, 257)
        here = (logits[0, 0] - everything[0, place]).abs().max().item()
        difference = max(difference, here)
print(f"cache of {cache.used} tokens; largest difference of a logit {difference:.1e}")
assert difference < 1e-5

prompt = ids[0, :50].tolist()
cached = generate(model, [prompt], 60, temperature=0.0)
again = generate(model, [prompt], 60, temperature=0.0, use_cache=False)
assert cached == again
print("60 tokens, written with and without a cache: equal")

# %% [markdown]
# ## What it saves
#
# Without a cache, token n costs a pass over n tokens, so a text of n tokens takes about n²/2 rows through the network. With a cache each token takes one row. What still grows is the
# attention over the cached keys, which is small at these lengths.


# %%
@torch.no_grad()
def seconds_a_token(length: int, cached: bool, repeats: int = 4) -> float:
    """Seconds for the token behind `length` others."""
    best = math.inf
    for _ in range(repeats):
        cache = Cache.empty(model, batch=1, capacity=length + 1)
        model(ids[:, :1].expand(1, length), cache=cache)
        start = time.perf_counter()
        if cached:
            model(ids[:, :1], cache=cache)
        else:
            model(ids[:, :1].expand(1, length + 1))
        best = min(best, time.perf_counter() - start)
    return best


lengths = [16, 64, 128, 256, 400, 511]
plt.figure(figsize=(6, 2.9))
for cached in (False, True):
    times = [1000 * seconds_a_token(length, cached) for length in lengths]
    plt.plot(lengths, times, marker="o", label="with a cache" if cached else "reading all again")
plt.xlabel("tokens before")
plt.ylabel("milliseconds for one more")
plt.title("One more token")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## What it costs
#
# Memory: a key and a value of `n_embd` numbers in each layer for each token. For GPT-2 124M in bf16 that is 36,864 bytes a token, or 38 MB for a full context of 1,024.
# When many texts are written at once, the cache, and not the weights, fills the GPU. Reading it takes time as well: for long texts, each new token waits
# for the whole cache to come out of memory. Grouped-query attention (several heads share keys and values) makes it smaller; GPT-2 does not have it.
#
# A cache belongs to positions. GPT-2's positions are absolute, so when a text grows beyond 1,024 tokens its beginning cannot just be dropped: all that remains would
# stand at other positions, and must be read again. `anew` keeps the last half of the text and fills a new cache.

# %%
for name, n_layer, n_embd in (("124M", 12, 768), ("355M", 24, 1024), ("1558M", 48, 1600)):
    per_token = 2 * n_layer * n_embd * 2
    print(f"{name:>6}: {per_token:>9,} bytes a token, {1024 * per_token / 1e6:6.1f} MB for 1,024")
assert cache.keys.numel() + cache.values.numel() == 2 * 6 * 192 * 300

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** How many bytes does the cache of one text take?


# %%
def cache_bytes(n_layer: int, n_embd: int, tokens: int, bytes_a_number: int) -> int | None:
    return None  # your answer


# %%
def check_1(cache_bytes: Callable[..., int | None]) -> str:
    found = cache_bytes(12, 768, 1024, 2)
    if found is None:
        return "not answered yet"
    if found == 18_874_368:
        return "wrong: there are keys and values, so twice as many"
    if found == 12 * 37_748_736:
        return "wrong: the heads share n_embd among them; they do not have n_embd each"
    if found != 37_748_736 or cache_bytes(48, 1600, 10, 4) != 6_144_000:
        return f"wrong: {found:,} for GPT-2 124M with 1,024 tokens in bf16"
    return "right: 38 MB for a full context of GPT-2 124M in bf16"


print(check_1(cache_bytes))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def cache_bytes(n_layer: int, n_embd: int, tokens: int, bytes_a_number: int) -> int:
#     return 2 * n_layer * n_embd * tokens * bytes_a_number
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** A prompt has `p` tokens, and `n` new ones are written. How many tokens go through the network in all, with and without a cache?


# %%
def tokens_read(p: int, n: int, cached: bool) -> int | None:
    return None  # your answer


# %%
def check_2(tokens_read: Callable[..., int | None]) -> str:
    if tokens_read(10, 3, True) is None or tokens_read(10, 3, False) is None:
        return "not answered yet"
    if tokens_read(10, 3, True) == 13:
        return "wrong: the last new token is written, but never read"
    if tokens_read(10, 3, True) != 12 or tokens_read(7, 9, True) != 15:
        return "wrong: with a cache, each token is read once: 12 for 10 and 3, 15 for 7 and 9"
    if tokens_read(10, 3, False) != 33:
        return f"wrong: without a cache, 10 + 11 + 12 = 33, not {tokens_read(10, 3, False)}"
    if tokens_read(100, 900, False) != 494_550:
        return "wrong: for 900 tokens after 100, the sum is 494,550"
    return "right: 999 against 494,550 tokens for a text of 1,000"


print(check_2(tokens_read))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def tokens_read(p: int, n: int, cached: bool) -> int:
#     return p + n - 1 if cached else sum(p + i for i in range(n))
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Write with a prompt that is longer than the positions of the model. What does `anew sample` say, and what does it keep?
# 2. `anew bench generate` compares writing with other programs on your machine. How far is it from the time that reading all weights once takes?
# 3. Two texts of different lengths are written together. Which slots of the cache does the shorter one not use, and what hides them (`Cache.mask`)?
