"""What a run writes down: metrics.jsonl, samples.jsonl, log.txt, TensorBoard.

metrics.jsonl is the one source; each line is an object that always has `step`, `tokens` and `seconds` (of training, compile included,
validation and saving excluded). A resumed run appends, so readers keep the last row of a step (`read`).
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anew.config import Config
from anew.model import count_parameters, flops_per_token

log = logging.getLogger("anew")
Row = dict[str, Any]
BAD_STEPS_IN_A_ROW = 10  # that many non-finite steps one after the other are no accident


def read(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl in order of steps; what a step wrote last counts, key by key. Half a line is skipped."""
    rows: dict[int, Row] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def last_loss(run: Path) -> float:
    """The newest training loss that a run has written down; NaN if there is none."""
    return next((float(row["train/loss"]) for row in reversed(read(run)) if row.get("train/loss") is not None), math.nan)


class Recorder:
    """The open files of one run."""

    def __init__(self, run: Path, config: Config, step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (run / "samples.jsonl").open("a", encoding="utf-8")
        _end_line(run / "metrics.jsonl", self.metrics)
        _end_line(run / "samples.jsonl", self.samples)
        self.config = config
        self.last_val: float | None = None
        self.bad_in_a_row = 0
        self.handler = logging.FileHandler(run / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.board: Any = None
        self.board_folder, self.first_step = run / "tensorboard", step

    def __enter__(self) -> Self:
        log.addHandler(self.handler)
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        self.board = _tensorboard(self.board_folder, self.first_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self.board is not None and self.last_val is not None:
            groups = (self.config.model, self.config.data, self.config.optim, self.config.run)
            settings = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
            self.board.add_hparams(settings, {"final/val_loss": self.last_val}, run_name=".")
        if error is not None and not isinstance(error, KeyboardInterrupt):
            log.error(f"stopped: {error}")
        log.removeHandler(self.handler)
        self.handler.close()
        for file in (self.metrics, self.samples, self.board):
            if file is not None:
                file.close()

    def row(self, row: Row) -> None:
        """Append one row; numbers go to TensorBoard too."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self.metrics.write(json.dumps(finite) + "\n")  # JSON has no NaN
        self.metrics.flush()
        self.last_val = row.get("val/loss", self.last_val)
        if self.board is not None:
            for key, value in row.items():
                if "/" in key and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, row["step"])

    def step(self, row: Row) -> None:
        """Append the row of a training step, say it now and then, and stop a run that only yields NaN or infinity."""
        self.row(row)
        step, loss, norm = row["step"], row["train/loss"], row["train/grad_norm"]
        self.bad_in_a_row = 0 if math.isfinite(loss + norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row:
            log.warning(f"step {step:,}: loss {loss} or gradient norm {norm} is not finite; the step was skipped")
        if step % self.config.run.log_every == 0 or step in (1, self.config.run.steps):
            log.info(line_of(row, self.config.run.steps))
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            raise RuntimeError(
                f"{self.bad_in_a_row} steps in a row were not finite; the last good checkpoint is in {self.config.folder}. "
                "Lower the learning rate or look at the data."
            )

    def evaluation(self, row: Row) -> None:
        """Append an evaluation, to the metrics and among the samples, which it dates."""
        self.row(row)
        self.samples.write(json.dumps(row) + "\n")
        self.samples.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append one sample text."""
        self.samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        self.samples.flush()
        log.info(f"sample at step {step:,}: {prompt}{text}")
        if self.board is not None:
            self.board.add_text("sample", f"{prompt}{text}", step)


def step_row(clock: Row, loss: float, norm: float, lr: float, seconds: float, config: Config, peak: float) -> Row:
    """The row of one step that took `seconds`; `peak` is what all ranks could do, in floating-point operations a second."""
    per_second = config.run.batch_tokens / seconds
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


def describe(config: Config, ranks: int, train_tokens: int, val_tokens: int, epoch_sequences: int, dropped: int) -> Iterator[str]:
    """What is about to happen, in lines. `dropped`: targets an epoch at the ends of shards, which fill no sequence."""
    m, o, r, T = config.model, config.optim, config.run, config.data.seq_len
    micro, accumulation = config.micro_batches(ranks)
    padded = m.padded_vocab_size
    twos = (padded & -padded).bit_length() - 1
    yield f"model: vocabulary {m.vocab_size:,} padded to {padded:,} = {padded >> twos} x 2^{twos}, context {m.n_positions:,}"
    yield f"       {m.n_layer} layers, width {m.n_embd:,}, {m.n_head} heads of {m.head_dim}, feed-forward {4 * m.n_embd:,}"
    yield f"       {count_parameters(m):,} parameters"
    yield f"data:  {config.data.data} as {config.data.tokenizer}"
    yield f"       {train_tokens:,} training and {val_tokens:,} validation tokens"
    yield f"       {epoch_sequences:,} sequences an epoch, {r.steps * config.batch_sequences / epoch_sequences:.2f} epochs in all"
    yield f"       {dropped:,} tokens at the ends of shards are left out of an epoch"
    yield f"batch: {ranks} rank{'s' * (ranks > 1)} x {micro} sequences x {T:,} tokens x {accumulation} accumulated"
    yield f"       = {r.batch_tokens:,} tokens a step"
    total, warm_up = (_count(steps * r.batch_tokens) for steps in (r.steps, o.warmup_steps))
    yield f"steps: {r.steps:,} = {total} tokens, of which {o.warmup_steps:,} = {warm_up} warm up"


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
