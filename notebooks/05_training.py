# %% [markdown]
# # 5. Training: numbers, accumulation, many processes
#
# Three things make training fast, or small, without changing what is trained: fewer bits, micro-batches and several processes. Each is shown to be
# the same computation, up to rounding that is measured; at the end, two of them together.

# %%
import struct
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from anew import GPT, GPTConfig

# %% [markdown]
# ## The bits of a number
#
# fp32 has 8 bits of exponent and 23 of mantissa, TF32 8 and 10, bf16 8 and 7, fp16 5 and 10. The exponent is the range, the mantissa the precision.

# %%


def bits(value: float, exponent: int, mantissa: int) -> str:
    word = f"{struct.unpack('>I', struct.pack('>f', value))[0]:032b}"
    if exponent == 8:
        return f"{word[0]} {word[1:9]} {word[9 : 9 + mantissa]}"
    half = f"{struct.unpack('>H', struct.pack('>e', value))[0]:016b}"
    return f"{half[0]} {half[1:6]} {half[6:]}"


value = 3.14159265
for name, exponent, mantissa in (("fp32", 8, 23), ("TF32", 8, 10), ("bf16", 8, 7), ("fp16", 5, 10)):
    print(
        f"{name}: {bits(value, exponent, mantissa):<36} steps of {2.0 ** (1 - mantissa):.1e} near pi"
    )
for dtype in (torch.bfloat16, torch.float16):
    info = torch.finfo(dtype)
    print(
        f"{dtype}: largest {info.max:.3g}, smallest normal {info.tiny:.3g}, next after 1 is 1 + {info.eps:.3g}"
    )
assert torch.tensor(value).bfloat16().item() == 3.140625
assert torch.tensor(1e-8).half().item() == 0, (
    "fp16 loses small gradients, which is why it needs loss scaling"
)
assert torch.tensor(1e-8).bfloat16().item() > 0

# %% [markdown]
# ## Why weights stay in fp32
#
# A step of AdamW changes a weight by about the learning rate. In bf16, 1 + 0.001 is 1: the step is lost.

# %%
weights = {dtype: torch.ones((), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
for _ in range(100):
    for w in weights.values():
        w.add_(1e-3)
print({str(dtype): round(w.item(), 4) for dtype, w in weights.items()}, "after 100 steps of 0.001")
assert weights[torch.bfloat16].item() == 1.0
assert abs(weights[torch.float32].item() - 1.1) < 1e-4

# %% [markdown]
# ## What autocast does
#
# Products in bf16, sums that need it in fp32; which those are depends on the device: a CPU's autocast leaves softmax and norms in bf16, as printed here, a GPU's
# takes them to fp32. This project writes the same out: `compute_dtype` is the dtype of the activations.

# %%
a, b = torch.randn(4, 8), torch.randn(8, 8)
with torch.autocast("cpu", torch.bfloat16):
    dtypes = {"a @ b": (a @ b).dtype, "softmax": (a @ b).softmax(-1).dtype, "layer_norm": F.layer_norm(a @ b, (8,)).dtype,
              "cross_entropy": F.cross_entropy(a @ b, torch.tensor([0, 1, 2, 3])).dtype}  # fmt: skip
for name, dtype in dtypes.items():
    print(f"{name:<14} {dtype}")
assert dtypes["a @ b"] == torch.bfloat16
assert dtypes["cross_entropy"] == torch.float32

config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=257)
ids = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(2))
x, y = ids[:, :-1], ids[:, 1:]
losses = {
    dtype: GPT(config, dtype, seed=1)(x, y).item() for dtype in (torch.float32, torch.bfloat16)
}
print("loss in fp32 and bf16:", losses)
assert abs(losses[torch.float32] - losses[torch.bfloat16]) < 0.01

# %% [markdown]
# ## Accumulation: a large batch in small pieces
#
# The mean over 8 sequences is the mean of the means over 4 and 4. So gradients can be added up over micro-batches before one step; the loss has
# to be divided by their number, the classic mistake being to forget it.


