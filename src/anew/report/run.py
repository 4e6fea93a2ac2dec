"""What a run folder holds, read for a page: never written to, whole or not, running or not."""

import contextlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anew.config.schema import Config
from anew.errors import UserError
from anew.evaluate.published import Comparison, compare, size_of
from anew.report.svg import Points
from anew.training import run_log as metrics
from anew.utils.files import json_lines, read_json

EVENT = re.compile(r"^(\S+ \S+?)(?:,\d+)? (WARNING|ERROR|INFO) (.*)$")
TOLD = (
    "resumed from",
    "weights from",
    "went back",
    "stopped",
    "skipped:",
    "removed the leftover",
)  # of what is logged as INFO

BASELINE_FORMAT = 1  # of baseline.json


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    config: Config
    rows: list[metrics.Row]
    state: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run at `folder`; UserError if there is none, or nothing was written yet."""
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a run folder: it has no config.json.")
        config = Config.read(folder / "config.json")
        rows = metrics.read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        if not any("train/loss" in row for row in rows):
            raise UserError(f"{folder} has no steps to report yet.")
        state: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / "run_state.json").read_text(encoding="utf-8"))
        return cls(folder, config, rows, state)

    @property
    def name(self) -> str:
        """The folder's name, which people choose."""
        return self.folder.resolve().name

    @property
    def last(self) -> metrics.Row:
        """The newest row of a training step."""
        return next(row for row in reversed(self.rows) if "train/loss" in row)

    @property
    def train_loss(self) -> str:
        """The newest training loss that is a number, in words."""
        found = self.points("train/loss")
        return f"{found[-1][1]:.4f}" if found else "not finite"

    @property
    def status(self) -> str:
        """complete, running, preempted or failed. A process that is gone cannot say that it failed."""
        done = self.last["step"] >= self.config.run.steps
        return (
            "complete"
            if done and self.state.get("status") in (None, "complete")
            else str(self.state.get("status", "stopped"))
        )

    def points(self, key: str) -> Points:
        """(tokens, value) wherever `key` was written down."""
        return [
            (float(row["tokens"]), float(row[key])) for row in self.rows if row.get(key) is not None
        ]

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """Figures by task, of what was scored while training."""
        found: dict[str, list[str]] = {}
        for key in {
            key
            for row in self.rows
            for key, value in row.items()
            if key.startswith("eval/") and isinstance(value, float)
        }:
            _, task, figure = key.split("/", 2)
            found.setdefault(task, []).append(figure)
        return {task: sorted(figures) for task, figures in sorted(found.items())}

    @property
    def final_loss(self) -> tuple[float, str] | None:
        """The newest validation loss and the precision it was computed in."""
        row = next((row for row in reversed(self.rows) if row.get("val/loss") is not None), None)
        return (float(row["val/loss"]), str(row.get("val/precision", "fp32"))) if row else None

    def comparisons(self) -> list[Comparison]:
        """The last figures of each task beside those published for OpenAI's GPT-2 of this size."""
        found = []
        for task, figures in self.tasks.items():
            row = next(
                row
                for row in reversed(self.rows)
                if row.get(f"eval/{task}/{figures[0]}") is not None
            )
            values = {
                figure: float(row[f"eval/{task}/{figure}"])
                for figure in figures
                if row.get(f"eval/{task}/{figure}") is not None
            }
            examples = int(row.get(f"eval/{task}/examples", 0))
            all_scored = (
                not self.config.run.evaluate_limit
                and row.get(f"eval/{task}/precision") == "fp32"
                and examples > 0
            )
            whole = all_scored and self.status == "complete"
            found += compare(task, values, size_of(self.config.model), max(1, examples), whole)
        return found

    @property
    def baseline(self) -> dict[str, Any] | None:
        """What `--baseline` found: another model's loss on the same windows. None if they have been set otherwise since."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found, _ = read_json(self.folder / "baseline.json", BASELINE_FORMAT)
            data = self.config.data
            return (
                found
                if found["val_tokens"] == data.val_tokens and found["seq_len"] == data.seq_len
                else None
            )
        return None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Texts written while training: step, prompt, text. The last one of a step counts, as for a run that was resumed."""
        found: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(OSError):
            for row in json_lines(self.folder / "samples.jsonl"):
                if "text" in row:
                    found[row["step"]] = row
        return [found[step] for step in sorted(found)]

    @property
    def events(self) -> list[tuple[str, str]]:
        """(time, what happened): starts, resumes, warnings, errors."""
        found = []
        with contextlib.suppress(OSError):
            for line in (
                (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            ):
                match = EVENT.match(line)
                if match and (match[2] != "INFO" or match[3].startswith(TOLD)):
                    found.append((match[1], match[3]))
        return found
