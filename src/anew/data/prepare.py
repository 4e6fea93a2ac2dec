"""From a source to a data folder: fetch, read, tokenise, split, shuffle, write shards. Kill it anywhere and run it again: the same bytes.

    anew prepare fineweb-edu --out data/edu --disk-budget 30GB
    anew prepare my.txt --out data/mine --tokenizer gpt2

Documents are taken in blocks of about 32 MB of text. A block is tokenised by threads (tiktoken works outside Python's lock, so threads are
as fast as processes and nothing has to be sent or cleaned up), each document is held out or not by its hash, the others are permuted
within the block by a generator seeded with its number, and the tokens are appended to the shards. Then `progress.json` says so in one
step. So the result depends on the source and the settings alone, and what a kill costs is one block.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from anew.config.values import fits, ids_of
from anew.data import hub_datasets as hub_data
from anew.data import readers, shards
from anew.data.holdout import Progress, Settings, Splits
from anew.data.hub_datasets import HubFile
from anew.data.shards import DataFolder
from anew.data.sources import Source
from anew.data.tokenize import Document, Text, halves, hash_of, in_order, jobs_of, threshold_of
from anew.errors import UserError
from anew.tokenizer.bpe import FILE as TOKENIZER
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.learn import learn
from anew.utils.files import read_json, write_json

log = logging.getLogger("anew")

OVERHEAD_BYTES = 1 << 16
PROGRESS, INDEX, PARTS = "progress.json", "index.json", ".parts"
FORMAT = 1  # of progress.json


@dataclass(frozen=True)
class Status:
    """What a progress bar shows."""

    documents: int
    bytes: int
    tokens: int
    disk_bytes: int
    seconds: float
    share: float  # of the source's files or of the limit, 0 to 1


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begun_at(out: Path) -> str:
    """The revision of a preparation that was begun or finished at `out`, so that it goes on with the same text; else empty."""
    for name in (PROGRESS, INDEX):
        if (out / name).is_file():
            try:
                revision = str(json.loads((out / name).read_text(encoding="utf-8"))["revision"])
            except (ValueError, KeyError, TypeError):
                continue
            return (
                revision if len(revision) == 40 else ""
            )  # a commit of the hub; local text has a sha256
    return ""


def prepare(
    source: Source,
    settings: Settings,
    out: Path,
    workers: int = 0,
    disk_budget: int = 0,
    consumed: bool = False,
    wait: bool = False,
    report: Callable[[Status], None] | None = None,
) -> DataFolder:
    """Write `source` as a data folder at `out`, or go on where an earlier process stopped.

    `workers` 0: one thread a core. `disk_budget` bounds, in bytes, fetched files and shards together (0: no bound); `consumed`: a
    training run removes shards it is done with, so a full budget is waited for. If another process is at work on `out`, `wait` or refuse.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=-1 if wait else 0):
            if (out / INDEX).is_file():
                return _same(DataFolder.open(out), source, settings)
            job = _Job(source, settings, out, workers or cores(), disk_budget, consumed, report)
            job.run()
    except Timeout as error:
        raise UserError(
            f"another process is preparing {out}; let it finish, or choose another --out."
        ) from error
    except OSError as error:
        if error.errno == 28:
            raise UserError(
                f"the disk of {out} is full; free some and run the same command again, it goes on where it was."
            ) from error
        raise
    return DataFolder.open(out)


def _same(folder: DataFolder, source: Source, settings: Settings) -> DataFolder:
    if folder.revision != source.revision or not fits(settings.tokenizer, folder.tokenizer):
        raise UserError(
            f"{folder.path} holds other data ({folder.source}, {folder.tokenizer}); choose another --out or remove it."
        )
    return folder


