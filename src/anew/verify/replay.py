"""Take the last steps of a run again, and compare them with what the run recorded.

    check_replay(run, checkpoint)

The checkpoint before the verified one is restored in a temporary copy of the run, and the product's
own training loop continues from there. On the hardware and software of the run, losses, gradient
norms, weights and optimizer state must be equal bit for bit. Elsewhere they must be close, and the
result says why only that can be expected. The run folder is not changed.
"""

import contextlib
import logging
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from anew.checkpoint.folder import list_checkpoints, step_of
from anew.checkpoint.huggingface import find_model
from anew.config.config import Config
from anew.data.dataloader import DataLoader
from anew.data.dataset import is_at_hand, open_data
from anew.errors import Diverged, Preempted, UserError
from anew.model.flops import flops_per_token
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.files import TOKENIZER_JSON
from anew.training.micro_batch import is_out_of_memory
from anew.training.run_log import Row, finite_or_none, read_metrics, read_run_state
from anew.training.setup import joined_ranks, start_run
from anew.training.train_state import Snapshot
from anew.training.trainer import training_loop
from anew.utils import device
from anew.utils.files import link_or_copy, parse_json, write_atomic
from anew.utils.signals import StopFlag
from anew.verify.result import Check, failed, not_run, passed
from anew.verify.run import copy_checkpoint, tensor_difference

log = logging.getLogger("anew")

NAME = "replay"
SECONDS = 30.0  # all steps up to the verified checkpoint are taken if they take less
FEWEST_STEPS = 2  # the loss of the second step depends on the optimizer's state
MOST_SECONDS = 120.0  # a replay that is expected to take longer is not begun
EXPECTED_MFU = 0.2  # on a machine on which the run has not been timed
# What the bits of a result depend on; keys of the environment in run_state.json.
HARDWARE_AND_SOFTWARE = ("device", "processor", "precision", "compiled", "torch", "cuda", "ranks")
# Allowed elsewhere, relative to the recorded loss. Rounding differs from machine to machine, most
# of all in bf16, and the differences grow from step to step. The state is not compared there: after
# ten steps of Muon in bf16 with another number of ranks, a bias differed by a tenth of its norm.
LOSS_TOLERANCE = 0.01
COMPARED = ("train/loss", "train/grad_norm", "train/lr")
COMPARED_ELSEWHERE = ("train/loss",)


@dataclass(frozen=True)
class Replay:
    """The steps of a run that are taken again."""

    run: Path
    checkpoint: Path  # the one that is verified
    start: Path | None  # the checkpoint that is restored; None: the beginning of the run
    last: int  # the last step that is taken
    config: Config
    difference: str  # why equal bits cannot be expected here; empty if they can

    @property
    def first(self) -> int:
        """The number of steps that were taken before."""
        return step_of(self.start) if self.start else 0

    @property
    def reaches_checkpoint(self) -> bool:
        """Whether the state at the end is that of the verified checkpoint."""
        return self.last == step_of(self.checkpoint)


class Reached(Exception):
    """The last step of a replay is done."""


