"""Read a run folder for a report. The run may be complete, running or broken; nothing is written.

    run = Run.read(Path("runs/gpt2-124m"))
    print(run.status, run.last["step"], run.final_loss)

| file | what a report takes from it | written by |
|---|---|---|
| config.json | the settings | `training.setup` |
| metrics.jsonl | losses, rates, speeds and task figures by step | `training.run_log` |
| samples.jsonl | sample texts by step | `training.run_log` |
| run_state.json | status, number of starts, environment | `training.run_log` |
| log.txt | warnings, errors, stops and resumes | `training.run_log` |
| verifications.jsonl | results of `anew verify` | `report.verifications` |
| baseline.json | another model's loss on the same windows | `report.baseline` |

Only config.json and metrics.jsonl are required. Half a line at the end of a file, as a killed
process leaves it, is skipped.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anew.config.config import Config
from anew.errors import UserError
from anew.evaluate.published import Comparison, compare, size_of
from anew.report import verifications
from anew.report.svg import Points
from anew.training import run_log
from anew.utils.files import json_lines, parse_json, read_json

BASELINE_FORMAT = 1  # of baseline.json

LOG_LINE = re.compile(r"^(\S+ \S+?)(?:,\d+)? (WARNING|ERROR|INFO) (.*)$")  # time, level, message
# Beginnings of INFO messages that count as events; warnings and errors always do.
EVENT_MESSAGES = (
    "resumed from",
    "weights from",
    "went back",
    "stopped",
    "skipped:",
    "removed the leftover",
)


@dataclass(frozen=True)
class Run:
    """The content of one run folder."""

    folder: Path
    config: Config
    rows: list[run_log.Row]  # of metrics.jsonl, one a step
    state: dict[str, Any]  # of run_state.json

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read the run at `folder`. Raises UserError if there is none, or it has no steps yet."""
        config = Config.of_run(folder)
        rows = run_log.read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        if not any("train/loss" in row for row in rows):
            raise UserError(f"{folder} has no steps to report yet.")
        state: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            state = parse_json(folder / "run_state.json")
        return cls(folder, config, rows, state)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def last(self) -> run_log.Row:
        """The newest row of a training step."""
        return next(row for row in reversed(self.rows) if "train/loss" in row)

    @property
    def train_loss(self) -> str:
        """The newest finite training loss as text, or "not finite" if there is none."""
        points = self.points("train/loss")
        return f"{points[-1][1]:.4f}" if points else "not finite"

    @property
    def status(self) -> str:
        """complete, running, preempted, failed or stopped.

        A run whose process was killed keeps the status that it had.
        """
        status = self.state.get("status")
        if self.last["step"] >= self.config.run.steps and status in (None, "complete"):
            return "complete"
        return str(status or "stopped")

    def points(self, key: str) -> Points:
        """Return (tokens, value) of every row that has a finite value of `key`."""
        return [
            (float(row["tokens"]), float(row[key])) for row in self.rows if row.get(key) is not None
        ]

    def _last_with(self, key: str) -> run_log.Row | None:
        """Return the newest row that has a finite value of `key`."""
        return next((row for row in reversed(self.rows) if row.get(key) is not None), None)

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """The figures computed during training, by task. Their key is eval/TASK/FIGURE."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            for key, value in row.items():
                if key.startswith("eval/") and isinstance(value, float):
                    _, task, figure = key.split("/", 2)
                    found.setdefault(task, set()).add(figure)
        return {task: sorted(found[task]) for task in sorted(found)}

    @property
    def final_loss(self) -> float | None:
        """The newest validation loss."""
        row = self._last_with("val/loss")
        return None if row is None else float(row["val/loss"])

    @property
    def final_loss_is_fp32(self) -> bool:
        """Whether the newest validation loss was computed in fp32."""
        row = self._last_with("val/loss")
        return row is not None and row.get("val/precision", "fp32") == "fp32"

    def comparisons(self) -> list[Comparison]:
        """Return the last figures of each task beside those published for GPT-2 of this size."""
        found = []
        for task, figures in self.tasks.items():
            row = self._last_with(f"eval/{task}/{figures[0]}")
            assert row is not None
            keys = {figure: f"eval/{task}/{figure}" for figure in figures}
            values = {
                figure: float(row[key]) for figure, key in keys.items() if row.get(key) is not None
            }
            examples = int(row.get(f"eval/{task}/examples", 0))
            # Only a complete run, scored in fp32 on all examples, is the published measurement.
            whole = (
                self.status == "complete"
                and not self.config.run.evaluate_limit
                and row.get(f"eval/{task}/precision") == "fp32"
                and examples > 0
            )
            found += compare(task, values, size_of(self.config.model), max(1, examples), whole)
        return found

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The content of baseline.json; None if the validation settings have changed since."""
        try:
            found, _ = read_json(self.folder / "baseline.json", BASELINE_FORMAT)
            windows = found["val_tokens"], found["seq_len"]
        except (OSError, ValueError, KeyError):
            return None
        data = self.config.data
        return found if windows == (data.val_tokens, data.seq_len) else None

    @property
    def verification(self) -> dict[str, Any] | None:
        """The newest result of `anew verify`, with time, step and checks; None if there is none."""
        found = verifications.read(self.folder)
        return found[-1] if found else None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Sample texts with step, prompt and text. Of a step that was repeated, the last counts."""
        found: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            for row in json_lines(self.folder / "samples.jsonl"):
                if "text" in row:
                    found[row["step"]] = row
        return [found[step] for step in sorted(found)]

    @property
    def events(self) -> list[tuple[str, str]]:
        """(time, message) of resumes, stops, warnings and errors in log.txt."""
        log = self.folder / "log.txt"
        if not log.is_file():
            return []
        found = []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            match = LOG_LINE.match(line)
            if match:
                time, level, message = match.groups()
                if level != "INFO" or message.startswith(EVENT_MESSAGES):
                    found.append((time, message))
        return found
