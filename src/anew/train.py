"""Training: one step function above one loop.

    anew train shakespeare --out runs/bard         # start, or go on where runs/bard stopped
    anew.train(anew.recipe("shakespeare"))         # the same from Python

Out comes the run folder: config.json, metrics.jsonl, samples.jsonl, log.txt, tensorboard/ and checkpoints/step-N, each of which is a
Hugging Face folder. The step is the only clock: tokens, learning rate and random numbers are functions of (seed, step), so a run that
was stopped anywhere goes on bit for bit as if it had not been.
"""

import contextlib
import hashlib
import logging
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anew import checkpoint, metrics, optim, runtime, weights
from anew.config import Config, UserError, bytes_of, ids_of
from anew.data.batches import Batches, prefetch
from anew.data.open import Stopped, open_data, remove_used
from anew.data.shards import DataFolder
from anew.evaluate.during import Evaluator
from anew.state import State
from anew.tokenizer import Tokenizer

log = logging.getLogger("anew")

MicroBatch = tuple[Tensor, Tensor]


class Preempted(Exception):
    """The process was asked to stop, and has saved its last whole step (exit code 75)."""


@dataclass(frozen=True)
class Result:
    """Where a run ended. Losses in nats a token, scored in fp32; None where there was nothing to score."""

    folder: Path
    step: int
    tokens: int
    seconds: float
    train_loss: float
    val_loss: float | None
    train_text_loss: float | None = None