def check_replay(run: Path, checkpoint: Path) -> Check:
    """Take the last steps before `checkpoint` again, and compare them with the run."""
    began = time.perf_counter()
    try:
        replay = plan_replay(run, checkpoint)
    except (UserError, OSError, ValueError, KeyError) as error:
        return not_run(NAME, error)
    try:
        rows, snapshot = take_steps(replay)
        problem = compare(replay, rows, snapshot, exact=True)
        is_equal = not problem
        if problem and replay.difference:
            problem = compare(replay, rows, snapshot, exact=False)
    except Preempted:
        raise KeyboardInterrupt from None
    except (UserError, Diverged, FileNotFoundError, SafetensorError) as error:
        return failed(NAME, error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return not_run(NAME, "there is not enough memory for a training step")
    if problem:
        return failed(NAME, problem)
    seconds = time.perf_counter() - began
    return passed(NAME, description(replay, is_equal, seconds))


def description(replay: Replay, is_equal: bool, seconds: float) -> str:
    """Return what a replay that took `seconds` has shown."""
    steps = f"steps {replay.first + 1:,} to {replay.last:,}"
    if is_equal:
        what = "losses and state" if replay.reaches_checkpoint else "losses"
        return f"{steps}: {what} equal bit for bit ({seconds:.0f} s)"
    return (
        f"{steps}: losses equal to {LOSS_TOLERANCE:.0%} ({seconds:.0f} s); equal bits cannot be "
        f"expected: {replay.difference}"
    )


# Before the steps


def plan_replay(run: Path, checkpoint: Path) -> Replay:
    """Return which steps are taken again and how. Raises UserError if they cannot be taken here."""
    recorded = Config.read(run / "config.json").override(out=str(run))
    environment = read_run_state(run).get("environment", {})
    end = step_of(checkpoint)
    earlier = [folder for folder in list_checkpoints(run) if step_of(folder) < end]
    start = earlier[-1] if earlier else None
    first = step_of(start) if start else 0
    refuse_other_data(recorded, checkpoint, first)
    if start is None and recorded.run.init:
        find_model(recorded.run.init)
    config = replay_config(recorded, environment)
    runtime = device.set_up_device(config.run)
    here = {**device.environment(runtime), "ranks": 1}
    seconds = seconds_per_step(run, config, runtime, environment, here)
    steps = max(FEWEST_STEPS, int(SECONDS / seconds))
    last = min(end, first + steps)
    if (last - first) * seconds > MOST_SECONDS:
        raise UserError(f"a training step takes about {seconds:,.0f} s here, and two are needed")
    difference = difference_of(run, environment, here, first)
    if not difference and runtime.device.type != "cpu" and not config.run.deterministic:
        difference = f"{runtime.device.type} without --deterministic"
    return Replay(run, checkpoint, start, last, config, difference)


def refuse_other_data(config: Config, checkpoint: Path, first: int) -> None:
    """Raise UserError if the tokens of the next step after `first` are not on this machine."""
    data, wanted = config.data.data, config.data.tokenizer
    chats = config.data.conversations
    if not is_at_hand(data, wanted, chats):
        raise UserError(f"the data {data} is not prepared on this machine")
    learns_vocabulary = wanted.startswith("train:")
    tokenizer = wanted if learns_vocabulary else Tokenizer.find(wanted, config.folder)
    with open_data(data, tokenizer, **config.data.reading) as folder:
        if folder.identity != parse_json(checkpoint / "trainer.json")["data_revision"]:
            raise UserError(f"the text in {data} is no longer the one that was trained on")
        if chats:  # all are on this machine
            return
        shards = folder.splits["train"]
        batches = DataLoader(shards, config.data.seq_len, config.run.seed, recut=config.data.recut)
        sequence = 0 if config.data.one_batch else first * config.batch_sequences
        batches.rows(sequence, config.batch_sequences)


def replay_config(config: Config, environment: dict[str, Any]) -> Config:
    """Return the settings of a run for taking its steps again, and nothing but its steps."""
    try:
        device.pick_device(config.run.device)
        device_name = config.run.device
    except UserError:
        device_name = "auto"
    return config.override(
        device=device_name,
        precision=environment.get("precision", config.run.precision),
        compile="off" if environment.get("compiled") == "no" else config.run.compile,
        evaluate_every=0,
        evaluate_tasks="",
        evaluate_train=False,
        sample_every=0,
        save_every=config.run.steps,
        save_minutes=0.0,
        keep=0,
        profile=0,
        track="none",
    )


def seconds_per_step(
    run: Path,
    config: Config,
    runtime: device.Runtime,
    environment: dict[str, Any],
    here: dict[str, Any],
) -> float:
    """Return about how long a step takes in this process."""
    if environment.get("device") == here["device"]:
        key = "speed/ms_per_step"
        times = [row[key] for row in read_metrics(run) if row.get(key) is not None]
        if times:
            return statistics.median(times) / 1e3 * int(environment.get("ranks", 1))
    peak, _ = device.peak_flops(runtime)
    flops = flops_per_token(config.model, config.data.seq_len) * config.run.batch_tokens
    return flops / (EXPECTED_MFU * peak)


def difference_of(run: Path, environment: dict[str, Any], here: dict[str, Any], first: int) -> str:
    """Return how this machine differs from the one that took the steps after `first`."""
    for key in HARDWARE_AND_SOFTWARE:
        if key not in environment:
            return f"the run did not record its {key}"
        if environment[key] != here[key]:
            return f"{key} {environment[key]} in the run, {here[key]} here"
    if first < last_resumed_step(run):
        return "these steps were taken before the run was resumed, perhaps elsewhere"
    return ""


def last_resumed_step(run: Path) -> int:
    """Return the step from which a run was resumed last; 0 if it never was."""
    path = run / "log.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.findall(r" INFO resumed from step-(\d+)$", text, re.MULTILINE)
    return int(found[-1]) if found else 0


# The steps


def take_steps(replay: Replay) -> tuple[list[Row], Snapshot]:
    """Train a copy of the run up to the last step; return its rows and its state."""
    rows: list[Row] = []

    def add_row(row: Row) -> None:
        rows.append(row)
        if row["step"] == replay.last:
            raise Reached

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(only_errors_logged())
        config = copy_run(replay, Path(folder))
        stop = StopFlag()
        stack.callback(stop.restore)
        world = stack.enter_context(joined_ranks(config))
        run = start_run(config, world, stop, stack)
        assert run.state.step == replay.first, "the copy has no other checkpoint"
        with contextlib.suppress(Reached):
            training_loop(run, stop, lambda: None, add_row)
        snapshot = run.state.snapshot()
    assert snapshot is not None, "there is one rank"
    return rows, snapshot


def copy_run(replay: Replay, folder: Path) -> Config:
    """Copy what the run needs to continue into `folder`; return the settings of the copy."""
    config = replay.config.override(out=str(folder))
    write_atomic(folder / "config.json", config.to_json())
    if (replay.run / TOKENIZER_JSON).is_file():
        link_or_copy(replay.run / TOKENIZER_JSON, folder / TOKENIZER_JSON)
    if replay.start is not None:
        copy_checkpoint(replay.start, folder)
    return config


@contextlib.contextmanager
def only_errors_logged() -> Iterator[None]:
    """Keep the log of the repeated steps off the console."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# After the steps


def compare(replay: Replay, rows: list[Row], snapshot: Snapshot, exact: bool) -> str:
    """Return how the repeated steps differ from those of the run; empty if they do not.

    If not `exact`, only losses are compared, and they may differ by the tolerance above.
    """
    recorded = {row["step"]: row for row in read_metrics(replay.run)}
    for row in rows:
        problem = row_difference(recorded.get(row["step"], {}), row, exact)
        if problem:
            return problem
    if not exact or not replay.reaches_checkpoint:
        return ""
    files = {
        "model.safetensors": dict(snapshot.weights),
        "optimizer.safetensors": dict(snapshot.optimizer),
    }
    for name, repeated in files.items():
        stored = load_file(replay.checkpoint / name)
        problem = tensor_difference(stored, repeated)
        if problem:
            return f"{name} of {replay.checkpoint.name} is not what the steps give: {problem}."
    return ""


def row_difference(recorded: Row, repeated: Row, exact: bool) -> str:
    """Return how a repeated step differs from the recorded one; empty if it does not.

    metrics.jsonl has every digit of a value, so equal values there are equal bits.
    """
    allowed = 0.0 if exact else LOSS_TOLERANCE
    for key in COMPARED if exact else COMPARED_ELSEWHERE:
        theirs: float | None = recorded.get(key)
        ours: float | None = finite_or_none(repeated[key])
        if theirs == ours:
            continue
        if theirs is not None and ours is not None and abs(theirs - ours) <= allowed * abs(theirs):
            continue
        name = key.removeprefix("train/").replace("_", " ")
        step = repeated["step"]
        return f"step {step:,} has {name} {theirs} in metrics.jsonl, and {ours} when repeated."
    return ""
