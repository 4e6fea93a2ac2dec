"""What changes from step to step in a run: weights, optimizers, counters. Exactly what a checkpoint holds, and nothing else.

A step folder is a Hugging Face model folder and two files more: optimizer.safetensors ("exp_avg.transformer.wte.weight": state by
parameter name, whole tensors, whatever the device, the grouping or the number of ranks) and trainer.json.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from anew.checkpoint import folder as checkpoint
from anew.checkpoint import huggingface as weights
from anew.config.schema import Config
from anew.distributed import fsdp as sharded
from anew.distributed.gradient_buckets import GradientBuckets, gradient_groups
from anew.distributed.world import ALONE, World, whole
from anew.errors import UserError
from anew.model.gpt import GPT
from anew.optim import build as optim
from anew.tokenizer.bpe import Tokenizer
from anew.training.outlier_detector import Spikes
from anew.utils.device import Runtime
from anew.utils.files import read_json, write_json

FORMAT = 2  # of trainer.json; format 1 also listed sequences that were passed over


@dataclass(frozen=True)
class Snapshot:
    """A state at one moment, copied to this machine's memory: what a checkpoint is written from."""

    step: int
    tensors: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    trainer: dict[str, Any]

    def write(self, folder: Path, config: Config, tokenizer: Tokenizer) -> None:
        """Fill the folder of a checkpoint."""
        weights.write_model(folder, self.tensors, config.model, tokenizer)
        weights.write_tensors(folder / "optimizer.safetensors", self.moments)
        write_json(folder / "trainer.json", self.trainer, FORMAT)


