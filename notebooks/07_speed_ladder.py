# %% [markdown]
# # 7. The speed ladder
#
# One reference project's steps went from 1,100 ms to 100 ms without changing what is computed. Here the same ladder on your machine, at a size that takes
# seconds: each rung is the project's own training step with one setting more. `anew bench ladder` does it at full size.

# %%
import matplotlib.pyplot as plt
import torch

import anew
from anew.bench import timing as bench
from anew.model.flops import count_parameters, flops_per_token
from anew.utils import device as runtime

# %% [markdown]
# ## How fast could it be?
#
# A training step needs about 6 operations for each weight and token (2 forward, 4 backward), and some for attention. Dividing by what the device's
# matrix units can do gives the time that no program beats.

# %%
config = anew.recipe("gpt2-124m", n_layer=4, n_head=4, n_embd=256, device="cpu")
config = bench.with_batch(config, micro_batch=4, seq_len=128)
flops = flops_per_token(config.model, 128)
print(
    f"{count_parameters(config.model):,} parameters, {flops / 1e6:.0f} million operations a token"
)
by_hand = 6 * (4 * 12 * 256**2 + 50304 * 256) + 12 * 4 * 256 * 129 / 2
assert abs(by_hand - flops) < 2
rt = runtime.set_up_device(config.override(precision="auto").run)
peak, source = runtime.peak_flops(rt)
print(f"measured against {source}")

# %% [markdown]
# ## The rungs
#
# In this process and without compiling, so that it takes seconds. Each rung must compute the same loss, but for the rounding of bf16.

# %%
rows, settings = [], {}
for rung in bench.RUNGS:
    if "cpu" not in rung.devices or rung.name == "compile":
        continue
    if rung.name == "bf16" and not runtime.cpu_has_bf16():
        print("bf16: this CPU has no bf16 instructions")
        continue
    settings |= rung.settings | {"compile": "off"}
    try:
        found = bench.measure(config.override(**settings), steps=3, matmul=rung.matmul)
    except anew.UserError as error:
        print(f"{rung.name}: {error}")
        continue
    rows.append((rung.name, found))
    print(f"{rung.name:<18} {1e3 * found.seconds:7.1f} ms   {found.tokens_per_second:8,.0f} tokens/s   MFU {100 * found.tflops * 1e12 / peak:3.0f}%"
          f"   loss {found.losses[-1]:.4f}")  # fmt: skip
torch.set_float32_matmul_precision("highest")
print(
    "The last rung is there for memory: without it all logits lie there at once. On a small model it may cost time."
)
assert max(abs(found.losses[-1] - rows[0][1].losses[-1]) for _, found in rows) < 0.05

plt.figure(figsize=(7, 3))
plt.barh([name for name, _ in rows], [1e3 * found.seconds for _, found in rows])
plt.gca().invert_yaxis()
plt.xlabel("ms a step")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Memory or arithmetic?
#
# A product of an (m, k) and a (k, n) matrix does 2mkn operations and moves at least 2(mk + kn + mn) bytes in bf16. Operations a byte decide what limits it.
# Training multiplies thousands of rows at once and is bound by arithmetic; writing one token multiplies one row and is bound by memory,
# which is why writing gains from 8-bit weights and training does not.

# %%
for what, m in (("training, 4096 rows", 4096), ("writing, 1 row", 1)):
    k, n = 768, 3072
    print(f"{what:<22} {2 * m * k * n / (2 * (m * k + k * n + m * n)):8.1f} operations a byte")

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** How many seconds does a training step of GPT-2 124M with 524,288 tokens take at least on an H100, whose peak in bf16 is 989 TFLOP/s?

# %%
seconds = None  # your answer


# %%
def check_1(seconds: float | None) -> str:
    if seconds is None:
        return "not answered yet"
    if 0.39 <= seconds <= 0.48:
        return "right: 0.40 s for the weights' products, 0.46 s with attention's"
    if 0.12 <= seconds <= 0.16:
        return "wrong: this is the forward pass; the backward pass takes twice as long again"
    if 390 <= seconds <= 480:
        return "wrong: this is in milliseconds"
    return "wrong: 6 operations for each parameter and token, divided by the peak"


print(check_1(seconds))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# seconds = 6 * 124.4e6 * 524_288 / 989e12
# ```
#
# 19,073 steps are then 2.1 hours. Today's best records of this field reach about half of the peak.
#
# </details>

# %% [markdown]
# **Exercise 2.** Attention takes 30% of a step. A new kernel makes it 4 times as fast. By which factor does the step become faster?

# %%
speedup = None  # your answer


# %%
def check_2(speedup: float | None) -> str:
    if speedup is None:
        return "not answered yet"
    if abs(speedup - 1 / 0.775) < 0.01:
        return "right: 70% of the step stays as it was (Amdahl's law); 1.43 is the most it can be"
    if abs(speedup - 1.225) < 0.005:
        return "wrong: 22.5% of the time is saved, so the rate is 1 / 0.775 as high"
    if speedup > 1.43:
        return "wrong: even without any attention the step would take 70% of the time"
    return "wrong: compute the new time as a share of the old, then its inverse"


print(check_2(speedup))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# speedup = 1 / (0.7 + 0.3 / 4)
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Run `anew bench ladder gpt2-124m` and compare the shape of your ladder with the one above. Which rung matters most on your machine?
# 2. On a CPU without bf16 instructions the rung "bf16" is slower than fp32. Why?