def train_step(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    params: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    micro_batches: Sequence[MicroBatch],
    scaler: torch.amp.GradScaler,
    seeds: Sequence[int],
    clip: float,
    rate: float,
    stop: threading.Event,
) -> tuple[Tensor, Tensor] | None:
    """One optimizer step over `micro_batches` of (ids, targets): the mean loss and the gradient norm before clipping.

    A step whose loss or gradient is not finite leaves weights and optimizer state as they are. None if `stop` was set on the way:
    then nothing has changed at all.
    """
    total = torch.zeros((), device=micro_batches[0][0].device)
    for (ids, targets), seed in zip(micro_batches, seeds, strict=True):
        if stop.is_set():
            _drop_gradients(optimizers)
            return None
        torch.manual_seed(seed)
        loss = loss_of(ids, targets) / len(micro_batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(params, clip)
    optim.set_rate(optimizers, rate)
    bad = (~(norm + total).isfinite()).float()
    host_must_look = scaler.is_enabled() or bad.device.type == "mps"  # there optimizers do not all honour found_inf
    if not (host_must_look and bad.item()):
        for optimizer in optimizers:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            scaler.step(optimizer)
    scaler.update()
    _drop_gradients(optimizers)
    return total, norm


def _drop_gradients(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def train(config: Config, progress: Callable[[metrics.Row], None] | None = None) -> Result:
    """Run `config` to its last step, from where its run folder stopped. `progress` is called with each step's row.

    Raises UserError for what the user can put right, Preempted after SIGTERM or Ctrl-C and a save.
    """
    config = settle(config)
    run, rt = config.folder, runtime.start(config.run)
    wanted = config.data.tokenizer
    folder = open_data(
        config.data.data, wanted if wanted.startswith("train:") else Tokenizer.find(wanted, run), bytes_of(config.data.disk_budget)
    )
    tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
    batches = Batches(folder.splits["train"], config.data.seq_len, config.run.seed)
    state = State(config, rt, folder.identity)
    found = state.begin(run)
    with folder, _handled_signals() as stop, metrics.Recorder(run, config, state.step) as recorder:
        batches.more = folder.more(stop)
        _write_config(run, config)
        peak, peak_source = runtime.peak_flops(rt)
        plan = metrics.describe(
            config, rt.world, folder.n_tokens("train"), folder.n_tokens("val"), batches.epoch_sequences, batches.dropped
        )
        if batches.more:
            found.append("the data is still being prepared: its tokens and epochs above are those so far")
        for line in [*rt.why, *plan, f"MFU is measured against {peak_source}", *found]:
            log.info(line)
        loss_of = torch.compile(state.model, dynamic=False) if rt.compile else state.model
        micro, accumulation = config.micro_batches(rt.world)
        params = list(state.model.parameters())
        evaluator = Evaluator(config, state, recorder, folder.splits, tokenizer, micro)
        began = time.perf_counter()
        for step, micro_batches in _batches(config, batches, rt, range(state.step, config.run.steps)):
            if stop.is_set():
                break
            began += evaluator.due(step)
            seeds = [_seed(config.run.seed, step, i, rt.rank) for i in range(accumulation)]
            rate = optim.rate(step, config.run.steps, config.optim)
            outcome = train_step(loss_of, params, state.optimizers, micro_batches, state.scaler, seeds, config.optim.clip, rate, stop)
            if outcome is None:
                break
            loss, norm = (x.item() for x in outcome)
            seconds = time.perf_counter() - began
            state.advance(config.run.batch_tokens, seconds)
            row = metrics.step_row(state.clock(), loss, norm, rate * config.optim.lr, seconds, config, peak * rt.world)
            recorder.step(row)
            if progress:
                progress(row)
            if state.step % config.run.save_every == 0 or state.step == config.run.steps:
                state.save(run, tokenizer)
                _remove_used_shards(config, folder, batches)
            began = time.perf_counter()
        if stop.is_set():
            state.save(run, tokenizer)
            raise Preempted(f"stopped at step {state.step:,} of {config.run.steps:,}; the same command goes on from there.")
        val_loss, text_loss = evaluator.finish()
        return Result(run, state.step, state.tokens, state.seconds, metrics.last_loss(run), val_loss, text_loss)


def settle(config: Config) -> Config:
    """The config as this run will have it: shape from --init, and no setting that contradicts an existing run."""
    path = config.folder / "config.json"
    existing = Config.read(path) if path.exists() else None
    if config.run.init:
        if existing is not None and existing.run.init == config.run.init:
            shape, tokenizer = existing.model, existing.data.tokenizer
        else:
            path = weights.find(config.run.init)
            shape = weights.read_config(path)
            tokenizer = _kept(Tokenizer.of_model(path, shape.vocab_size), config.folder)
        taken = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon")}
        if config.data.seq_len > shape.n_positions:
            log.info(f"seq_len lowered from {config.data.seq_len} to the {shape.n_positions} positions of {config.run.init}")
        config = config.override(**taken, tokenizer=tokenizer, seq_len=min(config.data.seq_len, shape.n_positions))
    elif ids_of(config.data.tokenizer) is None:
        own = Tokenizer.of_folder(Path(config.data.tokenizer))
        config = config.override(tokenizer=_kept(own, config.folder), vocab_size=own.n_vocab)
    config.check()
    if existing is not None and (different := existing.differences(config)):
        raise UserError(
            f"{config.folder} is another run ({'; '.join(different)}); use the same settings to go on with it, or another --out."
        )
    return config


def _kept(tokenizer: Tokenizer, run: Path) -> str:
    """Its name; one that is not built in is kept in the run folder, for when the run goes on."""
    tokenizer.keep(run)
    return tokenizer.name


def _batches(config: Config, batches: Batches, rt: runtime.Runtime, steps: range) -> Iterator[tuple[int, list[MicroBatch]]]:
    """This rank's micro-batches of each step, read ahead and moved to the device by a thread."""
    share = config.batch_sequences // rt.world
    micro, _ = config.micro_batches(rt.world)

    def load(step: int) -> tuple[int, list[MicroBatch]]:
        first = 0 if config.data.one_batch else step * config.batch_sequences
        rows = torch.from_numpy(batches.rows(first + rt.rank * share, share))
        if rt.device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(rt.device, non_blocking=rt.device.type == "cuda")  # on MPS a copy from a temporary may read freed memory
        return step, [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(micro)]

    with contextlib.suppress(Stopped):  # asked to stop while waiting for data that is still being prepared
        yield from prefetch(load, steps)


def _remove_used_shards(config: Config, folder: DataFolder, batches: Batches) -> None:
    """Within a disk budget: shards that even the oldest checkpoint is past are not needed again."""
    saved = checkpoint.steps(config.folder)
    if folder.growth is not None and bytes_of(config.data.disk_budget) and saved:
        remove_used(batches.shards, int(saved[0].name.removeprefix("step-")) * config.batch_sequences, config.data.seq_len)


def _seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The global generator's seed for one forward pass: dropout is a function of these four numbers."""
    key = struct.pack("<4q", seed, step, micro_batch, rank)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _write_config(run: Path, config: Config) -> None:
    temporary = run / ".config.json.tmp"
    temporary.write_text(config.to_json(), encoding="utf-8")
    os.replace(temporary, run / "config.json")


@contextmanager
def _handled_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; a second Ctrl-C leaves at once. Only the main thread can listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
