"""Writes what happens in a run: metrics.jsonl, samples.jsonl, log.txt, run_state.json and
TensorBoard.

    with RunLog(run, config, step=0) as run_log:
        run_log.step(step_row(...), applied=True, sequences="sequences 0 to 15")
    rows = read_metrics(run)

metrics.jsonl has one JSON object a line. Each has `step`, `tokens` and `seconds` (of training,
without validation and saving). A resumed run appends to the file, so a step can occur twice;
readers keep the value that was written last.
"""

import contextlib
import datetime
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anew.config.config import Config
from anew.errors import Diverged, Preempted, UserError
from anew.model.flops import flops_per_token
from anew.training.tracker import Tracker
from anew.utils.disk_errors import is_transient, with_retries
from anew.utils.files import json_lines, read_json, write_json

log = logging.getLogger("anew")

Row = dict[str, Any]
RUN_STATE_FORMAT = 1  # of run_state.json
# A slow run has a line for the reader before `log_every` steps are done.
MOST_SECONDS_WITHOUT_LINE = 20.0


def read_metrics(run: Path) -> list[Row]:
    """Return the rows of RUN/metrics.jsonl by step.

    Of several values of a key, the last one counts.
    """
    rows: dict[int, Row] = {}
    for row in json_lines(run / "metrics.jsonl"):
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def last_train_loss(run: Path) -> float:
    """Return the training loss of the last step that a run has recorded; NaN if there is none."""
    if not (run / "metrics.jsonl").is_file():
        return math.nan
    losses = [row["train/loss"] for row in read_metrics(run) if row.get("train/loss") is not None]
    return float(losses[-1]) if losses else math.nan


def read_run_state(run: Path) -> Row:
    """Return the content of RUN/run_state.json; empty if the file is missing or damaged.

    Raises UserError if a newer version of anew wrote it.
    """
    try:
        content, _ = read_json(run / "run_state.json", RUN_STATE_FORMAT)
    except UserError:
        raise
    except (OSError, ValueError):
        return {}
    return content


class RunState:
    """RUN/run_state.json: the status of a run, for other programs. Two threads replace it."""

    def __init__(self, run: Path, writes: bool) -> None:
        self.path = run / "run_state.json"
        self.writes = writes
        self.lock = threading.Lock()
        earlier = read_run_state(run) if writes else {}
        self.content: Row = {
            "starts": int(earlier.get("starts", 0)) + 1,
            "saved_step": earlier.get("saved_step", 0),
        }
        if "micro_batch_found" in earlier:
            self.content["micro_batch_found"] = earlier["micro_batch_found"]

    def update(self, **values: Any) -> None:
        """Replace some of the values."""
        if not self.writes:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self.lock:
            self.content |= {**values, "updated": now}
            with_retries(
                lambda: write_json(self.path, self.content, RUN_STATE_FORMAT, durable=False),
                self.path,
            )


