"""What changes from step to step in a run: weights, optimizers, counters. Exactly what a checkpoint holds, and nothing else.

A step folder is a Hugging Face model folder and two files more: optimizer.safetensors ("exp_avg.transformer.wte.weight": state by
parameter name, whole tensors, whatever the device or grouping) and trainer.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anew import checkpoint, optim, weights
from anew.config import Config, UserError
from anew.model import GPT
from anew.runtime import Runtime
from anew.tokenizer import Tokenizer


@dataclass
class State:
    """What changes from step to step: exactly what a checkpoint holds."""

    config: Config
    rt: Runtime
    data_revision: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int = -1

    def __post_init__(self) -> None:
        self.model = GPT(self.config.model, self.rt.dtype, self.config.run.seed).to(self.rt.device)
        self.optimizers = optim.build(self.model, self.config.optim)
        self.scaler = torch.amp.GradScaler(self.rt.device.type, enabled=self.rt.precision == "fp16")

    def clock(self) -> dict[str, float]:
        """What every row of metrics.jsonl starts with."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 4)}

    def advance(self, tokens: int, seconds: float) -> None:
        """Count one step done."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds

    def begin(self, run: Path) -> list[str]:
        """Restore the newest good checkpoint of `run`, or start from --init, or from nothing; lines that say which."""
        said = [f"removed the leftover of a killed save: {name}" for name in checkpoint.clean(run)]
        folder, skipped = checkpoint.newest(run)
        if folder is not None:
            self.restore(folder)
            return [*said, *(f"skipped: {line}" for line in skipped), f"resumed from {folder.name}"]
        if skipped:
            raise UserError(f"run {run} has no checkpoint that is whole: {skipped[0]} Delete the run folder to start anew.")
        if self.config.run.init:
            folder = weights.find(self.config.run.init)
            weights.load_into(self.model, weights.read_tensors(folder), folder)
            said.append(f"weights from {folder}")
        return said

    def restore(self, folder: Path) -> None:
        """Weights, optimizer and counters of a verified checkpoint folder."""
        weights.load_into(self.model, weights.read_tensors(folder), folder)
        try:
            stored = load_file(folder / "optimizer.safetensors")
            trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            self.step, self.tokens, self.seconds = trainer["step"], trainer["tokens"], trainer["seconds"]
            revision = trainer["data_revision"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is a model, but no checkpoint that training can resume from ({error}).") from error
        if revision != self.data_revision:
            raise UserError(
                f"the text in {self.config.data.data} is no longer the one that {folder.parent.parent} was trained on; use another --out."
            )
        self.saved_step = self.step
        parameters = dict(self.model.named_parameters())
        owner = {p: o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for full_name, tensor in stored.items():
            key, name = full_name.split(".", 1)
            p = parameters[name]
            value = tensor.to(p.device)
            if tensor.ndim:  # padding rows of wte have no state: zeros
                value = torch.zeros(p.shape, dtype=tensor.dtype, device=p.device)
                value[: tensor.size(0)] = tensor
            owner[p].state[p][key] = value
        if trainer["scaler"]:
            self.scaler.load_state_dict(trainer["scaler"])

    def save(self, run: Path, tokenizer: Tokenizer) -> None:
        """Write the checkpoint of this step, unless it is there (or nothing was done yet), and drop old ones."""
        if self.step in (0, self.saved_step):
            return
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        moments = {
            f"{key}.{names[p]}": weights.unpadded(names[p], value, self.config.model)
            for o in self.optimizers
            for p, entries in o.state.items()
            for key, value in entries.items()
        }
        trainer = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data_revision": self.data_revision,
            "scaler": self.scaler.state_dict(),
        }
        with checkpoint.writing(run, self.step) as folder:
            weights.save_model(folder, self.model, tokenizer)
            save_file(moments, folder / "optimizer.safetensors")
            (folder / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n", encoding="utf-8")
        self.saved_step = self.step
        checkpoint.prune(run, self.config.run.keep)
