# %% [markdown]
# # 0. Building GPT-2, one decision at a time
#
# We start with the barest network that could be called a GPT and add what the real one has, one decision at a time. At each step the same
# things are measured: the loss before training, the loss after 40 steps on real text, and the milliseconds a step. Everything is small, so
# that the whole lesson takes a minute on a laptop; the last cell checks that what has come out is the project's GPT-2.

# %%
import math
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anew
from anew.bench import timing as bench
from anew.utils import device as runtime

V, C, LAYERS, HEADS, T, B = 50257, 64, 4, 4, 64, 4
runtime.set_up_device(
    anew.recipe("demo").run
)  # torch's settings as in training: memory that is freed is kept, results can be repeated
tokenizer = anew.Tokenizer.named("gpt2")
text = torch.tensor(
    [
        i
        for path in bench.standard_library_files()[:40]
        for i in tokenizer.encode(path.read_text(encoding="utf-8"))
    ]
)
print(f"{len(text):,} tokens of Python's own source")


def batch(step: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - T - 1, (B,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([text[s : s + T + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


# %% [markdown]
# ## The bare network
#
# Two tables, some blocks, a head. PyTorch's own initialisation, nothing tied, nothing tuned.


# %%
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p.view(*p.shape[:2], HEADS, -1).transpose(1, 2)
            for p in self.c_attn(self.ln_1(x)).split(C, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attn_proj(y)
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.h, self.ln_f = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1).float(), targets.flatten())


# %% [markdown]
# ## First of all: can it learn one batch by heart?
#
# If it cannot, something is broken, and no amount of data will help. It is the cheapest test there is (`anew train overfit`).

# %%
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
x, y = batch(0)
curve = []
for _ in range(60):
    loss = net(x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    curve.append(loss.item())
print(f"one batch, 60 times: {curve[0]:.2f} -> {curve[-1]:.3f}")
assert curve[-1] < 0.5

# %% [markdown]
# ## The measure
#
# `try_it` makes a network, trains it for 40 steps on fresh batches and writes a row of the table.

# %%
table: list[tuple[str, int, float, float, float]] = []
Step = Callable[[Tensor, Tensor], Tensor]


def try_it(
    name: str,
    net: nn.Module,
    loss_of: Step | None = None,
    lr: float = 1e-3,
    tuned: bool = False,
    fused: bool = False,
) -> None:
    loss_of = loss_of or net
    settings = {"betas": (0.9, 0.95)} if tuned else {}
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1 if tuned else 0.01},
              {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0 if tuned else 0.01}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused, **settings)
    losses, times = [], []
    for step in range(40):
        if tuned:  # warm up, then down to a tenth
            share = min((step + 1) / 8, 0.55 + 0.45 * math.cos(math.pi * max(0, step - 8) / 32))
            for group in optimizer.param_groups:
                group["lr"] = lr * share
        began = time.perf_counter()
        loss = loss_of(*batch(step))
        loss.backward()
        if tuned:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    table.append(
        (
            name,
            sum(p.numel() for p in net.parameters()),
            losses[0],
            sum(losses[-10:]) / 10,
            1e3 * sorted(times)[20],
        )
    )
    print(
        "{:<28} {:>11,} parameters   loss {:6.2f} -> {:.2f}   {:4.0f} ms a step".format(*table[-1])
    )


try_it("bare", Net())

# %% [markdown]
# ## Tie the head to the table
#
# The vector that stands for a token when it is read also scores it when it is written. 3.2 million parameters fewer, of 6.6. But PyTorch draws embeddings with a
# standard deviation of 1, and as a head that makes logits of a size that no loss survives:

# %%
net = Net()
net.head.weight = net.wte.weight
try_it("tied", net)
assert table[-1][2] > 2 * math.log(V), "far worse than knowing nothing"

# %% [markdown]
# ## GPT-2's initialisation
#
# Everything 0.02, positions 0.01, biases zero, and the two projections that write into the residual stream smaller by $1/\sqrt{2 \cdot \text{layers}}$: each block
# adds to the stream, and the sum should not grow with depth. Now the loss starts where it must, at $\ln 50257 = 10.82$.


# %%
def initialise(net: Net, scaled: bool = True) -> Net:
    net.head.weight = net.wte.weight
    torch.manual_seed(2)
    for name, p in net.named_parameters():
        if "ln_" in name:
            continue
        if p.ndim < 2:
            nn.init.zeros_(p)
        else:
            nn.init.normal_(
                p,
                std=0.01
                if "wpe" in name
                else 0.02 / math.sqrt(2 * LAYERS)
                if "proj" in name and scaled
                else 0.02,
            )
    return net


try_it("GPT-2's initialisation", initialise(Net()))
assert abs(table[-1][2] - math.log(V)) < 0.6

stds = {}
for scaled in (True, False):
    deep = nn.ModuleList(Block() for _ in range(48))
    for name, p in deep.named_parameters():
        if p.ndim < 2 and "ln_" not in name:
            nn.init.zeros_(p)
        elif p.ndim > 1:
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * 48) if "proj" in name and scaled else 0.02)
    x, stds[scaled] = 0.02 * torch.randn(2, T, C), []
    with torch.no_grad():
        for block in deep:
            x = block(x)
            stds[scaled].append(x.std().item())
    plt.plot(range(1, 49), stds[scaled], label="scaled" if scaled else "not scaled")
plt.xlabel("block")
plt.ylabel("std of the residual stream")
plt.legend()
plt.title("48 layers at initialisation")
plt.tight_layout()
plt.show()
print(
    f"after 48 blocks: {stds[True][-1]:.3f} scaled, {stds[False][-1]:.3f} not scaled, {stds[True][0]:.3f} after the first"
)
assert stds[False][-1] > 5 * stds[True][-1]

# %% [markdown]
# ## The optimizer's settings
#
# $\beta_2 = 0.95$ forgets old gradients sooner, weight decay 0.1 on matrices only, gradients clipped at a norm of 1, a warm-up and a cosine. That allows a rate three
# times as high.

# %%
try_it("AdamW as GPT-3 had it", initialise(Net()), lr=3e-3, tuned=True)
assert table[-1][3] < table[-2][3]

# %% [markdown]
# It is worth looking at the table again: at a rate of 1e-3 and after so few steps the bare network was ahead of GPT-2's initialisation, since a head of its own
# learns how often each token occurs at once. A comparison at one rate is a comparison of rates; each needs its own.
#
# ## The same, faster
#
# From here on nothing is computed differently but for rounding: bf16 products, the optimizer as one kernel, compiled code.


# %%
def in_bf16(net: nn.Module) -> Step:
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        # A CPU without bf16 instructions would take minutes, so it stays in fp32.
        with torch.autocast("cpu", torch.bfloat16, enabled=runtime.cpu_has_bf16()):
            return net(x, y)

    return loss_of


net = initialise(Net())
try_it("+ bf16", net, in_bf16(net), lr=3e-3, tuned=True)
net = initialise(Net())
try_it("+ fused AdamW", net, in_bf16(net), lr=3e-3, tuned=True, fused=True)
net = initialise(Net())
try_it("+ compiled", net, in_bf16(torch.compile(net)), lr=3e-3, tuned=True, fused=True)
assert max(row[3] for row in table[-4:]) - min(row[3] for row in table[-4:]) < 0.1, (
    "rounding, and no more"
)

figure, axes = plt.subplots(1, 2, figsize=(11, 3))
names = [row[0] for row in table]
axes[0].barh(names, [row[3] for row in table])
axes[0].set(title="loss after 40 steps")
axes[1].barh(names, [row[4] for row in table])
axes[1].set(title="ms a step", yticks=[])
for axis in axes:
    axis.invert_yaxis()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## It is the project's GPT-2
#
# Put our weights into `anew.GPT` (which stores matrices as OpenAI did, (in, out)): the same loss.

# %%
config = anew.GPTConfig(n_layer=LAYERS, n_head=HEADS, n_embd=C, n_positions=T)
model = anew.GPT(config, seed=None)
names = {
    "c_attn": "attn.c_attn",
    "attn_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}
with torch.no_grad():
    state = dict(model.named_parameters())
    for name, p in net.named_parameters():
        ours = name
        for short, long in names.items():
            ours = ours.replace(f".{short}.", f".{long}.")
        matrix = p.ndim == 2 and "wte" not in name and "wpe" not in name
        state[f"transformer.{ours}"][: V if "wte" in ours else None].copy_(p.T if matrix else p)
    x, y = batch(1000)
    mine, theirs = net(x, y).item(), model(x, y).item()
print(f"loss of a new batch: {mine:.6f} here, {theirs:.6f} in anew")
assert abs(mine - theirs) < 1e-4

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** How many parameters has a GPT-2 with `n_layer` blocks of width `n_embd`, 50,257 tokens and 1,024 positions? Count matrices, biases and layer norms. The head is the
# token embedding itself.


# %%
def n_parameters(n_layer: int, n_embd: int) -> int | None:
    return None  # your answer


# %%
def check_1(n_parameters: Callable[[int, int], int | None]) -> str:
    found = n_parameters(12, 768)
    if found is None:
        return "not answered yet"
    missing = found - 124_439_808
    if missing == 50257 * 768:
        return "wrong: the head is counted, but it is the embedding table (tied)"
    if missing == -12 * 13 * 768:
        return "wrong: the 13 x 768 biases and layer norms of each block are missing"
    if missing:
        return f"wrong: {found:,} is {missing:+,} from GPT-2's 124,439,808"
    if n_parameters(48, 1600) != 1_557_611_200:
        return "wrong: right for 124M, but GPT-2 XL (48 blocks, 1600 wide) has 1,557,611,200"
    return "right: the same formula gives all four sizes of GPT-2"


print(check_1(n_parameters))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def n_parameters(n_layer: int, n_embd: int) -> int:
#     C = n_embd
#     attention = C * 3 * C + 3 * C + C * C + C
#     mlp = C * 4 * C + 4 * C + 4 * C * C + C
#     norms = 2 * 2 * C
#     return 50257 * C + 1024 * C + n_layer * (attention + mlp + norms) + 2 * C
# ```
#
# A block has 12 C² weights and 13 C small ones. The last 2 C are the final layer norm.
#
# </details>

# %% [markdown]
# **Exercise 2.** Which share of the parameters of GPT-2 124M is the token embedding?

# %%
share_of_embedding = None  # your answer, between 0 and 1


# %%
def check_2(share_of_embedding: float | None) -> str:
    if share_of_embedding is None:
        return "not answered yet"
    if abs(share_of_embedding - 0.310) < 0.002:
        return "right: 38.6 of 124.4 million, which is why tying it to the head pays"
    if abs(share_of_embedding - 0.473) < 0.003:
        return "wrong: this counts the table twice; the head is the same tensor"
    if abs(share_of_embedding - 0.316) < 0.002:
        return "wrong: this counts the position embedding too"
    return "wrong: the table has 50,257 rows of 768 numbers"


print(check_2(share_of_embedding))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# share_of_embedding = 50257 * 768 / 124_439_808
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Leave out the warm-up at a rate of 3e-3. At which step does it show?
# 2. Initialise `wpe` with 0.02, as many reproductions do. Can you see it after 40 steps? After 600?
# 3. Replace the tanh GELU by the exact one and train again: is one better? Then load OpenAI's weights into both.
