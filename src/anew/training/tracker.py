"""Send the metrics of a run to a service for tracking experiments: `--track wandb` or `trackio`.

    tracker = Tracker("wandb", run, config)
    tracker.row({"step": 1, "train/loss": 10.9})
    tracker.close()

The client of the service runs in a thread of its own, so it can neither stop nor slow the training:
an error of the client is logged once, and the rows that it did not take stay in metrics.jsonl.
"""

import contextlib
import dataclasses
import importlib
import logging
import math
import queue
import threading
from pathlib import Path
from typing import Any

from anew.config.config import Config
from anew.errors import missing_packages

log = logging.getLogger("anew")

MOST_WAITING_ROWS = 10_000  # further rows are dropped while the service does not answer
SECONDS_AT_THE_END = 60.0  # given to the client to send what is left
Row = dict[str, Any]


class Tracker:
    """The connection to one service. `service` is the name of its Python package."""

    def __init__(self, service: str, run: Path, config: Config) -> None:
        self.service = service
        self.run = run
        self.config = config
        self.waiting: queue.Queue[Row | None] = queue.Queue(MOST_WAITING_ROWS)
        self.thread = threading.Thread(target=self._send_rows, daemon=True, name="tracker")
        self.thread.start()

    def row(self, row: Row) -> None:
        """Send the finite numbers of a row of metrics.jsonl. This returns at once."""
        figures = {key: value for key, value in row.items() if _is_figure(key, value)}
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait({"step": row["step"], **figures})

    def close(self) -> None:
        """Wait until all rows are sent, for a limited time."""
        if not self.thread.is_alive():
            return
        try:
            self.waiting.put(None, timeout=SECONDS_AT_THE_END)
        except queue.Full:
            return
        self.thread.join(timeout=SECONDS_AT_THE_END)

    def _send_rows(self) -> None:
        try:
            client = importlib.import_module(self.service)
            settings = {name: self.config.value(name) for name in self._setting_names()}
            name = self.run.resolve().name
            client.init(project="anew", name=name, config=settings, **self._options())
            while (row := self.waiting.get()) is not None:
                client.log(row, step=row.pop("step"))
            client.finish()
        except ImportError:
            error = missing_packages(f"--track {self.service}", self.service)
            log.warning(f"{error}. The run continues without it.")
        except Exception as error:  # noqa: BLE001 (nothing of the client may end the run)
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            log.warning(f"--track {self.service} ended ({first_line}); the run continues")

    def _setting_names(self) -> list[str]:
        groups = (self.config.model, self.config.data, self.config.optim, self.config.run)
        return [field.name for group in groups for field in dataclasses.fields(group)]

    def _options(self) -> dict[str, Any]:
        """Return what only one of the services takes."""
        if self.service == "wandb":
            # A resumed run continues its curves, because the id is the same.
            return {"dir": str(self.run), "id": self.run.resolve().name, "resume": "allow"}
        return {"resume": "allow"}


def _is_figure(key: str, value: Any) -> bool:
    return "/" in key and isinstance(value, int | float) and math.isfinite(value)
