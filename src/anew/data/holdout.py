"""What goes where: the settings that decide a data folder, how far its preparation is, and its two splits while they are written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anew.data.shards import SHARD_TOKENS, SplitWriter
from anew.data.tokenize import Document

VAL_TOKENS = 10_485_760  # what build-nanogpt and llm.c validate on is 20 to 160 batches, by hardware; here it is one number
SHARD_0_TOKENS = (
    100_000_000  # their validation split: the first shard of FineWeb-Edu, in the order of its files
)


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a data folder, besides the source."""

    tokenizer: str  # a name, or train:N: learn N from this text; one of one's own is in the folder beforehand
    limit_tokens: int = 0
    val_tokens: int = VAL_TOKENS
    shard_tokens: int = SHARD_TOKENS
    seed: int = 1337
    block_bytes: int = 32 << 20  # text that is tokenised, shuffled and remembered together
    validation: str = (
        "hash"  # documents chosen by their hash; "first": the first val_tokens of the source
    )


@dataclass
class Progress:
    """How far a preparation is: all that `progress.json` holds, and all that a restart needs."""

    settings: dict[str, Any]
    source: str
    revision: str
    threshold: int
    file: int = 0  # the file to go on with
    document: int = 0  # documents of it that are done
    block: int = 0
    documents: int = 0
    bytes: int = 0
    dropped: int = 0  # documents that repeat a held-out one
    finished: dict[str, list[dict[str, Any]]] | None = None  # shards by split
    unfinished: dict[str, int] | None = None
    val_open: bool = True
    val_hashes: list[int] | None = None


class Splits:
    """The training and the validation split of one preparation, from where `progress` says they are."""

    def __init__(self, out: Path, settings: Settings, progress: Progress) -> None:
        finished, unfinished = progress.finished or {}, progress.unfinished or {}
        self.train, self.val = (
            SplitWriter(
                out, split, settings.shard_tokens, finished.get(split, []), unfinished.get(split, 0)
            )
            for split in ("train", "val")
        )
        self.settings, self.threshold = settings, progress.threshold
        self.val_open, self.dropped = progress.val_open, progress.dropped
        self.val_hashes = set(progress.val_hashes or [])

    def hold_out(self, block: list[Document], end_of_text: int) -> list[np.ndarray]:
        """Write what belongs to validation, until that is full; the tokens of each document for training, end of text first."""
        end = np.array([end_of_text], dtype="<u2")
        train = []
        for document in block:
            tokens = np.concatenate([end, document.tokens])
            if self._is_held_out(document):
                tokens = self._validate(tokens, document)
            elif document.split == "" and document.hash in self.val_hashes:
                self.dropped += 1  # the same text as a held-out document
                continue
            if len(tokens):
                train.append(tokens)
        return train

    def _is_held_out(self, document: Document) -> bool:
        if document.split:
            return document.split == "val"
        return self.val_open and (
            self.settings.validation == "first" or document.hash < self.threshold
        )

    def _validate(self, tokens: np.ndarray, document: Document) -> np.ndarray:
        """Write a held-out document. With "first", exactly val_tokens are; what is left over of the last document is returned."""
        wanted = self.settings.val_tokens
        room = wanted - self.val.n_tokens if self.settings.validation == "first" else len(tokens)
        self.val.write(tokens[:room])
        self.val_hashes.add(document.hash)
        if document.split == "" and self.val.n_tokens >= wanted:
            self.val_open = False
            self.val.cut()  # whole from now on, so that training may start
        return tokens[room:]

    def remember(self, progress: Progress) -> None:
        """Everything written is on the disk, and `progress` says so."""
        self.train.sync()
        self.val.sync()
        progress.finished = {"train": self.train.entries, "val": self.val.entries}
        progress.unfinished = {"train": self.train.unfinished, "val": self.val.unfinished}
        progress.val_open, progress.dropped, progress.val_hashes = (
            self.val_open,
            self.dropped,
            sorted(self.val_hashes),
        )

    def abandon(self) -> None:
        """Let go of the files; what `progress.json` says last is where the next preparation goes on."""
        self.train.file.close()
        self.val.file.close()
