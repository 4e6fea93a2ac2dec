"""Prepare a data folder: fetch, read, tokenise, hold out, shuffle and write shards.

    anew prepare fineweb-edu --out data/edu --disk-budget 30GB
    anew prepare my.txt --out data/mine --tokenizer gpt2

    folder = prepare_data(sources.find("my.txt"), Settings("gpt2"), Path("data/mine"))

Documents are taken in blocks of about 32 MB of text. A block is tokenised by threads; each of its
documents is held out or not by its hash; the others are shuffled within the block by a generator
whose seed is the number of the block, and appended to the shards. Then `progress.json` is replaced
in one step.

So the bytes of the folder depend on the source and the settings alone. A preparation that is killed
continues when it is started again, writes the same bytes, and repeats at most one block.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from anew.config.values import tokenizer_matches, vocabulary_size
from anew.data import hub_datasets, shards
from anew.data.conversation_files import form_of
from anew.data.holdout import Progress, Settings, Splits, halves, threshold_of
from anew.data.hub_datasets import HubFile
from anew.data.read_ahead import prefetch
from anew.data.shards import DataFolder
from anew.data.sources import Source
from anew.data.tokenize import Document, Text, encode_in_order, hash_of
from anew.errors import UserError
from anew.tokenizer import chat
from anew.tokenizer.bpe import FILE as TOKENIZER
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.learn import learn
from anew.utils.disk_errors import out_of_space
from anew.utils.files import parse_json, read_json, write_json
from anew.utils.words import counted

log = logging.getLogger("anew")

INDEX = shards.INDEX
PROGRESS = shards.PROGRESS
FORMAT = 1  # of progress.json
FETCHED = ".parts"  # the folder of files from the hub
OVERHEAD_BYTES = 1 << 16  # room that the disk budget keeps for the next progress.json
COMMIT_LENGTH = 40  # a commit of the hub is a SHA-1; the revision of local text is a SHA-256


@dataclass(frozen=True)
class Status:
    """What a progress bar shows."""

    documents: int
    bytes: int
    tokens: int
    disk_bytes: int
    seconds: float
    share: float  # of the source's files or of the limit, 0 to 1


def prepare_data(
    source: Source,
    settings: Settings,
    out: Path,
    workers: int = 0,
    disk_budget: int = 0,
    consumed: bool = False,
    wait: bool = False,
    report: Callable[[Status], None] | None = None,
) -> DataFolder:
    """Write `source` as a data folder at `out`, or continue where an earlier process stopped.

    `workers` is the number of threads (0: one a core). `disk_budget` bounds the bytes of fetched
    files and shards together (0: no bound); with `consumed` a training run removes the shards that
    it has used, so a full budget is waited for. If another process prepares `out`, `wait` for it or
    raise UserError.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=-1 if wait else 0):
            if (out / INDEX).is_file():
                folder = DataFolder.open(out)
                _check_same(folder, source, settings)
                return folder
            job = _Job(source, settings, out, workers or cores(), disk_budget, consumed, report)
            job.run()
    except Timeout as error:
        raise UserError(
            f"another process is preparing {out}; let it finish, or choose another --out."
        ) from error
    except OSError as error:
        problem = out_of_space(error, out)
        if not problem:
            raise
        raise UserError(
            f"{problem}; free some space and run the same command again, "
            "which continues where this one stopped."
        ) from error
    return DataFolder.open(out)


def _check_same(folder: DataFolder, source: Source, settings: Settings) -> None:
    """Refuse a finished folder that holds another text or another tokenizer's tokens."""
    has_same_tokens = tokenizer_matches(settings.tokenizer, folder.tokenizer)
    has_same_form = folder.conversations == source.conversations
    if folder.revision != source.revision or not has_same_tokens or not has_same_form:
        raise UserError(
            f"{folder.path} holds other data ({folder.source}, {folder.tokenizer}); "
            "choose another --out or remove it."
        )


