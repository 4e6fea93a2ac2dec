# %% [markdown]
# # 9. Classic mistakes, and what they look like
#
# Every one of these has cost somebody days. Each is made here on purpose, on a small model and real text, and drawn beside the right run:
# learn the shape of the curve, and you will know the mistake when you meet it.

# %%
import dataclasses
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import anew
from anew import GPT
from anew.bench import timing as bench
from anew.config.schema import OptimConfig
from anew.optim.build import build_optimizers, set_learning_rates
from anew.optim.schedule import learning_rate_factor
from anew.utils import device as runtime

runtime.set_up_device(anew.recipe("demo").run)
T, B, STEPS = 64, 16, 150
config = anew.GPTConfig(
    n_layer=2, n_head=2, n_embd=64, n_positions=T, vocab_size=257, attention="plain"
)
settings = OptimConfig(lr=6e-3, min_lr=6e-4, warmup_steps=15)
text = torch.tensor(
    list(b"".join(path.read_bytes() for path in bench.standard_library_files()[:40]))
)
cut = int(0.9 * len(text))


def batch(step: int, rows: int = B, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    part = text[cut:] if held_out else text[:cut]
    starts = torch.randint(
        len(part) - T - 1, (rows,), generator=torch.Generator().manual_seed(step)
    )
    found = torch.stack([part[s : s + T + 1] for s in starts])
    return found[:, :-1], found[:, 1:]


Loss = Callable[[GPT, torch.Tensor, torch.Tensor], torch.Tensor]


def train(
    change: Callable[[GPT], None] = lambda model: None,
    loss_of: Loss = lambda model, x, y: model(x, y),
    rate: Callable[[int], float] = lambda step: learning_rate_factor(step, STEPS, settings),
    accumulate: int = 1,
    divide: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    settings: OptimConfig = settings,
    **shape: float,
) -> dict[str, list[float]]:
    """Losses and gradient norms of a run, and the loss on held-out text every 25 steps."""
    model = GPT(anew.GPTConfig(**{**config.__dict__, **shape}), dtype, seed=1)
    change(model)
    optimizers = build_optimizers(model, settings)
    found: dict[str, list[float]] = {"loss": [], "norm": [], "held out": []}
    for step in range(STEPS):
        set_learning_rates(optimizers, rate(step))
        total = 0.0
        for x, y in zip(*(part.chunk(accumulate) for part in batch(step)), strict=True):
            loss = loss_of(model, x, y) / (accumulate if divide else 1)
            (loss * scale).backward()
            total += loss.item()
        found["norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found["loss"].append(total)
        if step % 25 == 24:
            model.eval()
            with torch.no_grad():
                found["held out"].append(model(*batch(7, 64, held_out=True)).item())
            model.train()
    return found


def draw(title: str, key: str = "loss", log: bool = False, **runs: dict[str, list[float]]) -> None:
    plt.figure(figsize=(6, 2.7))
    for name, run in {"right": right, **runs}.items():
        values = run[key]
        xs = range(1, STEPS + 1) if len(values) == STEPS else range(25, STEPS + 1, 25)
        plt.plot(
            xs,
            values,
            label=name.replace("_", " "),
            color="#9aa3b2" if name == "right" else None,
            linewidth=1.2,
        )
    if log:
        plt.yscale("log")
    plt.legend()
    plt.xlabel("step")
    plt.ylabel(key)
    plt.title(title)
    plt.tight_layout()
    plt.show()


right = train()
print(
    f"right: {right['loss'][0]:.2f} -> {right['loss'][-1]:.2f}, held out {right['held out'][-1]:.2f}"
)

# %% [markdown]
# ## The schedule that never arrives
#
# A warm-up of 2,000 steps in a run of 1,000 (one reference project had it), or a decay that is computed from the wrong end. The loss falls, only too
# slowly, and nothing looks broken. Look at the learning rate's curve first, always.

# %%
slow = train(rate=lambda step: (step + 1) / (10 * STEPS))
draw("Warm-up longer than the run", never_warm=slow)
assert slow["held out"][-1] > right["held out"][-1] + 0.2

# %% [markdown]
# ## The wrong initialisation
#
# PyTorch draws embeddings with a standard deviation of 1. Tied to the head, the logits are enormous and the loss begins far above $\ln 257 = 5.55$. The
# first printed loss gives it away before the first step.


# %%
def unit_table(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[:257].normal_(0, 1, generator=torch.Generator().manual_seed(1))


wild = train(unit_table)
print(f"first loss {wild['loss'][0]:.1f}; it should be 5.5")
draw("Embeddings drawn with std 1", std_1=wild)
assert wild["loss"][0] > 20

# %% [markdown]
# ## Dropout where there is too much text to learn by heart
#
# Dropout guards against learning the training text by heart. In one pass over more text than the model can hold there is nothing to guard against, and it only
# makes each step noisier. GPT-2 reproductions use none.

# %%
dropped = train(dropout=0.2)
draw("Dropout 0.2, in one pass over the text", "held out", dropout=dropped)
assert dropped["held out"][-1] > right["held out"][-1]

# %% [markdown]
# ## Loss scaling with bf16
#
# fp16 needs it, bf16 has fp32's range and does not. Scaled and not unscaled before clipping, every gradient is "exploding", is cut to a norm of 1, and the norm in
# the log means nothing any more: a real explosion would not be seen.

# %%
# A CPU without bf16 instructions would take a minute; in fp32 the norm is wrong by the same factor.
dtype = torch.bfloat16 if runtime.cpu_has_bf16() else torch.float32
scaled = train(scale=65536.0, dtype=dtype)
draw("The gradient norm that is logged, loss scaled by 65,536", "norm", log=True, scaled=scaled)
assert min(scaled["norm"]) > 1000 * max(right["norm"])

# %% [markdown]
# ## Accumulation without the division
#
# Four micro-batches added up and not averaged: the gradient is four times as large. Adam hardly minds the size and clipping hides the rest, so it trains; but clipping
# now acts at every step, and the printed loss is four times too high. "My loss starts at 22" is this.

# %%
added = train(accumulate=4, divide=False)
averaged = train(accumulate=4)
print(f"first loss: averaged {averaged['loss'][0]:.2f}, only added {added['loss'][0]:.2f}")
assert abs(averaged["loss"][-1] - right["loss"][-1]) < 0.05
assert abs(added["loss"][0] / averaged["loss"][0] - 4) < 0.01
draw("Gradient norm before clipping", "norm", averaged=averaged, only_added=added)
share = [sum(norm > 1.0 for norm in run["norm"]) / STEPS for run in (averaged, added)]
print(f"steps that are clipped: {100 * share[0]:.0f}% against {100 * share[1]:.0f}%")
assert share[1] > share[0]

# %% [markdown]
# ## Too good to be true
#
# The targets are not shifted, so the model learns to copy; or the mask is missing, so it learns to look at the answer. Both give a training loss that no
# language model can have. If a loss of text falls below 1 bit a byte within minutes, distrust it and write something with the model.
#
# The second hides for a while: with AdamW nothing can be seen of it in these 150 steps but a held-out loss that is a little too high. Here it is trained with
# Muon, which finds the answer soon.


# %%
def no_mask(model: GPT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    t = model.transformer
    h = t.wte(x) + t.wpe.weight[: x.size(1)]
    for block in t.h:
        n, H = block.ln_1(h), config.n_head
        q, k, v = block.attn.c_attn(n).view(*n.shape[:2], 3, H, -1).permute(2, 0, 3, 1, 4)
        h = h + block.attn.c_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n.shape)
        )
        h = h + block.mlp(block.ln_2(h))
    return F.cross_entropy(model.head(t.ln_f(h)).flatten(0, 1), y.flatten())


copying = train(loss_of=lambda model, x, y: model(x, x))
seeing = train(
    loss_of=no_mask, settings=dataclasses.replace(settings, optimizer="muon", muon_lr=0.05)
)
draw("Training loss", targets_not_shifted=copying, no_mask=seeing)
print(
    f"held out, asked honestly: right {right['held out'][-1]:.2f}, copying {copying['held out'][-1]:.2f}, seeing {seeing['held out'][-1]:.2f}"
)
assert copying["loss"][-1] < 0.1
assert seeing["loss"][-1] < 0.5 * right["loss"][-1]
assert min(copying["held out"][-1], seeing["held out"][-1]) > right["held out"][-1] + 1

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Cut inputs and targets (both of length T) for training from `T` + 1 token ids.


# %%
def inputs_and_targets(ids: list[int]) -> tuple[list[int], list[int]] | None:
    return None  # your answer


# %%
def check_1(inputs_and_targets: Callable[..., tuple[list[int], list[int]] | None]) -> str:
    found = inputs_and_targets([5, 6, 7, 8])
    if found is None:
        return "not answered yet"
    inputs, targets = (list(part) for part in found)
    if inputs == targets:
        return "wrong: the model would learn to copy; the target is the next token"
    if (inputs, targets) == ([6, 7, 8], [5, 6, 7]):
        return "wrong: the model would learn to write backwards"
    if (inputs, targets) != ([5, 6, 7], [6, 7, 8]):
        return f"wrong: {inputs} and {targets}"
    return "right: from each token to the next"


print(check_1(inputs_and_targets))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def inputs_and_targets(ids: list[int]) -> tuple[list[int], list[int]]:
#     return ids[:-1], ids[1:]
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** Write a test that finds a missing mask. `logits_of` maps ids (T,) to logits (T, V), and T is at least 8. Return whether any position sees later tokens.


# %%
def sees_the_future(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> bool | None:
    return None  # your answer


# %%
def check_2(sees_the_future: Callable[..., bool | None]) -> str:
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(1))

    def causal(ids: torch.Tensor) -> torch.Tensor:
        return table[ids].cumsum(0)

    def everywhere(ids: torch.Tensor) -> torch.Tensor:
        return table[ids].sum(0).expand(len(ids), -1)

    def one_ahead(ids: torch.Tensor) -> torch.Tensor:  # sees one token too far, except at the end
        return torch.cat([table[ids].cumsum(0)[1:], table[ids].sum(0, keepdim=True)])

    answers = [sees_the_future(f) for f in (causal, one_ahead, everywhere)]
    if answers[0] is None:
        return "not answered yet"
    if answers[0]:
        return "wrong: it accuses a model that sees earlier tokens only"
    if not answers[2]:
        return "wrong: it does not see a model that looks at the whole text"
    if not answers[1]:
        return "wrong: it does not see a model that looks one token ahead"
    return "right: change a token, and nothing before it may change"


print(check_2(sees_the_future))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def sees_the_future(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> bool:
#     ids = torch.arange(8)
#     for place in range(1, 8):
#         changed = ids.clone()
#         changed[place] = 200
#         if not torch.equal(logits_of(ids)[:place], logits_of(changed)[:place]):
#             return True
#     return False
# ```
#
# Run it on `right`'s model and on one without a mask. A compiled model may need `allclose`.
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Evaluate on the training text instead of held-out text. How would you notice from a log that "validation" equals training?
# 2. Leave out weight decay, then decay everything including norms and biases. Which of the two can you see at this size?
# 3. Which of the mistakes above would `anew`'s checks have refused or logged, and which cannot be caught by any check?