class RunLog:
    """The open log files of one run.

    Only the rank that `writes` has files; the others count steps.
    """

    def __init__(self, run: Path, config: Config, step: int, writes: bool = True) -> None:
        self.run = run
        self.config = config
        self.writes = writes
        self.first_step = step
        self.last_train_loss = last_train_loss(run) if writes else math.nan
        self.skipped_in_a_row = 0
        self.last_line = time.monotonic()
        self.tensorboard: Any = None
        self.tracker: Tracker | None = None
        self.run_state = RunState(run, writes)

    def __enter__(self) -> Self:
        if not self.writes:
            return self
        self.run.mkdir(parents=True, exist_ok=True)
        self.metrics = open_for_append(self.run / "metrics.jsonl")
        self.samples = open_for_append(self.run / "samples.jsonl")
        self.handler = LogFile(self.run / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self.handler)
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        self.tensorboard = open_tensorboard(self.run / "tensorboard", self.first_step)
        if self.tensorboard is not None:
            self.tensorboard.add_text("settings", self.config.to_json(), self.first_step)
        if self.config.run.track != "none":
            self.tracker = Tracker(self.config.run.track, self.run, self.config)
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
        self._record_end(error)
        if self.tracker is not None:
            self.tracker.close()
        log.removeHandler(self.handler)
        self.handler.close()
        self.metrics.close()
        self.samples.close()
        if self.tensorboard is None:
            return
        try:
            self.tensorboard.close()
        except OSError as close_error:  # on a full disk the last values cannot be written
            if is_transient(close_error):
                self._warn_of_lost_values(close_error)
            elif error is None:
                raise

    def _record_end(self, error: BaseException | None) -> None:
        """Write how the run ended to log.txt and to run_state.json.

        The console is left to the caller, who receives the error and shows it.
        """
        if error is None:
            end: Row = {"status": "complete"}
        elif isinstance(error, Preempted):
            self._to_log_file(logging.INFO, str(error))
            end = {"status": "preempted"}
        else:
            if not isinstance(error, KeyboardInterrupt):
                self._to_log_file(logging.ERROR, f"stopped: {error}")
            end = {"status": "failed", "error": str(error)}
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            self.run_state.update(**end)

    def _to_log_file(self, level: int, message: str) -> None:
        record = logging.LogRecord(log.name, level, __file__, 0, message, None, None)
        self.handler.handle(record)

    def row(self, row: Row) -> None:
        """Append one row to metrics.jsonl, and its numbers to TensorBoard."""
        self.last_train_loss = row.get("train/loss", self.last_train_loss)
        if not self.writes:
            return
        write_line(self.metrics, {key: finite_or_none(value) for key, value in row.items()})
        if self.tracker is not None:
            self.tracker.row(row)
        self._to_tensorboard(row["step"], lambda tensorboard: add_scalars(tensorboard, row))

    def _to_tensorboard(self, step: int, add: Callable[[Any], None]) -> None:
        """Call `add` with TensorBoard's writer, if there is one. A thread of it writes the file.

        When the thread has met an error that may pass, it has ended, and what it had not written is
        lost. A new writer, with a file of its own, replaces it.
        """
        if self.tensorboard is None:
            return
        try:
            add(self.tensorboard)
        except OSError as error:
            if not is_transient(error):
                raise
            self._warn_of_lost_values(error)
            self.tensorboard = open_tensorboard(self.run / "tensorboard", step)

    def _warn_of_lost_values(self, error: OSError) -> None:
        log.warning(
            f"{self.run / 'tensorboard'}: {error.strerror}; TensorBoard lacks the values of up to "
            "two minutes, which metrics.jsonl has"
        )

    def step(self, row: Row, applied: bool, sequences: str) -> None:
        """Append the row of a training step. `sequences` says what the step read, for the log.

        Raises Diverged after too many steps in a row that were not applied.
        """
        self.row(row)
        config = self.config.run
        step = row["step"]
        if applied:
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            log.warning(skipped_step_message(row, sequences))
        is_late = time.monotonic() - self.last_line > MOST_SECONDS_WITHOUT_LINE
        if step % config.log_every == 0 or step in (1, config.steps) or is_late:
            self.last_line = time.monotonic()
            log.info(console_line(row, config.steps))
            self.run_state.update(step=step)
        if self.skipped_in_a_row >= config.bad_steps:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row were not finite or spikes; the last good "
                f"checkpoint is in {self.config.folder}. Lower the learning rate or look at the "
                "data."
            )

    def evaluation(self, row: Row) -> None:
        """Append the figures of an evaluation to metrics.jsonl and, beside the samples, to
        samples.jsonl.
        """
        self.row(row)
        if self.writes:
            write_line(self.samples, row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append one sample text."""
        write_line(self.samples, {"step": step, "prompt": prompt, "text": text})
        log.info(f"sample at step {step:,}: {prompt}{text}")
        self._to_tensorboard(
            step, lambda tensorboard: tensorboard.add_text("sample", f"{prompt}{text}", step)
        )


class LogFile(logging.FileHandler):
    """log.txt. A line that cannot be written, for an error that may pass, follows with the next.

    Its buffer keeps the line.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        """Show the error of a line on standard error, unless the error may pass."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or not is_transient(error):
            super().handleError(record)


def open_for_append(path: Path) -> FileIO:
    """Open a file of lines for appending; end a half line left by a killed process."""
    file = FileIO(path, "a")
    last_byte = path.read_bytes()[-1:]
    if last_byte not in (b"", b"\n"):
        file.write(b"\n")
    return file


def write_line(file: FileIO, row: Row) -> None:
    """Append one JSON object."""
    line = (json.dumps(row) + "\n").encode()
    # The file has no buffer, so it is known how much of the line is written when an error occurs.
    while line:
        n_bytes = with_retries(partial(os.write, file.fileno(), line), Path(str(file.name)))
        line = line[n_bytes:]


def finite_or_none(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON does not have, and any other value unchanged."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def open_tensorboard(folder: Path, step: int) -> Any:
    """Return a SummaryWriter that replaces what follows `step`;

    None if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed, so it gets no files; metrics.jsonl has everything")
        return None
    return with_retries(lambda: SummaryWriter(str(folder), purge_step=step + 1), folder)


def add_scalars(tensorboard: Any, row: Row) -> None:
    """Give the numbers of a row to TensorBoard."""
    for key, value in row.items():
        if "/" in key and isinstance(value, (int, float)):
            tensorboard.add_scalar(key, value, row["step"])


def step_row(
    clock: Row,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    seconds: float,
    n_tokens: int,
    config: Config,
    peak_flops: float,
) -> Row:
    """Return the row of one step of `n_tokens` that took `seconds`.

    `n_tokens` and `peak_flops` are sums over all ranks.
    """
    tokens_per_second = n_tokens / seconds
    flops = tokens_per_second * flops_per_token(config.model, config.data.seq_len)
    return {
        **clock,
        "train/loss": loss,
        "train/lr": learning_rate,
        "train/grad_norm": grad_norm,
        "speed/ms_per_step": 1e3 * seconds,
        "speed/tokens_per_second": tokens_per_second,
        "speed/tflops": flops / 1e12,
        "speed/mfu": flops / peak_flops,
    }


def skipped_step_message(row: Row, sequences: str) -> str:
    """Return the warning about a step that was not applied."""
    loss = row["train/loss"]
    norm = row["train/grad_norm"]
    problem = "a spike" if math.isfinite(loss + norm) else "not finite"
    return (
        f"step {row['step']:,}: loss {loss:.4g}, gradient norm {norm:.4g} is {problem}; "
        f"the step was skipped ({sequences})"
    )


def console_line(row: Row, steps: int) -> str:
    """Return a row of metrics as one line of at most 80 columns."""
    return (
        f"{row['step']:>6,}/{steps:,} loss {row['train/loss']:.4f} lr {row['train/lr']:.1e} "
        f"norm {row['train/grad_norm']:.2f} {row['speed/ms_per_step']:,.0f}ms "
        f"{row['speed/tokens_per_second']:,.0f}tok/s {row['speed/tflops']:.3g}TF/s "
        f"MFU {100 * row['speed/mfu']:.0f}%"
    )
