"""What a run writes down: metrics.jsonl, samples.jsonl, run_state.json, log.txt, TensorBoard.

metrics.jsonl is the one source; each line is an object that always has `step`, `tokens` and `seconds` (of training, compile included,
validation and saving excluded). A resumed run appends, so readers keep the last row of a step (`read`).
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anew.config.schema import Config
from anew.errors import Diverged, Preempted
from anew.model.gpt import count_parameters, flops_per_token
from anew.utils.files import json_lines, read_json, write_json

log = logging.getLogger("anew")
Row = dict[str, Any]


def read(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl in order of steps; what a step wrote last counts, key by key. Half a line is skipped."""
    rows: dict[int, Row] = {}
    for row in json_lines(run / "metrics.jsonl"):
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def last_loss(run: Path) -> float:
    """The newest training loss that a run has written down; NaN if there is none."""
    if not (run / "metrics.jsonl").is_file():
        return math.nan
    return next(
        (
            float(row["train/loss"])
            for row in reversed(read(run))
            if row.get("train/loss") is not None
        ),
        math.nan,
    )


FORMAT = 1  # of run_state.json


class RunState:
    """RUN/run_state.json: how a run stands, for whoever watches it; replaced as a whole, by the training and the saving thread."""

    def __init__(self, run: Path, writes: bool) -> None:
        self.path, self.writes, self.lock = run / "run_state.json", writes, threading.Lock()
        self.facts: Row = {}
        with contextlib.suppress(OSError, ValueError):
            self.facts, _ = read_json(self.path, FORMAT)
        kept = {name: self.facts[name] for name in ("micro_batch_found",) if name in self.facts}
        self.facts = {
            "starts": int(self.facts.get("starts", 0)) + 1,
            "saved_step": self.facts.get("saved_step", 0),
            **kept,
        }

    def update(self, **facts: Any) -> None:
        """Replace some of the facts."""
        if not self.writes:
            return
        with self.lock:
            self.facts |= {
                **facts,
                "updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            write_json(self.path, self.facts, FORMAT)


class Recorder:
    """The open files of one run, which one rank `writes`."""

    def __init__(self, run: Path, config: Config, step: int, writes: bool = True) -> None:
        self.run, self.config, self.writes, self.first_step = run, config, writes, step
        self.last_val: float | None = None
        self.last_train = math.nan
        self.bad_in_a_row = 0
        self.board: Any = None
        self.run_state = RunState(run, writes)

    def __enter__(self) -> Self:
        if not self.writes:
            return self
        self.run.mkdir(parents=True, exist_ok=True)
        self.metrics = (self.run / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (self.run / "samples.jsonl").open("a", encoding="utf-8")
        _end_line(self.run / "metrics.jsonl", self.metrics)
        _end_line(self.run / "samples.jsonl", self.samples)
        self.handler = logging.FileHandler(self.run / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self.handler)
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        self.board = _tensorboard(self.run / "tensorboard", self.first_step)
        self.run_state.update(
            status="running",
            step=self.first_step,
            steps=self.config.run.steps,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.writes:
            return
        if kind is None and self.board is not None and self.last_val is not None:
            groups = (self.config.model, self.config.data, self.config.optim, self.config.run)
            settings = {
                name: value for group in groups for name, value in dataclasses.asdict(group).items()
            }
            self.board.add_hparams(settings, {"final/val_loss": self.last_val}, run_name=".")
        if isinstance(error, Preempted):
            log.info(str(error))
        elif error is not None and not isinstance(error, KeyboardInterrupt):
            log.error(f"stopped: {error}")
        status = (
            "complete"
            if error is None
            else "preempted"
            if isinstance(error, Preempted)
            else "failed"
        )
        with contextlib.suppress(OSError):  # a full disk is what the error may be about
            self.run_state.update(
                status=status, **({"error": str(error)} if status == "failed" else {})
            )
        log.removeHandler(self.handler)
        self.handler.close()
        for file in (self.metrics, self.samples, self.board):
            if file is not None:
                try:
                    file.close()
                except OSError:  # on a full disk the last line cannot be written either
                    if error is None:
                        raise

    @property
    def last_loss(self) -> float:
        """The newest training loss that the run has written down; NaN if there is none."""
        return last_loss(self.run) if self.writes else self.last_train

    def row(self, row: Row) -> None:
        """Append one row; numbers go to TensorBoard too."""
        self.last_val, self.last_train = (
            row.get("val/loss", self.last_val),
            row.get("train/loss", self.last_train),
        )
        if not self.writes:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self.metrics.write(json.dumps(finite) + "\n")  # JSON has no NaN
        self.metrics.flush()
        if self.board is not None:
            for key, value in row.items():
                if "/" in key and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, row["step"])

    def step(self, row: Row, applied: bool, sequences: str) -> None:
        """Append the row of a training step, say it now and then, and stop a run whose steps cannot be applied any more."""
        self.row(row)
        step, loss, norm, r = (
            row["step"],
            row["train/loss"],
            row["train/grad_norm"],
            self.config.run,
        )
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        if not applied:
            what = "a spike" if math.isfinite(loss + norm) else "not finite"
            log.warning(
                f"step {step:,}: loss {loss:.4g}, gradient norm {norm:.4g} is {what}; the step was skipped ({sequences})"
            )
        if step % r.log_every == 0 or step in (1, r.steps):
            log.info(line_of(row, r.steps))
            self.run_state.update(step=step)
        if self.bad_in_a_row >= r.bad_steps:
            raise Diverged(
                f"{self.bad_in_a_row} steps in a row were not finite or spikes; the last good checkpoint is in {self.config.folder}. "
                "Lower the learning rate or look at the data."
            )

    def evaluation(self, row: Row) -> None:
        """Append an evaluation, to the metrics and among the samples, which it dates."""
        self.row(row)
        if self.writes:
            self.samples.write(json.dumps(row) + "\n")
            self.samples.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append one sample text."""
        self.samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        self.samples.flush()
        log.info(f"sample at step {step:,}: {prompt}{text}")
        if self.board is not None:
            self.board.add_text("sample", f"{prompt}{text}", step)


def step_row(
    clock: Row,
    loss: float,
    norm: float,
    lr: float,
    seconds: float,
    tokens: int,
    config: Config,
    peak: float,
) -> Row:
    """The row of one step over `tokens` that took `seconds`; `peak` is what all ranks could do, in floating-point operations a second."""
    per_second = tokens / seconds
    flops = per_second * flops_per_token(config.model, config.data.seq_len)
    return {
        **clock,
        "train/loss": loss,
        "train/lr": lr,
        "train/grad_norm": norm,
        "speed/ms_per_step": 1e3 * seconds,
        "speed/tokens_per_second": per_second,
        "speed/tflops": flops / 1e12,
        "speed/mfu": flops / peak,
    }


def describe(config: Config, ranks: int) -> Iterator[str]:
    """What is about to happen, in lines."""
    m, o, r, T = config.model, config.optim, config.run, config.data.seq_len
    micro, accumulation = config.micro_batches(ranks)
    padded = m.padded_vocab_size
    twos = (padded & -padded).bit_length() - 1
    yield f"model: vocabulary {m.vocab_size:,} padded to {padded:,} = {padded >> twos} x 2^{twos}, context {m.n_positions:,}"
    yield f"       {m.n_layer} layers, width {m.n_embd:,}, {m.n_head} heads of {m.head_dim}, feed-forward {4 * m.n_embd:,}"
    yield f"       {count_parameters(m):,} parameters"
    yield f"batch: {ranks} rank{'s' * (ranks > 1)} x {micro} sequences x {T:,} tokens x {accumulation} accumulated"
    yield f"       = {r.batch_tokens:,} tokens a step"
    total, warm_up = (
        _count(steps * config.batch_sequences * T) for steps in (r.steps, o.warmup_steps)
    )
    yield f"steps: {r.steps:,} = {total} tokens, of which {o.warmup_steps:,} = {warm_up} warm up"


def describe_data(
    config: Config, train_tokens: int, val_tokens: int, epoch_sequences: int, dropped: int
) -> Iterator[str]:
    """What is read, in lines. `dropped`: targets an epoch at the ends of shards, which fill no sequence."""
    epochs = config.run.steps * config.batch_sequences / epoch_sequences
    yield f"data:  {config.data.data} as {config.data.tokenizer}"
    yield f"       {train_tokens:,} training and {val_tokens:,} validation tokens"
    cut = ", each cut elsewhere" if config.data.recut and epochs > 1 else ""
    yield f"       {epoch_sequences:,} sequences an epoch, {epochs:.2f} epochs in all{cut}"
    yield f"       {dropped:,} tokens at the ends of shards are left out of the first epoch"


def _count(n: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)


def line_of(row: Row, steps: int) -> str:
    """A row as one line of at most 80 columns."""
    r = row
    return (
        f"{r['step']:>6,}/{steps:,} loss {r['train/loss']:.4f} lr {r['train/lr']:.1e} norm {r['train/grad_norm']:.2f} "
        f"{r['speed/ms_per_step']:,.0f}ms {r['speed/tokens_per_second']:,.0f}tok/s {r['speed/tflops']:.3g}TF/s "
        f"MFU {100 * r['speed/mfu']:.0f}%"
    )


def _end_line(path: Path, file: Any) -> None:
    """A killed writer may have left half a line; what follows must start on its own."""
    content = path.read_bytes()[-1:]
    if content not in (b"", b"\n"):
        file.write("\n")


def _tensorboard(folder: Path, step: int) -> Any:
    """A SummaryWriter, or None with a line that says so: TensorBoard is a convenience, never a reason not to train."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed, so none is written; metrics.jsonl has everything")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
