# %% [markdown]
# # 6. Logging: reading a run
#
# A run writes one line of JSON a step. Everything else (TensorBoard, the console, the report) is made from it. Here a real run is read: it was
# trained on film reviews on two CPU cores, was stopped on its way by a signal, and went on.

# %%
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from loguru import logger

from anew.training import run_log as metrics

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "docs" / "example").is_dir())
run = ROOT / "docs" / "example"
rows = metrics.read_metrics(run)
steps = [row for row in rows if "train/loss" in row]
print(f"{len(rows)} rows, {len(steps)} of them training steps; the last one:")
print(json.dumps(steps[-1], indent=1))

# %% [markdown]
# ## Curves

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 5.6))
for panel, (name, key) in zip(axes.flat, [("loss", "train/loss"), ("learning rate", "train/lr"), ("gradient norm", "train/grad_norm"),
                                          ("tokens a second", "speed/tokens_per_second")], strict=True):  # fmt: skip
    panel.plot([row["tokens"] / 1e6 for row in steps], [row[key] for row in steps], linewidth=0.8)
    panel.set(title=name, xlabel="million tokens")
val = [row for row in rows if "val/loss" in row]
axes[0, 0].plot(
    [row["tokens"] / 1e6 for row in val],
    [row["val/loss"] for row in val],
    "o--",
    label="validation",
)
axes[0, 0].legend()
plt.tight_layout()
plt.show()
print(
    f"validation: {val[0]['val/loss']:.3f} -> {val[-1]['val/loss']:.3f} nats, perplexity {math.exp(val[-1]['val/loss']):.0f}"
)
assert val[-1]["val/loss"] < val[0]["val/loss"]

# %% [markdown]
# ## It was stopped, and nothing shows
#
# The log says where. If the resumed part had replayed or skipped data, or lost the optimizer's state, the loss would jump there. And each row's token count
# is its step times the tokens a step, so no step is missing or counted twice.

# %%
log = (run / "log.txt").read_text(encoding="utf-8").splitlines()
for line in log:
    if "stopped at" in line or "resumed" in line:
        print(line)
stopped = next(i for i, line in enumerate(log) if "resumed from" in line)
assert stopped > 0
size = steps[0]["tokens"]
assert [row["tokens"] for row in steps] == [size * (n + 1) for n in range(len(steps))]

# %% [markdown]
# ## TensorBoard
#
# It is written beside, from the same rows. Here written and read back:

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

folder = tempfile.mkdtemp()
with SummaryWriter(folder) as writer:
    for row in steps:
        writer.add_scalar("train/loss", row["train/loss"], row["step"])
events = EventAccumulator(folder)
events.Reload()
read = {event.step: event.value for event in events.Scalars("train/loss")}
assert all(math.isclose(read[row["step"]], row["train/loss"], rel_tol=1e-6) for row in steps)
print(f"{len(read)} points read back from TensorBoard's file")

# %% [markdown]
# ## loguru
#
# For people: lines with a level, to the console and to files, without set-up.

# %%
file = Path(tempfile.mkdtemp()) / "log.txt"
logger.remove()  # here only to the file
sink = logger.add(file, format="{level: <8} {message}")
logger.info("step {:,}: loss {:.4f}", steps[-1]["step"], steps[-1]["train/loss"])
logger.warning(
    "a gradient norm of {:.1f} is far above the usual", max(row["train/grad_norm"] for row in steps)
)
logger.remove(sink)
print(file.read_text())
assert "WARNING" in file.read_text()

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** Smooth a curve: the exponential mean keeps `beta` of the last value and adds (1 - `beta`) of the new one. It begins at 0, which pulls the first values down;
# correct for that, as Adam does.


# %%
def smoothed(values: list[float], beta: float) -> list[float] | None:
    return None  # your answer


# %%
def check_1(smoothed: Callable[..., list[float] | None]) -> str:
    found = smoothed([4.0, 4.0, 4.0], 0.9)
    if found is None:
        return "not answered yet"
    if abs(found[0] - 0.4) < 1e-9:
        return "wrong: the curve begins near 0; divide by 1 - beta^(number of values)"
    if any(abs(value - 4) > 1e-9 for value in found):
        return f"wrong: a constant curve of 4 stays 4, and does not become {found}"
    if abs(smoothed([0.0, 1.0], 0.5)[1] - 2 / 3) > 1e-9:
        return "wrong: begin at 0 and correct, instead of beginning at the first value"
    return "right: this is what TensorBoard's slider does"


print(check_1(smoothed))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def smoothed(values: list[float], beta: float) -> list[float]:
#     mean, result = 0.0, []
#     for n, value in enumerate(values, start=1):
#         mean = beta * mean + (1 - beta) * value
#         result.append(mean / (1 - beta**n))
#     return result
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** The model FLOPs utilisation (MFU) is the share of the hardware's peak that the model's own operations take. A token costs about 6 operations a parameter in training.
# Compute it.


# %%
def mfu(tokens_a_second: float, parameters: float, peak_flops: float) -> float | None:
    return None  # your answer, between 0 and 1


# %%
def check_2(mfu: Callable[..., float | None]) -> str:
    found = mfu(180_000, 124.4e6, 312e12)  # the A100 of build-nanogpt
    if found is None:
        return "not answered yet"
    right = 6 * 124.4e6 * 180_000 / 312e12
    if math.isclose(found, right / 3, rel_tol=1e-3):
        return "wrong: 2 operations a parameter are the forward pass; the backward pass takes 4"
    if math.isclose(found, 100 * right, rel_tol=1e-3):
        return "wrong: this is in percent"
    if not math.isclose(found, right, rel_tol=1e-3):
        return f"wrong: {found:.3f}"
    return f"right: {found:.0%}; attention's own products come on top"


print(check_2(mfu))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def mfu(tokens_a_second: float, parameters: float, peak_flops: float) -> float:
#     return 6 * parameters * tokens_a_second / peak_flops
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Smooth the training loss with a moving mean. How long must the window be until the curve is as smooth as the validation points?
# 2. Which of the four curves would show first that the learning rate is too high?
# 3. `anew report RUN` makes a page of all this. Find the moment of the resume on it.