# %%
def gradient(parts: int) -> torch.Tensor:
    model = GPT(config, seed=1)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (model(xs, ys) / parts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


whole = gradient(1)
for parts in (2, 4, 8):
    off = ((gradient(parts) - whole).norm() / whole.norm()).item()
    print(f"{parts} micro-batches: relative difference {off:.1e}")
    assert off < 1e-6

# %% [markdown]
# ## Two processes
#
# Each has a copy of the model and half of the batch; gradients are averaged before the step. `torchrun` starts the processes, they meet over gloo (NCCL on
# GPUs). First alone, then with accumulation in each, both together: still the same gradient.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

script = Path(tempfile.mkdtemp()) / "ranks.py"
script.write_text(
    """
import sys, torch
from torch import distributed as dist
from anew import GPT, GPTConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=257)
ids = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(2)).chunk(size)[rank]  # this rank's share
model = GPT(config, seed=1)
parts = ids.chunk(int(sys.argv[2]))  # in as many micro-batches
for part in parts:
    (model(part[:, :-1], part[:, 1:]) / len(parts)).backward()
for p in model.parameters():
    dist.all_reduce(p.grad)
    p.grad /= size
if rank == 0:
    torch.save(torch.cat([p.grad.flatten() for p in model.parameters()]), sys.argv[1])
dist.destroy_process_group()
""",
    encoding="utf-8",
)
file = script.with_name("gradient.pt")
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
for parts in (1, 2):
    subprocess.run([*torchrun, str(script), str(file), str(parts)], check=True, capture_output=True)
    ranks = torch.load(file, weights_only=True)
    off = ((ranks - whole).norm() / whole.norm()).item()
    print(
        f"2 processes x {parts} micro-batches x {4 // parts} sequences against 8 sequences at once: {off:.1e}"
    )
    assert off < 1e-6

# %% [markdown]
# ## The learning rate
#
# Warm up (Adam's means know nothing yet), then a cosine down to a tenth. One function of the step, so that a resumed run cannot be wrong about it.

# %%
from anew import recipe
from anew.optim.schedule import learning_rate_factor

o = recipe("gpt2-124m").optim
rates = [o.lr * learning_rate_factor(step, 19073, o) for step in range(19073)]
plt.figure(figsize=(6, 2.6))
plt.plot(rates)
plt.xlabel("step")
plt.ylabel("learning rate")
plt.title("GPT-2 124M over 10B tokens")
plt.tight_layout()
plt.show()
assert rates[714] == max(rates) == o.lr
assert rates[0] > 0

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Micro-batches may have different numbers of targets, for instance because answers have different lengths. Given the mean loss of each and its number of
# targets, what is the loss of the whole batch?


# %%
def loss_of_batch(means: list[float], counts: list[int]) -> float | None:
    return None  # your answer


# %%
def check_1(loss_of_batch: Callable[..., float | None]) -> str:
    found = loss_of_batch([2.0, 5.0], [30, 10])
    if found is None:
        return "not answered yet"
    if abs(found - 3.5) < 1e-9:
        return "wrong: the mean of the means gives a short micro-batch the weight of a long one"
    if abs(found - 7.0) < 1e-9:
        return "wrong: this is the sum; the loss of the batch is a mean over its targets"
    if abs(found - 2.75) > 1e-9 or abs(loss_of_batch([1.0, 9.0], [5, 0]) - 1.0) > 1e-9:
        return f"wrong: 30 targets of 2.0 and 10 of 5.0 have a mean of 2.75, not {found}"
    return "right: each micro-batch is divided by the targets of the whole batch"


print(check_1(loss_of_batch))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def loss_of_batch(means: list[float], counts: list[int]) -> float:
#     return sum(mean * n for mean, n in zip(means, counts, strict=True)) / sum(counts)
# ```
#
# transformers had the first mistake until 2024; with GPT-2's equal sequences both are the same.
#
# </details>

# %% [markdown]
# **Exercise 2.** Clip gradients: scale all of them by one factor so that their common norm is at most `most`.


# %%
def clipped(gradients: list[torch.Tensor], most: float) -> list[torch.Tensor] | None:
    return None  # your answer


# %%
def check_2(clipped: Callable[..., list[torch.Tensor] | None]) -> str:
    large = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]  # their common norm is 5
    found = clipped(large, 1.0)
    if found is None:
        return "not answered yet"
    if all(abs(part.norm() - 1) < 1e-4 for part in found):
        return "wrong: each tensor is clipped by itself, which turns the direction of the step"
    if not torch.allclose(torch.cat(found), torch.tensor([0.6, 0.0, 0.8]), atol=1e-4):
        return f"wrong: {torch.cat(found).tolist()} instead of [0.6, 0, 0.8]"
    small = [torch.tensor([0.3])]
    if not torch.allclose(clipped(small, 1.0)[0], small[0], atol=1e-4):
        return "wrong: a small gradient is made larger; clipping only shrinks"
    return "right: the direction stays, the length is at most 1"


print(check_2(clipped))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def clipped(gradients: list[torch.Tensor], most: float) -> list[torch.Tensor]:
#     norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
#     return [gradient * min(1.0, most / norm) for gradient in gradients]
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Forget the division by `parts` in `gradient`. What does clipping at 1.0 make of the mistake, and why is it easily overlooked?
# 2. Why does fp16 need a GradScaler and bf16 not? Look at the smallest normal numbers above.
# 3. Give the two processes different seeds. Which line of the script makes the result wrong, and what would you notice in a training run?
