"""Helpers of the fault programme: a tiny run, what to compare of two runs, and a result."""

import dataclasses
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anew import Config
from anew.checkpoint.folder import newest_valid
from anew.training import run_log
from anew.training.trainer import train


@dataclass
class FaultResult:
    """How often a fault was injected, and which requirements were not met."""

    injections: int = 0
    failures: list[str] = field(default_factory=list)
    measurements: dict[str, str] = field(default_factory=dict)
    skip_reason: str = ""

    def check(self, is_met: bool, failure: str) -> None:
        """Record `failure` unless the requirement is met."""
        if not is_met:
            self.failures.append(failure)


# A fault is a function of the number of injections, a random generator and an empty folder.
Fault = Callable[[int, random.Random, Path], FaultResult]


def tiny(out: Path, **settings: Any) -> Config:
    """Return the config of a run of one second, and write its text beside the run folder.

    The model has 2 layers of width 32 and windows of 16 bytes, in fp32 and without compilation.
    """
    text = out.parent / "story.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        text.write_text(story())
    base = dataclasses.replace(Config(), recipe="tiny").override(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=16,
        seq_len=16,
        vocab_size=257,
        tokenizer="bytes",
        data=str(text),
        steps=40,
        warmup_steps=2,
        batch_tokens=256,
        micro_batch=4,
        lr=3e-3,
        min_lr=3e-4,
        precision="fp32",
        device="cpu",
        compile="off",
        evaluate_every=0,
        save_every=5,
        timeout_seconds=30.0,
        out=str(out),
    )
    return base.override(**settings).check()


def story() -> str:
    """Return about 20 kB of English with some structure."""
    nouns = ["cat", "dog", "king", "queen", "ship", "tower", "river"]
    verbs = ["sees", "finds", "builds", "crosses", "leaves"]
    lines = []
    for day in range(550):
        subject = nouns[day % 7]
        verb = verbs[day * day % 5]
        lines.append(f"The {subject} {verb} the {nouns[day * 3 % 7]} on day {day}.\n")
    return "".join(lines)


def train_run(config: Config) -> str:
    """Start or continue a run, and train it to its end. Return "done"."""
    train(config)
    return "done"


def flags(config: Config) -> list[str]:
    """Return the settings of a config made by `tiny` as flags of the command line."""
    words = []
    for group in (config.model, config.data, config.optim, config.run):
        for setting in dataclasses.fields(group):
            value = getattr(group, setting.name)
            is_flag = setting.metadata.get("flag", True)
            if is_flag and not isinstance(value, bool) and value != "":
                words += [f"--{setting.name.replace('_', '-')}", str(value)]
    return words


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    """Return step, loss, gradient norm and learning rate of every step, for exact comparison."""
    return [
        (row["step"], row["train/loss"], row["train/grad_norm"], row["train/lr"])
        for row in run_log.read_metrics(run)
        if "train/loss" in row
    ]


def final(run: Path) -> bytes:
    """Return the weights and the optimizer state of the newest checkpoint."""
    checkpoint, _ = newest_valid(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    weights = (checkpoint / "model.safetensors").read_bytes()
    return weights + (checkpoint / "optimizer.safetensors").read_bytes()


def saved_step(checkpoint: Path | None) -> int:
    """Return the step in a checkpoint folder's name, or 0 for None."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def check_same_run(result: FaultResult, config: Config, reference: Config, what: str) -> None:
    """Check that two runs have the same losses and the same final checkpoint, in every bit."""
    has_same_losses = losses(config.folder) == losses(reference.folder)
    result.check(has_same_losses, f"{what}: the losses differ")
    has_same_state = final(config.folder) == final(reference.folder)
    result.check(has_same_state, f"{what}: the final weights or optimizer states differ")


def compiled(name: str, scratch: Path) -> Path | None:
    """Return the library of a C file of this folder; None if there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source = Path(__file__).with_name(name)
    library = scratch / source.with_suffix(".so").name
    flags_of_library = ["-shared", "-fPIC", "-pthread", "-Wall", "-Werror"]
    subprocess.run(
        [compiler, *flags_of_library, "-o", str(library), str(source), "-ldl"], check=True
    )
    return library
