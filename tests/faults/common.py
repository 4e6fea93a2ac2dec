"""What the faults share: a tiny run on real processes, and a count of what held."""

import dataclasses
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anew import Config
from anew.checkpoint import folder as checkpoint
from anew.training import run_log as metrics


@dataclass
class Tally:
    """How often a fault was injected, and what did not hold."""

    runs: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    def check(self, held: bool, otherwise: str) -> None:
        if not held:
            self.failures.append(otherwise)


Fault = Callable[[int, random.Random, Path], Tally]


def tiny(out: Path, **settings: Any) -> Config:
    """A run of a second: 2 layers of 32, windows of 16 bytes, fp32, eager."""
    text = out.parent / "story.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        nouns, verbs = (
            ["cat", "dog", "king", "queen", "ship", "tower", "river"],
            ["sees", "finds", "builds", "crosses", "leaves"],
        )
        text.write_text(
            "".join(
                f"The {nouns[i % 7]} {verbs[i * i % 5]} the {nouns[i * 3 % 7]} on day {i}.\n"
                for i in range(550)
            )
        )
    base = dataclasses.replace(Config(), recipe="tiny").override(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, seq_len=16, vocab_size=257, tokenizer="bytes", data=str(text),
        steps=40, warmup_steps=2, batch_tokens=256, micro_batch=4, lr=3e-3, min_lr=3e-4, precision="fp32", device="cpu", compile="off",
        evaluate_every=0, save_every=5, timeout_seconds=30.0, out=str(out),
    )  # fmt: skip
    return base.override(**settings).check()


def flags(config: Config) -> list[str]:
    """The settings of `tiny` as flags of the command line."""
    found = []
    for group in (config.model, config.data, config.optim, config.run):
        for f in dataclasses.fields(group):
            value = getattr(group, f.name)
            if f.metadata.get("flag", True) and not isinstance(value, bool) and value != "":
                found += [f"--{f.name.replace('_', '-')}", str(value)]
    return found


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    """What must be the same bit for bit: step, loss, norm and rate of every step."""
    return [
        (r["step"], r["train/loss"], r["train/grad_norm"], r["train/lr"])
        for r in metrics.read_metrics(run)
        if "train/loss" in r
    ]


def final(run: Path) -> bytes:
    """The newest checkpoint's weights and moments."""
    newest, _ = checkpoint.newest(run)
    assert newest is not None, f"{run} has no checkpoint"
    return (newest / "model.safetensors").read_bytes() + (
        newest / "optimizer.safetensors"
    ).read_bytes()


SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1, "INT": signal.SIGINT}
