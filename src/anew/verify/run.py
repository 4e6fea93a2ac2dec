"""Checks of a run folder: manifests, file formats, metrics, and restoring its state."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anew.checkpoint.folder import MANIFEST, MANIFEST_VERSION, checkpoint_folder, step_of, verify
from anew.checkpoint.huggingface import read_config
from anew.config.config import FORMAT as CONFIG_FORMAT
from anew.config.config import Config
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.training import train_state
from anew.training.run_log import RUN_STATE_FORMAT, read_metrics
from anew.training.train_state import TrainState
from anew.utils.device import Runtime
from anew.utils.files import link_or_copy, parse_json, read_json
from anew.verify.result import Check, failed, passed

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


def check_manifests(checkpoints: list[Path]) -> Check:
    """Compare every file of these checkpoints with the size and SHA-256 in its manifest."""
    name = "manifest"
    files = 0
    problems = []
    for folder in checkpoints:
        try:
            verify(folder)
            files += len(parse_json(folder / MANIFEST)["files"])
        except UserError as error:
            problems.append(str(error))
    if problems:
        return failed(name, " ".join(problems))
    plural = "s" * (len(checkpoints) > 1)
    return passed(
        name, f"{files} files of {len(checkpoints)} checkpoint{plural} have their SHA-256"
    )


def check_formats(run: Path, checkpoint: Path) -> Check:
    """Check that this version reads every JSON file, and that the run describes this model."""
    name = "formats"
    try:
        config = Config.read(run / "config.json")
        _, config_format = read_json(run / "config.json", CONFIG_FORMAT)
        _, trainer_format = read_json(checkpoint / "trainer.json", train_state.FORMAT)
        if (run / "run_state.json").is_file():
            read_json(run / "run_state.json", RUN_STATE_FORMAT)
        version = parse_json(checkpoint / MANIFEST)["version"]
        if version != MANIFEST_VERSION:
            raise UserError(
                f"{checkpoint / MANIFEST} has version {version}, and this version of anew reads "
                f"version {MANIFEST_VERSION}."
            )
        model = read_config(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return failed(name, error)
    for setting in SHAPE:
        theirs, ours = getattr(model, setting), getattr(config.model, setting)
        if theirs != ours:
            return failed(
                name,
                f"{setting} is {theirs} in the checkpoint and {ours} in the run's settings.",
            )
    return passed(
        name, f"config.json {config_format}, trainer.json {trainer_format}, manifest {version}"
    )


def check_metrics(run: Path, step: int) -> Check:
    """Check that metrics.jsonl has every step up to `step`, with the tokens read until then."""
    name = "metrics"
    try:
        config = Config.read(run / "config.json")
        rows = {row["step"]: row for row in read_metrics(run) if "train/loss" in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return failed(name, error)
    batch_tokens = config.batch_sequences * config.data.seq_len
    for number in range(1, step + 1):
        if number not in rows:
            return failed(name, f"metrics.jsonl has no loss of step {number:,}.")
        tokens = rows[number].get("tokens")
        if tokens != number * batch_tokens and not config.data.conversations:
            return failed(
                name, f"step {number:,} has {tokens} tokens instead of {number * batch_tokens}."
            )
    most = "at most " if config.data.conversations else ""
    return passed(name, f"a loss for each of {step:,} steps of {most}{batch_tokens:,} tokens")


def check_state(run: Path, checkpoint: Path) -> Check:
    """Restore the whole training state from a copy, save it, and compare every file."""
    name = "reload"
    try:
        config = Config.read(run / "config.json")
        trainer = parse_json(checkpoint / "trainer.json")
        precision = "fp16" if trainer["scaler"] else "fp32"
        runtime = Runtime(torch.device("cpu"), precision, compile=False, reasons=())
        tokenizer = Tokenizer.of_model(checkpoint, config.model.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            copy, saved = Path(folder) / "run", Path(folder) / "saved"
            copy_checkpoint(checkpoint, copy)
            saved.mkdir()
            state = TrainState(config, runtime, trainer["data_revision"])
            state.load(copy)
            snapshot = state.snapshot()
            assert snapshot is not None, "there is one rank"
            snapshot.write(saved, config, tokenizer)
            problem = _first_difference(checkpoint, saved)
            count = sum(1 for _ in saved.iterdir())
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return failed(name, error)
    if problem:
        return failed(name, problem)
    return passed(name, f"weights, optimizer and counters: {count} files as before")


def copy_checkpoint(checkpoint: Path, run: Path) -> Path:
    """Copy a checkpoint into the run folder `run`, with links instead of copies where possible."""
    folder = checkpoint_folder(run, step_of(checkpoint))
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        link_or_copy(file, folder / file.name)
    return folder


def _first_difference(before: Path, after: Path) -> str:
    """Return how the files of a checkpoint differ from those saved again; empty if they do not.

    Another version of anew may have written the same content with other bytes.
    """
    for file in sorted(after.iterdir()):
        earlier = before / file.name
        if not earlier.is_file():
            return f"{file.name} is missing."
        if earlier.read_bytes() == file.read_bytes():
            continue
        if file.suffix == ".safetensors":
            problem = tensor_difference(load_file(earlier), load_file(file))
            if problem:
                return f"{file.name} changes when it is loaded and saved: {problem}."
        elif file.name == "trainer.json" and _counters(earlier) != _counters(file):
            return f"{file.name} changes when it is loaded and saved."
    return ""


def _counters(path: Path) -> dict[str, Any]:
    """Return the counters in a trainer.json of any format."""
    content, _ = read_json(path, train_state.FORMAT)
    return {key: content.get(key) for key in ("step", "tokens", "seconds", "data_revision")}


def tensor_difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
    """Return how two sets of tensors differ; empty if every bit is equal."""
    for name in sorted(before.keys() ^ after.keys()):
        return f"only one of them has {name}"
    for name, tensor in before.items():
        other = after[name]
        if tensor.shape != other.shape:
            return f"{name} has another shape"
        if not torch.equal(tensor, other):
            difference = float((tensor.double() - other.double()).norm())
            norm = float(tensor.double().norm())
            return f"{name} differs by {difference:.2g}, and its norm is {norm:.2g}"
    return ""
