"""The data that `--data` names, ready to train on: a folder that is there, text prepared now, or web data prepared while training goes on.

    folder = open_data("fineweb-edu", "gpt2", disk_budget=30_000_000_000)
    folder.splits["train"]                          # the shards there are
    folder.growth.wait_for_more(known=1, stop=...)  # the next ones, or none when there are no more

Web data is prepared by a process of its own, which is stopped with this one and goes on where it was the next time.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from anew.config.values import TOKENIZERS, fits
from anew.data import prepare, shards, sources
from anew.data.holdout import Settings
from anew.data.prepare import INDEX, PROGRESS
from anew.data.shards import DataFolder, Shard
from anew.data.token_formats import open_others
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import cache_folder

log = logging.getLogger("anew")

PROBLEM = ".problem"
POLL_SECONDS = 0.2


class Stopped(Exception):
    """The wait for more data was given up, as was asked."""


@dataclass
class Growth:
    """A preparation that goes on beside this process."""

    path: Path
    process: BaseProcess | None  # None where another rank of this machine has it
    complete: bool = False

    @property
    def leads(self) -> bool:
        """Is the preparation this process's own?"""
        return self.process is not None

    def wait_for_more(self, known: int, stop: threading.Event) -> list[Shard]:
        """All training shards, once there are more than `known` of them or the preparation is complete. Stopped if `stop` is set."""
        while True:
            alive = (
                self.process is None or self.process.is_alive()
            )  # asked before looking, so that what a last breath wrote is seen
            if (self.path / INDEX).is_file():
                self.complete = True
                return DataFolder.open(self.path).splits["train"]
            found = finished(self.path)["train"]
            if len(found) > known:
                return found
            if not alive:
                raise UserError(_problem(self.path))
            if stop.wait(POLL_SECONDS):
                raise Stopped

    def close(self) -> None:
        """Stop preparing; what is done stays, and the next run goes on."""
        if self.process is not None:
            self.process.terminate()
            self.process.join()

    def wait_for_start(self, stop: threading.Event) -> dict[str, list[Shard]]:
        """The shards of both splits, once validation is whole and there is something to train on."""
        self.wait_for_more(0, stop)
        while not self.complete and not finished(self.path)["val"]:
            if (
                self.process is not None
                and not self.process.is_alive()
                and not (self.path / INDEX).is_file()
            ):
                raise UserError(_problem(self.path))
            if (self.path / INDEX).is_file():
                self.complete = True
            elif stop.wait(POLL_SECONDS):
                raise Stopped
        return DataFolder.open(self.path).splits if self.complete else finished(self.path)


def open_data(
    data: str,
    tokenizer: str | Tokenizer,
    disk_budget: int = 0,
    stop: threading.Event | None = None,
    leads: bool = True,
) -> DataFolder:
    """The data folder that `--data` means, prepared now if it has to be, with `tokenizer`: one, or a name (which may be train:N).

    Of several ranks on a machine one `leads`: it prepares, and the others read what it has begun.

    Data of the hub is open as soon as validation and a first shard are there; `growth` then brings the rest.
    """
    wanted = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    path = Path(data).expanduser()
    folder = (
        DataFolder.open(path)
        if (path / INDEX).is_file()
        else open_others(path)
        if path.is_dir()
        else None
    )
    if folder is not None:
        if not fits(wanted, folder.tokenizer):
            flag = folder.tokenizer if folder.tokenizer in TOKENIZERS else path
            raise UserError(
                f"{path} was prepared with the tokenizer {folder.tokenizer}, and this run uses {wanted}; add --tokenizer {flag}."
            )
        return folder
    revision = "main"
    if sources.is_hub_name(data) and (before := _begun(data, wanted)):
        if (before / INDEX).is_file():
            return DataFolder.open(before)
        revision = prepare.begun_at(before)
    source = sources.find(data, revision)
    cached = cache_folder() / "data" / f"{source.name}-{_in_a_path(wanted)}-{source.revision[:12]}"
    if (cached / INDEX).is_file():
        return DataFolder.open(cached)
    log.info(f"preparing {data} with the {wanted} tokenizer into {cached}")
    settings = settings_for(wanted)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.keep(cached)
    if not source.is_remote:
        return prepare.prepare(source, settings, cached, wait=True)
    process = _preparing(data, source.revision, settings, cached, disk_budget) if leads else None
    growth = Growth(cached, process)
    splits = growth.wait_for_start(stop or threading.Event())
    name = Tokenizer.of_folder(cached).name if wanted.startswith("train:") else wanted
    return DataFolder(cached, name, source.name, source.revision, splits, growth)


def _preparing(
    data: str, revision: str, settings: Settings, cached: Path, disk_budget: int
) -> BaseProcess:
    cached.mkdir(parents=True, exist_ok=True)
    (cached / PROBLEM).unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(
        target=_prepare,
        args=(data, revision, settings, cached, disk_budget, os.getpid()),
        daemon=True,
    )
    process.start()
    return process


def _begun(data: str, tokenizer: str) -> Path | None:
    """The latest preparation of a dataset: a run goes on with it whatever the hub has meanwhile, and asks nobody once it is done."""
    folders = (cache_folder() / "data").glob(
        f"{sources.cache_name(data)}-{_in_a_path(tokenizer)}-*"
    )
    return max(
        (f for f in folders if prepare.begun_at(f)), key=lambda f: f.stat().st_mtime, default=None
    )


def _in_a_path(tokenizer: str) -> str:
    return tokenizer.replace(":", "-")


def settings_for(tokenizer: str) -> Settings:
    """How `--data SOURCE` is prepared."""
    return Settings(tokenizer)


def finished(path: Path) -> dict[str, list[Shard]]:
    """The whole shards of a preparation that goes on, and no validation before all of it is there."""
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    try:
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return splits
    for split in splits:
        if progress["finished"] and (split == "train" or not progress["val_open"]):
            splits[split] = [
                Shard(path / e["name"], e["tokens"], e["sha256"])
                for e in progress["finished"][split]
            ]
    return splits


def _prepare(
    data: str, revision: str, settings: Settings, out: Path, disk_budget: int, parent: int
) -> None:
    """The process beside training. Ctrl-C is the trainer's to handle; the end of the trainer is the end of this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: also when the trainer was killed
        if os.getppid() != parent:
            return
    try:
        source = sources.find(data, revision)
        threads = max(1, prepare.cores() // 4)  # the trainer comes first
        prepare.prepare(
            source,
            settings,
            out,
            workers=threads,
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
    return f"the process that prepares {path} has ended before it was done; run the same command again, it goes on where it was."


def remove_used(found: Sequence[Shard], sequences: int, seq_len: int) -> None:
    """Remove the training shards whose windows all lie before sequence number `sequences` of the first epoch."""
    count, seen = 0, 0
    for shard in found:
        seen += max(0, (shard.n_tokens - 1) // seq_len)
        if seen > sequences:
            break
        count += 1
    if count:
        shards.consume(found, count)
