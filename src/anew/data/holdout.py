"""The settings and the progress of a preparation, and which documents are held out for validation.

Documents are held out by their hash: a tenth of all hashes lies below the threshold, until there
are `val_tokens`. So a document stays in its split when others are added or the order changes, and
repeats of a held-out document are recognised. A single text is cut instead: its last tenth is held
out. With `val_tokens` 0 nothing is held out.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anew.data.shards import SHARD_TOKENS, SplitWriter
from anew.data.sources import Source
from anew.data.tokenize import Document, hash_of
from anew.utils.words import counted

HELD_OUT_OF = 10  # one of so many documents is held out
SMALL_BYTES = 64 << 20  # a source up to this size holds out at least one document
FEWEST_SHARE = 0.01  # of all tokens; there is a warning if fewer are held out

# Tokens of the validation split. build-nanogpt and llm.c validate on 20 to 160 batches, which
# depends on the hardware; here it is one number.
VAL_TOKENS = 10_485_760
# Their validation split is the first shard of FineWeb-Edu, in the order of its files
# (`validation="first"`).
SHARD_0_TOKENS = 100_000_000


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a data folder, besides the source."""

    tokenizer: (
        str  # a name (of a learned tokenizer: its files are in the folder), or train:N to learn N
    )
    limit_tokens: int = 0
    val_tokens: int = VAL_TOKENS
    shard_tokens: int = SHARD_TOKENS
    seed: int = 1337
    block_bytes: int = 32 << 20  # text that is tokenised, shuffled and written together
    validation: str = "hash"  # by hash; "first": the first val_tokens of the source


@dataclass
class Progress:
    """The state of a preparation, as `progress.json` holds it: all that a restart needs."""

    settings: dict[str, Any]
    source: str
    revision: str
    threshold: int
    file: int = 0  # the file to continue with
    document: int = 0  # documents of that file that are done
    block: int = 0
    documents: int = 0
    bytes: int = 0
    dropped: int = 0  # documents that repeat a held-out one
    finished: dict[str, list[dict[str, Any]]] | None = None  # shards by split
    unfinished: dict[str, int] | None = None
    val_open: bool = True  # whether documents are still held out
    val_hashes: list[int] | None = None
    conversations: bool = False


def threshold_of(source: Source) -> int:
    """Return the hash below which documents are held out.

    It is a tenth of the range of hashes. For a small source it is higher where that is needed to
    hold out one document; so a small source is read once more, before its preparation.
    """
    threshold = 2**64 // HELD_OUT_OF
    if source.is_remote or source.by_position or source.total_bytes > SMALL_BYTES:
        return threshold
    documents = itertools.islice(source.documents(warn=False), 10_000)
    hashes = [hash_of(document) for document in documents]
    if len(hashes) < 2:
        return threshold
    return max(threshold, min(hashes) + 1)


def halves(documents: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the first nine tenths of each text, then its rest; in characters if it is UTF-8."""
    for content in documents:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            cut = len(content) * (HELD_OUT_OF - 1) // HELD_OUT_OF
        else:
            cut = len(text[: len(text) * (HELD_OUT_OF - 1) // HELD_OUT_OF].encode())
        yield content[:cut]
        yield content[cut:]


class Splits:
    """The training and the validation split of one preparation, continued from its progress."""

    def __init__(self, out: Path, settings: Settings, progress: Progress) -> None:
        def writer(split: str) -> SplitWriter:
            entries = (progress.finished or {}).get(split, [])
            unfinished = (progress.unfinished or {}).get(split, 0)
            return SplitWriter(out, split, settings.shard_tokens, entries, unfinished)

        self.train = writer("train")
        self.val = writer("val")
        self.settings = settings
        self.progress = progress
        self.val_hashes = set(progress.val_hashes or [])

    def hold_out(self, block: list[Document], end_of_text: int) -> list[np.ndarray]:
        """Write the held-out documents of a block. Return the tokens of each training document.

        The end-of-text token comes first in every document. A training document that repeats a
        held-out one is dropped.
        """
        first = np.array([end_of_text], dtype="<u2")
        train = []
        for document in block:
            tokens = np.concatenate([first, document.tokens])
            if self._is_held_out(document):
                tokens = self._write_held_out(tokens, document)
            elif document.split == "" and document.hash in self.val_hashes:
                self.progress.dropped += 1
                continue
            if len(tokens):
                train.append(tokens)
        return train

    def _is_held_out(self, document: Document) -> bool:
        if document.split:
            return document.split == "val"
        if not self.progress.val_open:
            return False
        return self.settings.validation == "first" or document.hash < self.progress.threshold

    def _write_held_out(self, tokens: np.ndarray, document: Document) -> np.ndarray:
        """Write a document to the validation split. Return the tokens that belong to training.

        With "first" the split has exactly `val_tokens`, so the last document is cut; else it is
        whole.
        """
        room = len(tokens)
        if self.settings.validation == "first":
            room = self.settings.val_tokens - self.val.n_tokens
        self.val.write(tokens[:room])
        self.val_hashes.add(document.hash)
        if document.split == "" and self.val.n_tokens >= self.settings.val_tokens:
            self.progress.val_open = False
            self.val.cut()  # the split is complete from here on, so that training may start
        return tokens[room:]

    def warning(self) -> str:
        """Return a sentence if so little text is held out that its loss says little, or ""."""
        wanted = self.settings.val_tokens
        held_out = self.val.n_tokens
        total = held_out + self.train.n_tokens
        if held_out >= min(wanted, FEWEST_SHARE * total):
            return ""
        advice = "Join the documents into one file: its last tenth is held out."
        if self.progress.conversations:
            advice = "Give more conversations."
        return (
            f"only {held_out:,} of {total:,} tokens are held out, because whole documents are, and "
            f"the text has {counted(self.progress.documents, 'document')}; the validation loss "
            f"will say little. {advice}"
        )

    def sync(self) -> None:
        """Force everything written to the disk, and note the state of both splits in `progress`."""
        self.train.sync()
        self.val.sync()
        self.progress.finished = {"train": self.train.entries, "val": self.val.entries}
        self.progress.unfinished = {"train": self.train.unfinished, "val": self.val.unfinished}
        self.progress.val_hashes = sorted(self.val_hashes)

    def abandon(self) -> None:
        """Close the files as they are. The next preparation continues from the stored progress."""
        self.train.file.close()
        self.val.file.close()