class _Job:
    """One preparation under its lock."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        out: Path,
        workers: int,
        budget: int,
        consumed: bool,
        report: Callable[[Status], None] | None,
    ) -> None:
        self.source, self.settings, self.out, self.workers, self.budget, self.report = (
            source,
            settings,
            out,
            workers,
            budget,
            report,
        )
        self.consumed = consumed
        self.stopped = threading.Event()
        self.ahead: Future[Path] | None = None
        self.held: dict[int, int] = {}  # bytes of each file that is fetched or being fetched
        self.began, self.bytes_before = time.perf_counter(), 0
        self.progress = self._restore()
        self.bytes_before = self.progress.bytes
        self.splits = Splits(out, settings, self.progress)
        self.tokenizer = self._tokenizer()

    def _tokenizer(self) -> Tokenizer:
        """The one that the settings name, or one learnt from the text (of a source on the hub its first file) that is not held out."""
        if not self.settings.tokenizer.startswith("train:"):
            return Tokenizer.find(self.settings.tokenizer, self.out)
        if not (self.out / TOKENIZER).is_file():
            with ThreadPoolExecutor(1) as fetcher:
                texts = self._texts(
                    [0] if self.source.is_remote else range(len(self.source.files)),
                    0,
                    fetcher,
                    ahead=False,
                )
                seen = (
                    t.content
                    for t in texts
                    if t.split == "train"
                    or (t.split == "" and hash_of(t.content) >= self.progress.threshold)
                )
                learn(seen, ids_of(self.settings.tokenizer) or 0).keep(self.out)
        return Tokenizer.of_folder(self.out)

    def _restore(self) -> Progress:
        path = self.out / PROGRESS
        fresh = Progress(asdict(self.settings), self.source.name, self.source.revision, 0)
        if not path.is_file():
            strangers = [
                p.name
                for p in self.out.iterdir()
                if not p.name.startswith(".") and p.name != TOKENIZER
            ]
            if strangers:
                raise UserError(
                    f"{self.out} exists already and holds {strangers[0]}; choose another --out or remove it."
                )
            fresh.threshold = threshold_of(self.source)
            write_json(
                path, asdict(fresh), FORMAT
            )  # before anything else, so that whatever a kill leaves is known to be ours
            return fresh
        try:
            found = Progress(**read_json(path, FORMAT)[0])
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove {self.out} and prepare again."
            ) from error
        if (found.settings, found.source, found.revision) != (
            fresh.settings,
            fresh.source,
            fresh.revision,
        ):
            raise UserError(
                f"{self.out} was begun with other settings or another text; give the same ones to go on, or another --out."
            )
        log.info(
            f"going on after {found.documents:,} documents, {found.bytes / 1e6:,.1f} MB of text"
        )
        return found

    def run(self) -> None:
        """To the end of the source, or of the limit."""
        try:
            for block in self._blocks():
                self._write(block)
                done = self.progress.file
                self._advance(block)
                self._remember()
                self._drop(range(done, self.progress.file))
                if (
                    self.settings.limit_tokens
                    and self.splits.train.n_tokens >= self.settings.limit_tokens
                ):
                    self.stopped.set()  # the file that is being waited for is not needed
                    break
            entries = [*self.splits.train.close(), *self.splits.val.close()]
        except BaseException:
            self.stopped.set()
            self.splits.abandon()
            raise
        p = self.progress
        counts = {"documents": p.documents, "bytes": p.bytes, "repeats_of_validation": p.dropped}
        shards.write_index(
            self.out,
            self.tokenizer.name,
            self.source.name,
            self.source.revision,
            entries,
            **counts,
            settings=asdict(self.settings),
        )
        (self.out / PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)

    # --- reading -------------------------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[list[Document]]:
        """Blocks of tokenised documents from where progress stands. No block spans two fetched files, so that each can be dropped."""
        first, files = self.progress.file, range(self.progress.file, len(self.source.files))
        with (
            ThreadPoolExecutor(self.workers, thread_name_prefix="tokenise") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="fetch") as fetcher,
        ):
            for group in [[number] for number in files] if self.source.is_remote else [files]:
                block: list[Document] = []
                size = 0
                texts = self._texts(
                    group, self.progress.document if self.progress.file == first else 0, fetcher
                )
                for document in in_order(pool, jobs_of(texts), self.tokenizer, 4 * self.workers):
                    block.append(document)
                    size += document.bytes
                    if size >= self.settings.block_bytes:
                        yield block
                        block, size = [], 0
                if block:
                    yield block
                if self.source.is_remote:
                    self.progress.file, self.progress.document = group[0] + 1, 0
                    self._remember()
                    self._drop(group)

    def _advance(self, block: list[Document]) -> None:
        self.progress.file, self.progress.document = block[-1].file, block[-1].number + 1
        self.progress.block += 1
        self.progress.documents += len(block)
        self.progress.bytes += sum(document.bytes for document in block)

    def _texts(
        self, group: Sequence[int], skip: int, fetcher: ThreadPoolExecutor, ahead: bool = True
    ) -> Iterator[Text]:
        """The documents of some files, but for the first `skip` of the first."""
        for number in group:
            file = self.source.files[number]
            if isinstance(file, HubFile):
                path = (self.ahead or fetcher.submit(self._fetch, number)).result()
                self.ahead = (
                    fetcher.submit(self._fetch, number + 1)
                    if ahead and number + 1 < len(self.source.files)
                    else None
                )
            else:
                path = file
            if self.source.by_position and self.settings.validation == "hash":
                pieces = list(enumerate(halves(readers.documents(path))))[skip:]
                yield from (
                    Text(number, i, piece, ("train", "val")[i % 2]) for i, piece in pieces if piece
                )
            else:
                for i, content in enumerate(
                    readers.documents(path, self.source.column, skip), skip
                ):
                    yield Text(number, i, content, "")
            skip = 0

    # --- the disk ------------------------------------------------------------------------------------------------------------------

    def _fetch(self, number: int) -> Path:
        """One file of the source, once there is room for it."""
        file = self.source.files[number]
        assert isinstance(file, HubFile)
        self._wait_for(
            file.size,
            f"{file.path} of {file.size / 1e6:,.0f} MB",
            others=number > self.progress.file,
        )
        self.held[number] = file.size
        return hub_data.fetch(file, self.out / PARTS)

    def _drop(self, numbers: Iterable[int]) -> None:
        """Remove fetched files that are done with."""
        for number in numbers:
            file = self.source.files[number]
            if isinstance(file, HubFile):
                hub_data.drop(file, self.out / PARTS)
                self.held.pop(number, None)

    def _disk_bytes(self) -> int:
        """What is on the disk, with files that are being fetched counted as whole, and a little for the progress file's next version."""
        parts = shards.disk_bytes(self.out / PARTS)
        return (
            shards.disk_bytes(self.out)
            - parts
            + max(parts, sum(list(self.held.values())))
            + OVERHEAD_BYTES
        )

    def _wait_for(self, size: int, what: str, others: bool) -> None:
        """Until `size` more bytes fit into the disk budget. `others`: a file before this one is still at work and will make room."""
        while self.budget and (used := self._disk_bytes()) + size > self.budget:
            if self.stopped.wait(0.1):
                raise UserError("stopped.")
            if not self.consumed and not (others and self.progress.file < len(self.source.files)):
                raise UserError(
                    f"the disk budget of {self.budget / 1e6:,.0f} MB is full: {used / 1e6:,.0f} MB are in use and {what} does not fit; run "
                    "again with a larger --disk-budget, it goes on where it was."
                )

    # --- writing -------------------------------------------------------------------------------------------------------------------

    def _write(self, block: list[Document]) -> None:
        """Held-out documents to the validation split, the others to the training split in the block's own order."""
        train = self.splits.hold_out(block, self.tokenizer.end_of_text)
        if train:
            order = np.random.Generator(
                np.random.Philox(key=[self.settings.seed, self.progress.block])
            ).permutation(len(train))
            tokens = np.concatenate([train[i] for i in order])
            self._wait_for(tokens.nbytes, f"a block of {tokens.nbytes / 1e6:,.0f} MB", others=False)
            if self.settings.limit_tokens:
                tokens = tokens[: self.settings.limit_tokens - self.splits.train.n_tokens]
            self.splits.train.write(tokens)

    def _remember(self) -> None:
        self.splits.remember(self.progress)
        write_json(self.out / PROGRESS, asdict(self.progress), FORMAT)
        if self.report:
            p, tokens, seconds = (
                self.progress,
                self.splits.train.n_tokens,
                time.perf_counter() - self.began,
            )
            share = p.file / len(self.source.files)
            if self.settings.limit_tokens:
                share = max(share, tokens / self.settings.limit_tokens)
            disk = shards.disk_bytes(self.out)
            self.report(
                Status(
                    p.documents,
                    p.bytes - self.bytes_before,
                    tokens + self.splits.val.n_tokens,
                    disk,
                    seconds,
                    share,
                )
            )
