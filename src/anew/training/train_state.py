"""What changes from step to step: weights, optimizer state and counters.

A checkpoint holds exactly this.

A checkpoint folder is a Hugging Face model folder with two more files:

- optimizer.safetensors has the optimizer state by parameter name, such as
  "exp_avg.transformer.wte.weight". Tensors are whole, whatever the device, the parameter groups or
  the number of ranks.
- trainer.json has the counters, the loss scale and the statistics of the outlier detector.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from anew.checkpoint import folder as checkpoint
from anew.checkpoint import huggingface
from anew.config.config import Config
from anew.distributed import fsdp
from anew.distributed.gradient_buckets import GradientBuckets, gradient_groups
from anew.distributed.world import ALONE, World, full_tensor
from anew.errors import UserError
from anew.model.gpt import GPT
from anew.optim.build import build_optimizers
from anew.tokenizer.bpe import Tokenizer
from anew.training.outlier_detector import OutlierDetector
from anew.training.slow_ranks import RankTimer
from anew.utils.device import Runtime
from anew.utils.files import read_json, write_json

FORMAT = 2  # of trainer.json; format 1 also listed sequences that a rollback had excluded


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state in host memory, from which a checkpoint is written."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    trainer: dict[str, Any]

    def write(self, folder: Path, config: Config, tokenizer: Tokenizer) -> None:
        """Write the files of a checkpoint into `folder`."""
        is_chat = config.data.conversations
        huggingface.write_model(folder, self.weights, config.model, tokenizer, is_chat)
        huggingface.write_tensors(folder / "optimizer.safetensors", self.optimizer)
        write_json(folder / "trainer.json", self.trainer, FORMAT)


@dataclass
class TrainState:
    """The state of a run.

    It is the same on all ranks, except that sharded weights are distributed.
    """

    config: Config
    runtime: Runtime
    data_revision: str
    world: World = ALONE
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    outliers: OutlierDetector = field(default_factory=OutlierDetector)

    def __post_init__(self) -> None:
        device = self.runtime.device
        self.model = GPT(self.config.model, self.runtime.dtype, self.config.run.seed).to(device)
        self.is_sharded = self.config.run.parallel == "fsdp" and self.world.size > 1
        if self.is_sharded:
            fsdp.shard(self.model, self.runtime.dtype)
        self.optimizers = build_optimizers(self.model, self.config.optim, self.world)
        uses_loss_scale = self.runtime.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=uses_loss_scale)
        self.buckets: GradientBuckets | None = None
        if self.world.size > 1 and not self.is_sharded:
            self.buckets = GradientBuckets(gradient_groups(self.model), self.world)
        self.timer = RankTimer(device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, in the order of the model."""
        return list(self.model.parameters())

    def prepare_backward(self, is_last: bool) -> None:
        """Let the next backward pass exchange gradients only if it is the last one of the step."""
        if self.is_sharded:
            fsdp.reduce_gradients(self.model, is_last)
        elif self.buckets is not None and is_last:
            self.buckets.start_when_ready()

    def clock(self) -> dict[str, float]:
        """Return the fields that every row of metrics.jsonl begins with."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 4)}

    def advance(self, seconds: float, n_tokens: int) -> None:
        """Count one step, which read `n_tokens` over all ranks and took `seconds`."""
        self.step += 1
        self.tokens += n_tokens
        self.seconds += seconds

    # Loading

    def load(self, run: Path) -> list[str]:
        """Load the newest valid checkpoint of `run`, or the weights of --init, or nothing.

        Only rank 0 reads files; the other ranks receive the state from it, so every rank must call
        this. Returns lines for the log that say what was loaded.
        """
        tensors: dict[str, Tensor] = {}
        messages: list[str] = []
        if self.world.rank == 0:
            removed = checkpoint.remove_leftovers(run)
            messages += [f"removed an incomplete checkpoint: {name}" for name in removed]
        tensors, found = self.world.run_on_all_ranks(lambda: self._read(run))
        self._receive(tensors)
        return messages + found

    def _read(self, run: Path) -> tuple[dict[str, Tensor], list[str]]:
        """Read what `load` shall load; return its tensors by name, and lines for the log."""
        if self.world.rank != 0:
            return {}, []
        folder, skipped = checkpoint.newest_valid(run)
        if folder is not None:
            messages = [f"skipped: {line}" for line in skipped]
            return self._read_checkpoint(folder), [*messages, f"resumed from {folder.name}"]
        if skipped:
            raise UserError(
                f"run {run} has no valid checkpoint: {skipped[0]} "
                "Delete the run folder to train from the beginning."
            )
        if self.config.run.init:
            folder = huggingface.find_model(self.config.run.init)
            return self._read_weights(folder), [f"weights from {folder}"]
        return {}, []

    def _read_checkpoint(self, folder: Path) -> dict[str, Tensor]:
        """Read a verified checkpoint: take its counters, return weights and optimizer state by
        name.
        """
        tensors = self._read_weights(folder)
        try:
            optimizer = load_file(folder / "optimizer.safetensors")
            trainer, _ = read_json(folder / "trainer.json", FORMAT)
            self._set_trainer(trainer)
            revision = trainer["data_revision"]
        except UserError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is a model, but not a checkpoint that training can resume from "
                f"({error})."
            ) from error
        if trainer.get("excluded"):
            raise UserError(
                f"{folder} belongs to a run with spikes=rollback, which no longer exists; "
                "continue it with anew 0.1."
            )
        if revision != self.data_revision:
            raise UserError(
                f"the text in {self.config.data.data} is not the one that {folder.parent.parent} "
                "was trained on; use another --out."
            )
        for name, tensor in optimizer.items():
            tensors[name] = self._with_padding(name, tensor)
        return tensors

    def _read_weights(self, folder: Path) -> dict[str, Tensor]:
        """Read and check every weight at `folder`; padding rows are added."""
        model = GPT(self.config.model, seed=None)
        huggingface.load_state_dict(model, huggingface.read_tensors(folder), folder)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def _with_padding(self, name: str, tensor: Tensor) -> Tensor:
        """Add the padding rows of `wte` to a tensor of its optimizer state; their state is zero."""
        if tensor.ndim == 0 or not name.endswith(huggingface.WTE):
            return tensor
        missing_rows = self.config.model.padded_vocab_size - tensor.size(0)
        return nn.functional.pad(tensor, (0, 0, 0, missing_rows))

    def _receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the counters and the `tensors` that rank 0 has read to every rank."""
        entries = [(name, value.dtype, value.ndim) for name, value in tensors.items()]
        trainer, entries = self.world.gather((self._trainer(), entries))[0]
        self._set_trainer(trainer)
        for name, dtype, ndim in entries:
            fsdp.fill(self._slot(name, dtype, ndim), tensors.get(name), self.world)

    def _slot(self, name: str, dtype: torch.dtype, ndim: int) -> Tensor:
        """Return the tensor of a weight or of optimizer state, created if needed."""
        parameters = dict(self.model.named_parameters())
        if name in parameters:
            return parameters[name].detach()
        key, parameter_name = name.split(".", 1)
        parameter = parameters[parameter_name]
        state = self._optimizer_of(parameter).state[parameter]
        if key not in state:
            if ndim == 0:
                state[key] = torch.zeros((), dtype=dtype, device=parameter.device)
            else:
                state[key] = torch.zeros_like(parameter)
        return state[key]

    def _optimizer_of(self, parameter: nn.Parameter) -> Optimizer:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(other is parameter for other in group["params"]):
                    return optimizer
        raise AssertionError("every parameter belongs to an optimizer")

    # Saving

    def snapshot(self) -> Snapshot | None:
        """Copy everything that a checkpoint holds to rank 0; None on the other ranks.

        Every rank must call this, because sharded tensors are gathered.
        """
        weights = self._copies(self.model.named_parameters())
        optimizer = self._copies(self.optimizer_state())
        if self.world.rank != 0:
            return None
        return Snapshot(self.step, weights, optimizer, self._trainer())

    def _copies(self, named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy whole tensors without padding rows to the host; nothing on ranks other than 0."""
        copies = {}
        for name, value in named:
            whole = full_tensor(value)
            if self.world.rank == 0:
                copies[name] = huggingface.without_padding(
                    name, whole, self.config.model, copy=True
                )
        return copies

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizers' tensors with their names in a checkpoint."""
        names: dict[Tensor, str] = {
            parameter: name for name, parameter in self.model.named_parameters()
        }
        for optimizer in self.optimizers:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    yield f"{key}.{names[parameter]}", value

    def _trainer(self) -> dict[str, Any]:
        """Return the content of trainer.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data_revision": self.data_revision,
            "scaler": self.scaler.state_dict(),
            "spikes": dataclasses.asdict(self.outliers),
        }

    def _set_trainer(self, trainer: dict[str, Any]) -> None:
        """Take the counters of a trainer.json."""
        self.step = trainer["step"]
        self.tokens = trainer["tokens"]
        self.seconds = trainer["seconds"]
        self.outliers = OutlierDetector(**trainer.get("spikes", {}))
        if trainer["scaler"]:
            self.scaler.load_state_dict(trainer["scaler"])
