"""Everything before the first step: who is here, which run this is, its tokens, its state, and the files it writes to.

    begun = begin(config, stop, stack)      # what is opened is closed by `stack`

Whatever is wrong is said here, on one rank for all, before an hour is lost. Nothing here needs saving, so a signal ends it at once.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anew.checkpoint import huggingface as weights
from anew.config.schema import Config
from anew.config.values import bytes_of, ids_of
from anew.data.dataloader import Batches
from anew.data.dataset import open_data
from anew.data.shards import DataFolder
from anew.distributed.world import World, joined, preflight, refuse_shared_gpus
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.training import run_log as metrics
from anew.training.async_checkpoint import Saver
from anew.training.micro_batch import find_micro_batch
from anew.training.train_state import State
from anew.training.validation import Evaluator
from anew.utils import device as runtime
from anew.utils.files import read_json, write_atomic
from anew.utils.signals import Stop

log = logging.getLogger("anew")


@dataclass(frozen=True)
class Begun:
    """A run that is ready for its next step."""

    config: Config
    state: State
    folder: DataFolder
    batches: Batches
    evaluator: Evaluator
    recorder: metrics.Recorder
    saver: Saver
    loss_of: Any  # the model, compiled or not
    compiled: bool
    peak_flops: float  # of all ranks together


def begin(config: Config, stop: Stop, stack: contextlib.ExitStack) -> Begun:
    """Start or take up the run that `config` describes."""
    device = runtime.pick_device(config.run.device)
    runtime.before_process_group(config.run)
    world = stack.enter_context(joined(device.type, config.run.timeout_seconds))
    if world.rank != 0:
        log.setLevel(logging.ERROR)  # rank 0 writes the log
    config = world.everywhere(lambda: settle(config), first=_is_first)
    rt = world.everywhere(lambda: runtime.start(config.run))
    refuse_shared_gpus(world, rt.device)
    micro, _ = config.micro_batches(world.size)  # refuses what cannot be shared out
    run = config.folder
    world.everywhere(lambda: _own(run, stack) if world.rank == 0 else None)
    folder = world.everywhere(lambda: _open(config, world, stop), first=lambda w: w.local_rank == 0)
    stack.enter_context(folder)
    batches = Batches(
        folder.splits["train"],
        config.data.seq_len,
        config.run.seed,
        folder.more(stop),
        config.data.recut,
    )
    state = State(config, rt, folder.identity, world)
    found = world.everywhere(lambda: state.begin(run) if world.rank == 0 else [])
    state.share()
    micro_batch_found: dict[str, Any] = {}
    if config.run.micro_batch == "auto":
        conditions = micro_batch_conditions(config, rt, world.size)
        earlier = world.gather(earlier_micro_batch(config, conditions))[0]
        if earlier:
            micro, why = earlier, f"micro-batch {earlier}, as this run found it before"
        else:
            micro, why = find_micro_batch(state)
        micro_batch_found = {"micro_batch": micro, **conditions}
        found.append(why)
        config = state.config = config.override(micro_batch=micro)
    tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
    recorder = stack.enter_context(
        metrics.Recorder(run, config, state.step, writes=world.rank == 0)
    )
    if micro_batch_found:
        recorder.run_state.update(micro_batch_found=micro_batch_found)
    saver = Saver(run, config, tokenizer, recorder.run_state, state.step or -1)
    stack.callback(saver.finish)
    if world.rank == 0:
        write_config(run, config)
    peak, peak_source = runtime.peak_flops(rt) if world.rank == 0 else (1.0, "")
    tokens = {split: folder.n_tokens(split) for split in ("train", "val")}
    data_lines = metrics.describe_data(
        config, tokens["train"], tokens["val"], batches.epoch_sequences, batches.dropped
    )
    if world.size > 1:
        facts = {"settings": config.to_json(), "torch": torch.__version__, "data": folder.identity}
        found.append(preflight(world, rt.device, facts, 4 * sum(p.numel() for p in state.params)))
    if batches.more:
        found.append(
            "the data is still being prepared: its tokens and epochs above are those so far"
        )
    for line in [
        *rt.why,
        *metrics.describe(config, world.size),
        *data_lines,
        f"MFU is measured against {peak_source}",
        *found,
    ]:
        log.info(line)
    recorder.run_state.update(environment=runtime.environment(rt) | {"ranks": world.size})
    evaluator = Evaluator(config, state, recorder, saver, folder.splits, tokenizer, micro, stop)
    loss_of = training_loss(state)
    return Begun(
        config,
        state,
        folder,
        batches,
        evaluator,
        recorder,
        saver,
        loss_of,
        rt.compile,
        peak * world.size,
    )


def training_loss(state: State) -> Any:
    """The function of (ids, targets) that returns the mean loss: the model, compiled if the run compiles.

    A single process compiles the whole model as one graph. Its gradients all become ready at the end of the backward pass, so with
    several ranks nothing could be exchanged meanwhile: there each block is compiled by itself (one graph serves all), and the loss.
    """
    if not state.rt.compile:
        return state.model
    if state.world.size == 1 and state.config.run.compile != "blocks":
        return torch.compile(state.model, dynamic=False)
    for block in state.model.transformer.h:
        block.compile(dynamic=False)
    state.model.head_loss = torch.compile(state.model.head_loss, dynamic=False)
    return state.model


def micro_batch_conditions(config: Config, rt: runtime.Runtime, ranks: int) -> dict[str, Any]:
    """What the micro-batch that fits depends on, beside the settings that a run cannot change."""
    here = runtime.environment(rt)
    return {
        "device": here["device"], "precision": here["precision"], "ranks": ranks, "compile": here["compiled"] + config.run.compile,
        "parallel": config.run.parallel, "recompute": config.model.recompute, "attention": config.model.attention,
    }  # fmt: skip


def earlier_micro_batch(config: Config, conditions: dict[str, Any]) -> int:
    """The micro-batch that an earlier start of this run found under the same conditions; 0 if there is none.

    A resumed run is the same bit for bit only at the same micro-batch, and another trial might find another one.
    """
    try:
        found = read_json(config.folder / "run_state.json", metrics.FORMAT)[0]["micro_batch_found"]
        micro_batch = int(found["micro_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    same = all(found.get(name) == value for name, value in conditions.items())
    return (
        micro_batch
        if same and config.batch_sequences % (conditions["ranks"] * micro_batch) == 0
        else 0
    )


def settle(config: Config) -> Config:
    """The config as this run will have it: shape from --init, and no setting that contradicts an existing run."""
    path = config.folder / "config.json"
    existing = Config.read(path) if path.exists() else None
    if config.run.init:
        if existing is not None and existing.run.init == config.run.init:
            shape, tokenizer = existing.model, existing.data.tokenizer
        else:
            model = weights.find(config.run.init)
            shape = weights.read_config(model)
            tokenizer = _kept(Tokenizer.of_model(model, shape.vocab_size), config.folder)
        taken = {
            name: getattr(shape, name)
            for name in (
                "n_layer",
                "n_head",
                "n_embd",
                "n_positions",
                "vocab_size",
                "layer_norm_epsilon",
            )
        }
        if config.data.seq_len > shape.n_positions:
            log.info(
                f"seq_len lowered from {config.data.seq_len} to the {shape.n_positions} positions of {config.run.init}"
            )
        config = config.override(
            **taken, tokenizer=tokenizer, seq_len=min(config.data.seq_len, shape.n_positions)
        )
    elif ids_of(config.data.tokenizer) is None:
        own = Tokenizer.of_folder(Path(config.data.tokenizer))
        config = config.override(tokenizer=_kept(own, config.folder), vocab_size=own.n_vocab)
    config.check()
    if existing is not None and config.data.recut and not existing.data.recut:
        config = config.override(
            recut=False
        )  # the default of runs that began before this setting existed
        log.info(
            "this run keeps the order of windows it began with, the same in every epoch (--no-recut)"
        )
    if existing is not None and (different := existing.differences(config)):
        raise UserError(
            f"{config.folder} is another run ({'; '.join(different)}); use the same settings to go on with it, or another --out."
        )
    return config


def _kept(tokenizer: Tokenizer, run: Path) -> str:
    """Its name; one that is not built in is kept in the run folder, for when the run goes on."""
    tokenizer.keep(run)
    return tokenizer.name


def _is_first(world: World) -> bool:
    return world.rank == 0


def _own(run: Path, stack: contextlib.ExitStack) -> None:
    """This process alone writes to the run folder, until it ends in whatever way."""
    from filelock import FileLock, Timeout

    run.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(run / ".lock", timeout=0))
    except Timeout as error:
        raise UserError(
            f"another process is training in {run}; wait until it ends, or use another --out."
        ) from error


def _open(config: Config, world: World, stop: Stop) -> DataFolder:
    wanted = config.data.tokenizer
    tokenizer = wanted if wanted.startswith("train:") else Tokenizer.find(wanted, config.folder)
    return open_data(
        config.data.data,
        tokenizer,
        bytes_of(config.data.disk_budget),
        stop,
        leads=world.local_rank == 0,
    )


def write_config(run: Path, config: Config) -> None:
    """RUN/config.json, whole."""
    write_atomic(run / "config.json", config.to_json())
