"""Train on data while a process beside the training prepares it.

    process = start_preparation("fineweb-edu", revision, Settings("gpt2"), folder, disk_budget)
    preparation = ShardsInPreparation(folder, process)
    splits = preparation.wait_for_start(stop)              # validation, first training shards
    preparation.wait_for_more(len(splits["train"]), stop)  # further training shards
    preparation.close()

The process ends with the one that started it. The next run continues its work.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from anew.data import prepare, sources
from anew.data.holdout import Settings
from anew.data.prepare import PROGRESS
from anew.data.shards import INDEX, DataFolder, Shard, consume
from anew.errors import UserError
from anew.utils.files import parse_json

PROBLEM = ".problem"  # the file in which the process leaves the sentence of its UserError
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent ends


class Stopped(Exception):
    """The wait for data ended because the event `stop` was set."""


@dataclass
class ShardsInPreparation:
    """A data folder that another process prepares."""

    path: Path
    process: BaseProcess | None  # None where another rank of this machine started it
    complete: bool = False

    @property
    def owns_preparation(self) -> bool:
        """Whether this process started the preparation."""
        return self.process is not None

    def wait_for_start(self, stop: threading.Event) -> dict[str, list[Shard]]:
        """Return the shards of both splits, once validation is complete and training has a shard.

        Raises Stopped if `stop` is set, and UserError if the preparation has failed.
        """
        return self._wait_until(lambda splits: bool(splits["train"] and splits["val"]), stop)

    def wait_for_more(self, known: int, stop: threading.Event) -> list[Shard]:
        """Return all training shards, once there are more than `known` or the folder is complete.

        Raises Stopped if `stop` is set, and UserError if the preparation has failed.
        """
        return self._wait_until(lambda splits: len(splits["train"]) > known, stop)["train"]

    def _wait_until(
        self, enough: Callable[[dict[str, list[Shard]]], bool], stop: threading.Event
    ) -> dict[str, list[Shard]]:
        while True:
            # Asked before the files are read, so that the last ones of a process that ends are
            # seen.
            is_running = self.process is None or self.process.is_alive()
            if (self.path / INDEX).is_file():
                self.complete = True
                return DataFolder.open(self.path).splits
            splits = finished(self.path)
            if enough(splits):
                return splits
            if not is_running:
                raise UserError(_problem(self.path))
            if stop.wait(POLL_SECONDS):
                raise Stopped

    def close(self) -> None:
        """End the preparation. What it has finished stays, and the next run continues."""
        if self.process is not None:
            self.process.terminate()
            self.process.join()


def finished(path: Path) -> dict[str, list[Shard]]:
    """Return the finished shards of a preparation; of validation none before all of it is there."""
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    try:
        progress = parse_json(path / PROGRESS)
    except (OSError, ValueError):
        return splits
    if not progress["finished"]:
        return splits
    for split, entries in progress["finished"].items():
        if split == "train" or not progress["val_open"]:
            splits[split] = [
                Shard(path / entry["name"], entry["tokens"], entry["sha256"]) for entry in entries
            ]
    return splits


def start_preparation(
    data: str, revision: str, settings: Settings, out: Path, disk_budget: int
) -> BaseProcess:
    """Start a process that prepares a dataset of the hub at `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PROBLEM).unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=_prepare,
        args=(data, revision, settings, out, disk_budget, os.getpid()),
        daemon=True,
    )
    process.start()
    return process


def _prepare(
    data: str, revision: str, settings: Settings, out: Path, disk_budget: int, parent: int
) -> None:
    """The work of that process. It ignores Ctrl-C, which the training handles, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl was called
            return
    try:
        prepare.prepare_data(
            sources.find(data, revision),
            settings,
            out,
            workers=max(1, prepare.cores() // 4),  # the training needs the other cores
            disk_budget=disk_budget,
            consumed=True,
            wait=True,
        )
    except UserError as error:
        (out / PROBLEM).write_text(str(error), encoding="utf-8")
        sys.exit(2)


def _problem(path: Path) -> str:
    if (path / PROBLEM).is_file():
        return (path / PROBLEM).read_text(encoding="utf-8")
    return (
        f"the process that prepares {path} has ended before it was done; "
        "run the same command again, which continues where it stopped."
    )


def remove_used(shards: Sequence[Shard], sequences: int, seq_len: int) -> None:
    """Remove the training shards that lie before sequence number `sequences` of the first epoch."""
    n_used = 0
    windows = 0
    for shard in shards:
        windows += shard.n_windows(seq_len)
        if windows > sequences:
            break
        n_used += 1
    if n_used:
        consume(shards, n_used)