@dataclass
class State:
    """What changes from step to step. All ranks have the same."""

    config: Config
    rt: Runtime
    data_revision: str
    world: World = ALONE
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    spikes: Spikes = field(default_factory=Spikes)

    def __post_init__(self) -> None:
        self.model = GPT(self.config.model, self.rt.dtype, self.config.run.seed).to(self.rt.device)
        self.is_sharded = self.config.run.parallel == "fsdp" and self.world.size > 1
        if self.is_sharded:
            sharded.shard(self.model, self.rt.dtype)
        self.loaded: dict[str, Tensor] = {}  # what was read and not yet put in place
        self.optimizers = optim.build(self.model, self.config.optim, self.world)
        self.scaler = torch.amp.GradScaler(self.rt.device.type, enabled=self.rt.precision == "fp16")
        self.buckets: GradientBuckets | None = None
        if self.world.size > 1 and not self.is_sharded:
            self.buckets = GradientBuckets(gradient_groups(self.model), self.world)

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """Every parameter, in one order."""
        return list(self.model.parameters())

    def prepare_backward(self, is_last: bool, may_be_interrupted: bool) -> None:
        """Arrange what the next backward pass exchanges with other ranks: nothing, unless it is the last of the step.

        A pass that a signal may interrupt starts no exchange, so that all ranks start the same ones.
        """
        if self.is_sharded:
            sharded.reduce_gradients(self.model, is_last)
        elif self.buckets is not None and is_last and not may_be_interrupted:
            self.buckets.start_when_ready()

    def clock(self) -> dict[str, float]:
        """What every row of metrics.jsonl starts with."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 4)}

    def advance(self, seconds: float) -> None:
        """Count one step done."""
        tokens = self.config.batch_sequences * self.config.data.seq_len
        self.step, self.tokens, self.seconds = (
            self.step + 1,
            self.tokens + tokens,
            self.seconds + seconds,
        )

    def begin(self, run: Path) -> list[str]:
        """Read the newest good checkpoint of `run`, or --init, or nothing; lines that say which. On rank 0, then `share`."""
        said = [f"removed the leftover of a killed save: {name}" for name in checkpoint.clean(run)]
        folder, skipped = checkpoint.newest(run)
        if folder is not None:
            self.restore(folder)
            return [*said, *(f"skipped: {line}" for line in skipped), f"resumed from {folder.name}"]
        if skipped:
            raise UserError(
                f"run {run} has no checkpoint that is whole: {skipped[0]} Delete the run folder to start anew."
            )
        if self.config.run.init:
            folder = weights.find(self.config.run.init)
            self.loaded = self._weights(folder)
            said.append(f"weights from {folder}")
        return said

    def restore(self, folder: Path) -> None:
        """Read weights, optimizer and counters of a verified checkpoint folder; `share` puts them in place."""
        self.loaded = self._weights(folder)
        try:
            stored = load_file(folder / "optimizer.safetensors")
            trainer, _ = read_json(folder / "trainer.json", FORMAT)
            if trainer.get("excluded"):
                raise UserError(
                    f"{folder} belongs to a run that went back after a spike (spikes=rollback, removed); continue it with anew 0.1."
                )
            revision = trainer["data_revision"]
            self._take(trainer)
        except UserError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is a model, but no checkpoint that training can resume from ({error})."
            ) from error
        if revision != self.data_revision:
            raise UserError(
                f"the text in {self.config.data.data} is no longer the one that {folder.parent.parent} was trained on; use another --out."
            )
        for name, tensor in stored.items():
            missing = (
                self.config.model.padded_vocab_size - tensor.size(0)
                if tensor.ndim and name.endswith(weights.WTE)
                else 0
            )
            self.loaded[name] = (
                nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor
            )  # padding rows have no state: zeros

    def _weights(self, folder: Path) -> dict[str, Tensor]:
        """Every weight at `folder`, checked, with padding rows."""
        model = GPT(self.config.model, seed=None)
        weights.load_into(model, weights.read_tensors(folder), folder)
        return {name: p.detach() for name, p in model.named_parameters()}

    def share(self) -> None:
        """Put what rank 0 has read in place on every rank: only its machine needs the run folder."""
        kinds = [(name, value.dtype, value.ndim) for name, value in self.loaded.items()]
        trainer, kinds = self.world.gather((self._trainer(), kinds))[0]
        self._take(trainer)
        for name, dtype, ndim in kinds:
            sharded.fill(self._slot(name, dtype, ndim), self.loaded.get(name), self.world)
        self.loaded = {}

    def snapshot(self) -> Snapshot | None:
        """A copy of all that a checkpoint holds, on rank 0; None on the others, which take part where weights are sharded."""
        tensors: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for kind, named in ((tensors, self.model.named_parameters()), (moments, self._moments())):
            for name, value in named:
                full = whole(value)
                if self.world.rank == 0:
                    kind[name] = weights.unpadded(name, full, self.config.model, copy=True)
        return (
            Snapshot(self.step, tensors, moments, self._trainer()) if self.world.rank == 0 else None
        )

    def _moments(self) -> list[tuple[str, Tensor]]:
        """The optimizers' state by its name in a checkpoint."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return [
            (f"{key}.{names[p]}", value) for o in self.optimizers for p, entries in o.state.items() for key, value in entries.items()
        ]  # fmt: skip

    def _slot(self, name: str, dtype: torch.dtype, ndim: int) -> Tensor:
        """The tensor that holds this weight or piece of an optimizer's state, made if it is not there yet."""
        parameters = dict(self.model.named_parameters())
        if name in parameters:
            return parameters[name].detach()
        key, parameter = name.split(".", 1)
        p = parameters[parameter]
        [owner] = [
            o for o in self.optimizers for g in o.param_groups if any(q is p for q in g["params"])
        ]
        if key not in owner.state[p]:
            owner.state[p][key] = (
                torch.zeros_like(p) if ndim else torch.zeros((), dtype=dtype, device=p.device)
            )
        return owner.state[p][key]

    def _trainer(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data_revision": self.data_revision,
            "scaler": self.scaler.state_dict(),
            "spikes": dataclasses.asdict(self.spikes),
        }

    def _take(self, trainer: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = (
            trainer["step"],
            trainer["tokens"],
            trainer["seconds"],
        )
        self.spikes = Spikes(**trainer.get("spikes", {}))
        if trainer["scaler"]:
            self.scaler.load_state_dict(trainer["scaler"])
