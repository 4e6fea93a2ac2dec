"""Names that are no settings, and are refused with advice.

Other trainers use the first ones; earlier versions of this package had the others.
"""

from typing import Any, NamedTuple

# What other trainers (nanoGPT, transformers) call a setting of this one.
NAMES_ELSEWHERE = {
    "batch_size": "micro_batch",
    "bf16": "precision",
    "block_size": "seq_len",
    "dataset": "data",
    "dtype": "precision",
    "epochs": "steps",
    "eval_interval": "evaluate_every",
    "eval_steps": "evaluate_every",
    "fp16": "precision",
    "grad_clip": "clip",
    "gradient_accumulation_steps": "batch_tokens",
    "init_from": "init",
    "learning_rate": "lr",
    "max_grad_norm": "clip",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "out_dir": "out",
    "output_dir": "out",
    "per_device_train_batch_size": "micro_batch",
    "save_steps": "save_every",
    "warmup_iters": "warmup_steps",
}


class Removed(NamedTuple):
    """A setting that earlier versions had."""

    group: str
    off: Any  # the value with which it had no effect
    reason: str


REMOVED = {
    "zero_init": Removed(
        "model", False, "starting residual projections at zero did not lower the loss"
    ),
    "average": Removed(
        "optim", 0.0, "averaging the weights of the last steps did not lower the loss"
    ),
    "batch_ramp": Removed("run", "", "growing batches did not reach a loss with fewer tokens"),
}


def removed_because(name: str) -> str:
    """Return the beginning of the sentence that refuses a removed setting."""
    return f"the setting {name} no longer exists: {REMOVED[name].reason} (docs/log.md, 13)"
