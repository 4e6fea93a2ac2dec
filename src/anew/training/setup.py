"""Everything before the first step of a run: ranks, device, data, state and log files.

    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined_ranks(config))
        run = start_run(config, world, stop, stack)    # what it opens is closed by `stack`

Problems are reported here, in one sentence and on one rank, before time is spent on training.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anew.config.config import Config
from anew.config.values import parse_bytes
from anew.data.conversations import Conversations
from anew.data.dataloader import DataLoader
from anew.data.dataset import is_at_hand, open_data
from anew.data.shards import DataFolder
from anew.distributed.preflight import check_ranks, refuse_shared_gpus
from anew.distributed.rendezvous import joined
from anew.distributed.world import World
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.training.async_checkpoint import CheckpointWriter
from anew.training.micro_batch import choose_micro_batch
from anew.training.run_description import describe_conversations, describe_data, describe_run
from anew.training.run_log import RunLog
from anew.training.run_settings import resolve_config
from anew.training.silent_errors import refuse_inexact_devices
from anew.training.slow_ranks import SlowRanks, names_of_ranks
from anew.training.train_state import TrainState
from anew.training.validation import Validation
from anew.utils import device
from anew.utils.files import write_atomic
from anew.utils.signals import StopFlag
from anew.utils.words import counted

log = logging.getLogger("anew")


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step."""

    config: Config
    state: TrainState
    data: DataFolder
    batches: DataLoader | Conversations
    validation: Validation
    log: RunLog
    checkpoints: CheckpointWriter
    slow_ranks: SlowRanks
    loss_of: Callable[[Tensor, Tensor], Tensor]  # the model, compiled or not
    peak_flops: float  # of all ranks together


def joined_ranks(config: Config) -> contextlib.AbstractContextManager[World]:
    """Return the context in which the ranks of a run exchange values."""
    device_type = device.pick_device(config.run.device).type
    device.before_process_group(config.run)
    return joined(device_type, config.run.timeout_seconds)


def start_run(config: Config, world: World, stop: StopFlag, stack: contextlib.ExitStack) -> Run:
    """Begin or resume the run that `config` describes."""
    is_first = world.rank == 0
    if not is_first:
        log.setLevel(logging.ERROR)  # only rank 0 logs below ERROR
    config = world.run_on_all_ranks(lambda: resolve_config(config), first=lambda w: w.rank == 0)
    runtime = world.run_on_all_ranks(lambda: device.set_up_device(config.run))
    refuse_shared_gpus(world, runtime.device)
    config.micro_batches(world.size)  # raises UserError if the batch cannot be divided evenly

    world.run_on_all_ranks(lambda: lock_run_folder(config.folder, stack) if is_first else None)
    data = open_training_data(config, world, stop, stack)
    tokenizer = Tokenizer.find(data.tokenizer, data.path)
    batches = training_sequences(config, data, tokenizer, stop)
    general = open_general_data(config, tokenizer, world, stack)
    state = TrainState(config, runtime, data.identity, world)
    if config.run.check_every:
        refuse_inexact_devices(state)
    messages = state.load(config.folder)
    if state.step >= config.run.steps:
        messages.append(f"the run is complete: it has taken all {counted(state.step, 'step')}")
    micro_batch_found: dict[str, Any] = {}
    if config.run.micro_batch == "auto":
        micro_batch_found, reason = choose_micro_batch(state)
        messages.append(reason)
        config = config.override(micro_batch=micro_batch_found["micro_batch"])
        state.config = config

    run_log = stack.enter_context(RunLog(config.folder, config, state.step, writes=is_first))
    if micro_batch_found:
        run_log.run_state.update(micro_batch_found=micro_batch_found)
    checkpoints = CheckpointWriter(
        config.folder, config, tokenizer, run_log.run_state, resumed_step=state.step
    )
    stack.callback(checkpoints.join)
    if is_first:
        write_atomic(config.folder / "config.json", config.to_json())
    peak_flops, peak_source = device.peak_flops(runtime) if is_first else (1.0, "")
    if world.size > 1:
        messages.append(compare_ranks(config, state))
    if batches.wait_for_shards:
        messages.append(
            "the data is still being prepared; tokens and epochs above are those so far"
        )
    log_start(config, state, data, batches, peak_source, messages)
    run_log.run_state.update(environment=device.environment(runtime) | {"ranks": world.size})
    validation = Validation(config, state, run_log, checkpoints, data, general, tokenizer, stop)
    return Run(
        config=config,
        state=state,
        data=data,
        batches=batches,
        validation=validation,
        log=run_log,
        checkpoints=checkpoints,
        slow_ranks=SlowRanks(names_of_ranks(world, runtime.device)),
        loss_of=training_loss(state),
        peak_flops=peak_flops * world.size,
    )