def begun_at(out: Path) -> str:
    """Return the commit of the hub that the preparation at `out` reads; "" if there is none."""
    for name in (PROGRESS, INDEX):
        try:
            content = parse_json(out / name)
            revision = str(content["revision"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return revision if len(revision) == COMMIT_LENGTH else ""
    return ""


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class _Job:
    """One preparation, by the process that has the lock of its folder."""

    source: Source
    settings: Settings
    out: Path
    workers: int
    disk_budget: int
    consumed: bool
    report: Callable[[Status], None] | None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.stopped = threading.Event()
        self.held: dict[int, int] = {}  # bytes of each file that is fetched or being fetched
        self.progress = self._stored_progress() or self._begin()
        self.bytes_before = self.progress.bytes
        self.splits = Splits(self.out, self.settings, self.progress)
        self.tokenizer = self._find_tokenizer()

    def _begin(self) -> Progress:
        """Write the first `progress.json`, which marks the folder as that of a preparation."""
        if self.source.conversations and self.settings.validation == "first":
            raise UserError(
                "--validation first cuts documents, and conversations are held out whole; leave "
                "it out."
            )
        for path in self.out.iterdir():
            if not path.name.startswith(".") and path.name != TOKENIZER:
                raise UserError(
                    f"{self.out} exists already and holds {path.name}; "
                    "choose another --out or remove it."
                )
        progress = Progress(
            settings=asdict(self.settings),
            source=self.source.name,
            revision=self.source.revision,
            threshold=threshold_of(self.source),
            val_open=self.settings.val_tokens > 0,
            conversations=self.source.conversations,
        )
        write_json(self.out / PROGRESS, asdict(progress), FORMAT)
        return progress

    def _stored_progress(self) -> Progress | None:
        path = self.out / PROGRESS
        if not path.is_file():
            return None
        try:
            content, _ = read_json(path, FORMAT)
            progress = Progress(**content)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove {self.out} and prepare again."
            ) from error
        begun = (
            progress.settings,
            progress.source,
            progress.revision,
            progress.conversations,
        )
        source = self.source
        wanted = (asdict(self.settings), source.name, source.revision, source.conversations)
        if begun != wanted:
            raise UserError(
                f"{self.out} was begun with other settings or another text; "
                "give the same ones to continue, or another --out."
            )
        log.info(
            f"continuing after {counted(progress.documents, 'document')}, "
            f"{progress.bytes / 1e6:,.1f} MB of text"
        )
        return progress

    def _find_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the settings; for train:N, learn it from the training text first.

        It learns from documents that are not held out; of a source on the hub from its first file.
        """
        if not self.settings.tokenizer.startswith("train:"):
            return Tokenizer.find(self.settings.tokenizer, self.out)
        if not (self.out / TOKENIZER).is_file():
            n_vocab = vocabulary_size(self.settings.tokenizer) or 0
            learn(self._training_text(), n_vocab).keep(self.out)
        return Tokenizer.of_folder(self.out)

    def _training_text(self) -> Iterator[bytes]:
        files = [self._fetch(0)] if self.source.is_remote else self.source.files
        for text in self._texts(enumerate(files), skip=0, warn=False):
            if text.split:
                is_training = text.split == "train"
            else:
                is_held_out = hash_of(text.content) < self.progress.threshold
                is_training = self.settings.val_tokens == 0 or not is_held_out
            if is_training and self.source.conversations:
                for message in chat.from_json(text.content):
                    yield message.content.encode()
            elif is_training:
                yield text.content

    def run(self) -> None:
        """Prepare to the end of the source, or of the limit."""
        try:
            for block in self._blocks():
                self._write(block)
                self._advance(block)
                self._save()
                limit = self.settings.limit_tokens
                if limit and self.splits.train.n_tokens >= limit:
                    self.stopped.set()  # nobody needs the file that is being waited for
                    break
            if self.source.conversations and self.progress.documents == 0:
                raise UserError(f"there is no conversation in {self.source.name}: {self._form()}.")
            warning = self.splits.warning()
            if warning:
                log.warning(warning)
            entries = [*self.splits.train.close(), *self.splits.val.close()]
        except BaseException:
            self.stopped.set()
            self.splits.abandon()
            raise
        shards.write_index(
            self.out,
            self.tokenizer.name,
            self.source.name,
            self.source.revision,
            entries,
            documents=self.progress.documents,
            bytes=self.progress.bytes,
            repeats_of_validation=self.progress.dropped,
            settings=asdict(self.settings),
            conversations=self.source.conversations,
        )
        (self.out / PROGRESS).unlink(missing_ok=True)
        shutil.rmtree(self.out / FETCHED, ignore_errors=True)

    def _form(self) -> str:
        """Return the form that conversations have in the first file, for a message."""
        file = self.source.files[0]
        return form_of(Path(file.path) if isinstance(file, HubFile) else file)

    # --- reading ----------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[list[Document]]:
        """Yield blocks of tokenised documents, from where `progress` stands.

        No block spans two fetched files, so each file can be removed when it is done. The next file
        is fetched while one is read.
        """
        numbers = range(self.progress.file, len(self.source.files))
        if not self.source.is_remote:
            yield from self._blocks_of((number, self.source.files[number]) for number in numbers)
            return
        paths = prefetch(self._fetch, numbers, ahead=1)
        for number, path in zip(numbers, paths, strict=True):
            yield from self._blocks_of([(number, path)])
            self.progress.file = number + 1
            self.progress.document = 0
            self._save()
            self._remove_fetched(number)

    def _blocks_of(self, files: Iterable[tuple[int, Path | HubFile]]) -> Iterator[list[Document]]:
        texts = self._texts(files, skip=self.progress.document)
        encode = self.tokenizer.encode_document
        if self.source.conversations:
            encode = partial(chat.encode_document, self.tokenizer)
        block: list[Document] = []
        size = 0
        for document in encode_in_order(texts, encode, self.workers):
            block.append(document)
            size += document.bytes
            if size >= self.settings.block_bytes:
                yield block
                block = []
                size = 0
        if block:
            yield block

    def _texts(
        self, files: Iterable[tuple[int, Path | HubFile]], skip: int, warn: bool = True
    ) -> Iterator[Text]:
        """Yield the documents of numbered files, without the first `skip` of the first file."""
        for number, path in files:
            assert isinstance(path, Path)
            is_cut = self.source.by_position and self.settings.validation == "hash"
            if is_cut and self.settings.val_tokens > 0:
                contents = self.source.documents_in(path, warn=warn)
                for i, piece in enumerate(halves(contents)):
                    if piece and i >= skip:
                        yield Text(number, i, piece, split="val" if i % 2 else "train")
            else:
                contents = self.source.documents_in(path, skip, warn)
                for i, content in enumerate(contents, start=skip):
                    yield Text(number, i, content, split="")
            skip = 0

    def _advance(self, block: list[Document]) -> None:
        self.progress.file = block[-1].file
        self.progress.document = block[-1].number + 1
        self.progress.block += 1
        # A text that is cut in two, for training and validation, is one document.
        self.progress.documents += sum(document.split != "val" for document in block)
        self.progress.bytes += sum(document.bytes for document in block)

    # --- the disk ---------------------------------------------------------------------------------

    def _fetch(self, number: int) -> Path:
        """Download one file of the source, once there is room for it."""
        file = self.source.files[number]
        assert isinstance(file, HubFile)
        what = f"{file.path} of {file.size / 1e6:,.0f} MB"
        self._wait_for_room(file.size, what, is_ahead=number > self.progress.file)
        self.held[number] = file.size
        return hub_datasets.fetch(file, self.out / FETCHED)

    def _remove_fetched(self, number: int) -> None:
        file = self.source.files[number]
        assert isinstance(file, HubFile)
        hub_datasets.drop(file, self.out / FETCHED)
        self.held.pop(number, None)

    def _disk_bytes(self) -> int:
        """Return the bytes on the disk; files that are being fetched count with their full size."""
        fetched = shards.disk_bytes(self.out / FETCHED)
        others = shards.disk_bytes(self.out) - fetched
        held = sum(list(self.held.values()))  # a copy, as another thread adds to it
        return others + max(fetched, held) + OVERHEAD_BYTES

    def _wait_for_room(self, size: int, what: str, is_ahead: bool) -> None:
        """Wait until `size` more bytes fit into the disk budget; UserError if they never will.

        `is_ahead`: an earlier file is still being read, and its removal will make room.
        """
        while self.disk_budget:
            used = self._disk_bytes()
            if used + size <= self.disk_budget:
                return
            if self.stopped.wait(0.1):
                raise UserError("the preparation was stopped.")
            is_reading = self.progress.file < len(self.source.files)
            if not self.consumed and not (is_ahead and is_reading):
                raise UserError(
                    f"the disk budget of {self.disk_budget / 1e6:,.0f} MB is full: "
                    f"{used / 1e6:,.0f} MB are in use and {what} does not fit; run again with a "
                    "larger --disk-budget, which continues where this one stopped."
                )

    # --- writing ----------------------------------------------------------------------------------

    def _write(self, block: list[Document]) -> None:
        """Write a block: held-out documents to validation, the others shuffled to training."""
        documents = self.splits.hold_out(block, self.tokenizer.end_of_text)
        if not documents:
            return
        key = [self.settings.seed, self.progress.block]
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(documents))
        tokens = np.concatenate([documents[i] for i in order])
        what = f"a block of {tokens.nbytes / 1e6:,.0f} MB"
        self._wait_for_room(tokens.nbytes, what, is_ahead=False)
        if self.settings.limit_tokens:
            tokens = tokens[: self.settings.limit_tokens - self.splits.train.n_tokens]
        self.splits.train.write(tokens)

    def _save(self) -> None:
        """Force all tokens to the disk, replace `progress.json`, and report."""
        self.splits.sync()
        write_json(self.out / PROGRESS, asdict(self.progress), FORMAT)
        if self.report:
            self.report(self._status())

    def _status(self) -> Status:
        train_tokens = self.splits.train.n_tokens
        share = self.progress.file / len(self.source.files)
        if self.settings.limit_tokens:
            share = max(share, train_tokens / self.settings.limit_tokens)
        return Status(
            documents=self.progress.documents,
            bytes=self.progress.bytes - self.bytes_before,
            tokens=train_tokens + self.splits.val.n_tokens,
            disk_bytes=shards.disk_bytes(self.out),
            seconds=time.perf_counter() - self.began,
            share=share,
        )
