"""Validation and samples while a model trains. Neither can change what is trained: raw module, evaluation mode, own random numbers."""

import logging
import math
import threading
import time
from dataclasses import dataclass

from anew.config.schema import Config
from anew.data.shards import Shard
from anew.distributed.fsdp import whole_model
from anew.errors import UserError
from anew.evaluate.loss import computing_in, mean_loss
from anew.evaluate.runner import run
from anew.evaluate.tasks.table import TASKS
from anew.evaluate.tasks.task import Example, Task
from anew.inference.generate import generate
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.training.async_checkpoint import Saver
from anew.training.run_log import Recorder
from anew.training.train_state import State
from anew.utils.device import DTYPES, matmul_precision

log = logging.getLogger("anew")


@dataclass
class Evaluator:
    """Looks at the model without disturbing its training: raw module, evaluation mode, own random numbers."""

    config: Config
    state: State
    recorder: Recorder
    saver: Saver
    splits: dict[str, list[Shard]]
    tokenizer: Tokenizer
    batch: int  # windows scored at a time
    stop: threading.Event

    def __post_init__(self) -> None:
        """Open the tasks at once: a file that cannot be had is better known before training than after an hour of it."""
        self.tasks: list[tuple[Task, list[Example]]] = []
        r = self.config.run
        for name in filter(None, r.evaluate_tasks.split(",")):
            if name not in TASKS:
                raise UserError(
                    f"there is no task '{name}' to evaluate; choose among {', '.join(TASKS)}."
                )
            examples = TASKS[name].examples(
                TASKS[name].fetch(), self.tokenizer, self.config.model.n_positions
            )
            self.tasks.append((TASKS[name], examples[: r.evaluate_limit or None]))

    def due(self, step: int) -> float:
        """Validate and sample if `step` asks for it; the checkpoint of the step is saved first. Returns the seconds it took."""
        began = time.perf_counter()
        r = self.config.run
        validate, sample = (
            _is_multiple(step, every) for every in (r.evaluate_every, r.sample_every)
        )
        if validate or sample:
            self.saver.save(self.state)
            with whole_model(self.state.model) as model:
                if validate:
                    self.validate(model, "val", self.state.rt.precision)
                    self.score_tasks(model, self.state.rt.precision)
                if sample:
                    self.sample(model)
        return time.perf_counter() - began

    def is_due(self, step: int) -> bool:
        """Does `step` ask for a validation or a sample?"""
        return _is_multiple(step, self.config.run.evaluate_every) or _is_multiple(
            step, self.config.run.sample_every
        )

    def validate(self, model: GPT, split: str, precision: str) -> float | None:
        """Mean loss over the fixed windows of a split, written down as <split>/loss with the precision it was computed in."""
        limit = min(self.config.data.val_tokens, sum(s.n_tokens for s in self.splits[split]))
        if limit < 2:
            return None
        with matmul_precision(precision):
            shards, seq_len, dtype = self.splits[split], self.config.data.seq_len, DTYPES[precision]
            loss = mean_loss(
                model, shards, seq_len, limit, dtype, self.batch, self.state.world, self.stop
            )
        name = "val" if split == "val" else "train_text"
        self.recorder.evaluation(
            {**self.state.clock(), f"{name}/loss": loss, f"{name}/precision": precision}
        )
        log.info(
            f"step {self.state.step:,}: {name} loss {loss:.4f} nats ({loss / math.log(2):.4f} bits) "
            f"a token, {limit - 1:,} tokens, {precision}"
        )
        return loss

    def score_tasks(self, model: GPT, precision: str) -> None:
        """Each task's figures, written down as eval/<task>/<figure>."""
        for task, examples in self.tasks:
            with matmul_precision(precision), computing_in(model, DTYPES[precision]):
                report = run(model, task, examples, self.state.world, stop=self.stop)
            figures = {
                name: value for name, value in report.figures.items() if isinstance(value, float)
            }
            row = {f"eval/{task.name}/{name}": value for name, value in figures.items()}
            how = {
                f"eval/{task.name}/examples": report.examples,
                f"eval/{task.name}/precision": precision,
            }
            self.recorder.evaluation({**self.state.clock(), **row, **how})
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log.info(
                f"step {self.state.step:,}: {task.name} {said}, {report.examples:,} examples, {precision}"
            )

    def sample(self, model: GPT) -> None:
        """One sample text from the current weights."""
        if self.state.world.rank != 0:
            return
        r = self.config.run
        prompt = self.tokenizer.encode(r.sample_prompt) or [self.tokenizer.end_of_text]
        rows = generate(
            model,
            [prompt],
            r.sample_tokens,
            self.tokenizer.end_of_text,
            temperature=0.8,
            seed=r.seed,
        )
        self.recorder.sample(self.state.step, r.sample_prompt, self.tokenizer.decode(rows[0]))

    def finish(self) -> tuple[float | None, float | None]:
        """The last word on a run: losses on held-out and (if asked for) on training text, in true fp32, and a sample if wanted."""
        with whole_model(self.state.model) as model:
            if self.config.run.sample_every:
                self.sample(model)
            self.score_tasks(model, "fp32")
            held_out = None if self.config.data.one_batch else self.validate(model, "val", "fp32")
            return held_out, self.validate(
                model, "train", "fp32"
            ) if self.config.run.evaluate_train else None


def _is_multiple(step: int, every: int) -> bool:
    """Is `step` one of those that come `every` so many steps? The first step and 0 never are."""
    return every > 0 and step > 0 and step % every == 0
