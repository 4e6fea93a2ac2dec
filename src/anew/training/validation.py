"""Validation, evaluation tasks and samples during training. None of them affects training.

The model is used in evaluation mode and without its compiled code, and samples have random numbers
of their own, so a run that validates more often trains exactly the same weights.
"""

import itertools
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from anew.config.config import Config
from anew.data.conversations import validation_windows
from anew.data.shards import DataFolder
from anew.distributed.fsdp import whole_model
from anew.evaluate.loss import activation_dtype, mean_loss
from anew.evaluate.runner import run_task as run_task
from anew.evaluate.tasks.registry import TASKS, unknown_task
from anew.evaluate.tasks.task import Example, Task
from anew.inference.generate import generate
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.training.async_checkpoint import CheckpointWriter
from anew.training.run_log import Row, RunLog
from anew.training.train_state import TrainState
from anew.utils.device import DTYPES, matmul_precision

log = logging.getLogger("anew")

SAMPLE_TEMPERATURE = 0.8


class Validation:
    """The validations, evaluation tasks and samples of one run."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        run_log: RunLog,
        checkpoints: CheckpointWriter,
        data: DataFolder,
        general: DataFolder | None,
        tokenizer: Tokenizer,
        stop: threading.Event,
    ) -> None:
        self.config = config
        self.state = state
        self.run_log = run_log
        self.checkpoints = checkpoints
        self.data = data
        self.general = general
        self.tokenizer = tokenizer
        self.stop = stop
        self.windows_per_batch, _ = config.micro_batches(state.world.size)
        # Tasks are read before training, so that a file that cannot be downloaded is reported at
        # once.
        self.tasks = list(self._read_tasks())

    def _read_tasks(self) -> Iterator[tuple[Task, list[Example]]]:
        """Yield the tasks of --evaluate-tasks with their examples."""
        names = [name for name in self.config.run.evaluate_tasks.split(",") if name]
        for name in names:
            if name not in TASKS:
                raise unknown_task(name, TASKS)
            task = TASKS[name]
            positions = self.config.model.n_positions
            limit = self.config.run.evaluate_limit or task.training_limit
            yield task, task.examples(task.fetch(), self.tokenizer, positions, limit)

    def validates_at(self, step: int) -> bool:
        """Return whether `step` is validated."""
        return is_multiple(step, self.config.run.evaluate_every)

    def samples_at(self, step: int) -> bool:
        """Return whether a text is sampled at `step`."""
        return is_multiple(step, self.config.run.sample_every)

    def is_due(self, step: int) -> bool:
        """Return whether `step` is validated or a text is sampled there."""
        return self.validates_at(step) or self.samples_at(step)

    def run(self, step: int) -> None:
        """Validate, sample, or both, as is due at `step`. The step's checkpoint is saved first."""
        self.checkpoints.save(self.state)
        precision = self.state.runtime.precision
        with whole_model(self.state.model) as model:
            if self.validates_at(step):
                self.measure_loss(model, "val", precision)
                self.measure_loss(model, "general", precision)
                self.score_tasks(model, precision)
            if self.samples_at(step):
                self.sample(model)

    def run_at_end(self) -> tuple[float | None, float | None]:
        """Validate the final weights in fp32; return the losses on held-out and on training text.

        The loss on training text is measured with --evaluate-train only; it is None otherwise.
        """
        with whole_model(self.state.model) as model:
            if self.config.run.sample_every:
                self.sample(model)
            self.score_tasks(model, "fp32")
            val_loss = None
            train_text_loss = None
            if not self.config.data.one_batch:
                val_loss = self.measure_loss(model, "val", "fp32")
                self.measure_loss(model, "general", "fp32")
            if self.config.run.evaluate_train:
                train_text_loss = self.measure_loss(model, "train_text", "fp32")
        return val_loss, train_text_loss

    def measure_loss(self, model: GPT, text: str, precision: str) -> float | None:
        """Record the mean loss over the fixed windows of a text; None if there is no such text.

        "val" is the validation text, "train_text" the training text, and "general" that of
        --general-data.
        """
        folder = self.general if text == "general" else self.data
        split = "train" if text == "train_text" else "val"
        if folder is None:
            return None
        tokens = min(self.config.data.val_tokens, folder.n_tokens(split))
        if tokens < 2:
            return None
        seq_len = self.config.data.seq_len
        windows = validation_windows(folder, split, seq_len, tokens, self.windows_per_batch)
        first = next(windows, None)
        if first is None:  # there is no held-out conversation with an answer
            return None
        windows = itertools.chain([first], windows)
        with matmul_precision(precision):
            loss = mean_loss(model, windows, DTYPES[precision], self.state.world, self.stop)
        counted = f"a token, {tokens - 1:,} tokens"
        if folder.conversations:
            counted = "a token of the answers"
        figures = {f"{text}/loss": loss, f"{text}/precision": precision}
        self.run_log.evaluation({**self.state.clock(), **figures})
        log.info(
            f"step {self.state.step:,}: {text} loss {loss:.4f} nats ({loss / math.log(2):.4f} "
            f"bits) {counted}, {precision}"
        )
        return loss

    def score_tasks(self, model: GPT, precision: str) -> None:
        """Record the figures of every task as eval/<task>/<figure>."""
        for task, examples in self.tasks:
            with evaluating(model, precision):
                report = run_task(model, task, examples, self.state.world, stop=self.stop)
            figures = {
                name: value for name, value in report.figures.items() if isinstance(value, float)
            }
            row: Row = {f"eval/{task.name}/{name}": value for name, value in figures.items()}
            row[f"eval/{task.name}/examples"] = report.examples
            row[f"eval/{task.name}/precision"] = precision
            self.run_log.evaluation({**self.state.clock(), **row})
            listed = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log.info(
                f"step {self.state.step:,}: {task.name} {listed}, "
                f"{report.examples:,} examples, {precision}"
            )

    def sample(self, model: GPT) -> None:
        """Record one text that the current weights write, on rank 0."""
        if self.state.world.rank != 0:
            return
        config = self.config.run
        end_of_text = self.tokenizer.end_of_text
        prompt = self.tokenizer.encode(config.sample_prompt) or [end_of_text]
        [ids] = generate(
            model,
            [prompt],
            config.sample_tokens,
            end_of_text,
            temperature=SAMPLE_TEMPERATURE,
            seed=config.seed,
        )
        self.run_log.sample(self.state.step, config.sample_prompt, self.tokenizer.decode(ids))


@contextmanager
def evaluating(model: GPT, precision: str) -> Iterator[None]:
    """Compute in evaluation mode and in `precision` inside the block."""
    with matmul_precision(precision), activation_dtype(model, DTYPES[precision]):
        yield


def is_multiple(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`; step 0 is not, and `every` 0 means never."""
    return every > 0 and step > 0 and step % every == 0