def lock_run_folder(run: Path, stack: contextlib.ExitStack) -> None:
    """Let only this process write to the run folder, until it ends."""
    from filelock import FileLock, Timeout

    lock = run / ".lock"
    run.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(lock, timeout=0))
    except Timeout as error:
        raise UserError(
            f"another process is training in {run}; wait until it ends, or use another --out."
        ) from error
    stack.callback(remove_if_unused, run, lock)


def remove_if_unused(run: Path, lock: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything but its lock."""
    if list(run.iterdir()) == [lock]:
        lock.unlink()
        run.rmdir()


def open_training_data(
    config: Config, world: World, stop: StopFlag, stack: contextlib.ExitStack
) -> DataFolder:
    """Open the data, which one rank of each machine prepares if necessary."""
    wanted = config.data.tokenizer
    learns_vocabulary = wanted.startswith("train:")
    is_local_first = world.local_rank == 0

    def open_here() -> DataFolder:
        tokenizer = wanted if learns_vocabulary else Tokenizer.find(wanted, config.folder)
        budget = parse_bytes(config.data.disk_budget)
        return open_data(
            config.data.data,
            tokenizer,
            budget,
            stop,
            prepares=is_local_first,
            model=config.run.init,
            **config.data.reading,
        )

    data = world.run_on_all_ranks(open_here, first=lambda w: w.local_rank == 0)
    return stack.enter_context(data)


def training_sequences(
    config: Config, data: DataFolder, tokenizer: Tokenizer, stop: StopFlag
) -> DataLoader | Conversations:
    """Return the numbered training sequences of a run."""
    seq_len = config.data.seq_len
    seed = config.run.seed
    shards = data.splits["train"]
    if config.data.conversations:
        conversations = Conversations(shards, tokenizer, seq_len, seed)
        if conversations.epoch_sequences == 0:
            raise UserError(
                f"no conversation in {config.data.data} has an answer within its first {seq_len} "
                "tokens; raise --seq-len or give other conversations."
            )
        return conversations
    return DataLoader(shards, seq_len, seed, data.shard_waiter(stop), config.data.recut)


def open_general_data(
    config: Config, tokenizer: Tokenizer, world: World, stack: contextlib.ExitStack
) -> DataFolder | None:
    """Open the text of --general-data, which one rank of each machine prepares if necessary."""
    name = config.data.general_data
    if not name:
        return None

    def open_here() -> DataFolder:
        if not is_at_hand(name, tokenizer.name):
            raise UserError(f"--general-data {name} is not prepared; use anew prepare first.")
        folder = open_data(name, tokenizer, model=config.run.init)
        if folder.n_tokens("val") < 2:
            raise UserError(f"--general-data {name} has no validation text.")
        return folder

    return stack.enter_context(world.run_on_all_ranks(open_here, first=lambda w: w.local_rank == 0))


def training_loss(state: TrainState) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (ids, targets) -> mean loss: the model, compiled if the run compiles.

    A single process compiles the whole model as one graph. The gradients of such a graph all become
    ready at the end of the backward pass, so several ranks could exchange nothing during it. With
    several ranks each block is compiled by itself (all share one graph), and so is the loss.
    """
    model = state.model
    if state.config.data.conversations:  # they are never compiled
        return partial(model, few_targets=True)
    if not state.runtime.compile:
        return model
    if state.world.size == 1 and state.config.run.compile != "blocks":
        return torch.compile(model, dynamic=False)
    for block in model.transformer.h:
        block.compile(dynamic=False)
    model.head_loss = torch.compile(model.head_loss, dynamic=False)
    return model


def compare_ranks(config: Config, state: TrainState) -> str:
    """Refuse ranks that differ in settings, software or data; return a line about their link."""
    facts = {
        "settings": config.to_json(),
        "torch": torch.__version__,
        "data": state.data_revision,
    }
    gradient_bytes = 4 * sum(parameter.numel() for parameter in state.parameters)
    return check_ranks(state.world, state.runtime.device, facts, gradient_bytes)


def log_start(
    config: Config,
    state: TrainState,
    data: DataFolder,
    batches: DataLoader | Conversations,
    peak_source: str,
    messages: list[str],
) -> None:
    """Log what the run is about to do."""
    train_tokens = data.n_tokens("train")
    val_tokens = data.n_tokens("val")
    if isinstance(batches, Conversations):
        described = describe_conversations(config, batches)
    else:
        described = describe_data(
            config, train_tokens, val_tokens, batches.epoch_sequences, batches.dropped_tokens
        )
    lines = [
        f"run:   recipe {config.recipe} in {config.folder}",
        *state.runtime.reasons,
        *describe_run(config, state.world.size),
        *described,
        f"MFU is measured against {peak_source}",
        *messages,
    ]
    for line in lines:
        log.info(line)
