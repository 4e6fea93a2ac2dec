"""The files that hold tokens: a data folder of shards and `index.json`, its reader and its writer.

    folder = DataFolder.open(Path("data/edu"))
    folder.splits["train"][0].tokens            # (n_tokens,) uint16

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros)
followed by the tokens as uint16. This is the format of llm.c, whose tools read these files. Each
document starts with the end-of-text token. `index.json` lists the shards of each split with their
SHA-256; it is written last, so a folder that has one is complete.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from anew.config.values import TOKENIZERS
from anew.errors import UserError
from anew.utils.disk_errors import with_retries
from anew.utils.files import parse_json, rename, sha256_of, write_atomic

if TYPE_CHECKING:
    from anew.data.streaming import ShardsInPreparation

MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024
TOKEN_BYTES = 2
SHARD_TOKENS = 100_000_000
INDEX = "index.json"
PROGRESS = "progress.json"  # of a preparation that has not ended
INDEX_VERSION = 1
CONSUMED = "consumed.json"


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    path: Path
    n_tokens: int
    sha256: str

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) uint16, mapped from the file.

        The first access verifies the file, and raises UserError if anything in it has changed.
        Errors that may pass are met by further attempts. Later accesses read pages of the map: if
        the disk fails there, the system ends the process with SIGBUS.
        """
        try:
            return with_retries(self._verified_tokens, self.path)
        except FileNotFoundError as error:
            raise UserError(
                f"shard {self.path.name} was removed after it was trained on, to keep within the "
                f"disk budget, and is needed again; remove {self.path.parent} and start again "
                "with a larger --disk-budget."
            ) from error
        except OSError as error:
            raise UserError(
                f"shard {self.path} cannot be read ({error.strerror}); check the disk, or prepare "
                "the data again."
            ) from error

    def _verified_tokens(self) -> np.ndarray:
        header = read_header(self.path)
        size = self.path.stat().st_size
        if header[0] != MAGIC:
            raise UserError(
                f"{self.path} is not a shard: it does not start with {MAGIC}; "
                "prepare the data again."
            )
        if header[1] != SHARD_VERSION:
            raise UserError(
                f"shard {self.path} has version {header[1]}, and this version of anew reads "
                f"version {SHARD_VERSION}; prepare the data again."
            )
        has_size = header[2] == self.n_tokens and size == HEADER_BYTES + TOKEN_BYTES * self.n_tokens
        if not has_size or sha256_of(self.path) != self.sha256:
            raise UserError(
                f"shard {self.path} is damaged: its size or sha256 is not what index.json says; "
                "prepare the data again."
            )
        return map_tokens(self.path, HEADER_BYTES, self.n_tokens)

    def n_windows(self, seq_len: int) -> int:
        """Return the number of windows of `seq_len` inputs, whose targets are one token further."""
        return max(0, (self.n_tokens - 1) // seq_len)


def read_header(path: Path) -> np.ndarray:
    """Return the first three int32 of a file: magic, version and number of tokens of a shard.

    They are 0 where the file is shorter.
    """
    # np.fromfile would not do: it takes a failed read for the end of the file.
    with path.open("rb") as file:
        content = file.read(12)
    return np.frombuffer(content.ljust(12, b"\0"), dtype="<i4")


def map_tokens(path: Path, offset: int, n_tokens: int) -> np.ndarray:
    """Return the uint16 tokens after the first `offset` bytes of a file, mapped into memory."""
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(n_tokens,))


@dataclass(frozen=True)
class DataFolder:
    """An opened data folder. As a context manager it ends the preparation that fills it, if any."""

    path: Path
    tokenizer: str
    source: str
    revision: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    preparation: "ShardsInPreparation | None" = None  # while the folder is still being prepared
    conversations: bool = False  # whether its documents are conversations

    @property
    def identity(self) -> str:
        """The revision of the text, and the name of the tokenizer if that is not built in."""
        if self.tokenizer in TOKENIZERS:
            return self.revision
        return f"{self.revision} {self.tokenizer}"

    def n_tokens(self, split: str) -> int:
        """Return the number of tokens in the split "train" or "val"."""
        return sum(shard.n_tokens for shard in self.splits.get(split, []))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.preparation is not None:
            self.preparation.close()

    def shard_waiter(
        self, stop: threading.Event
    ) -> Callable[[int], tuple[list[Shard], bool]] | None:
        """Return what `DataLoader` calls for further shards, or None if there will be none."""
        preparation = self.preparation
        if preparation is None or preparation.complete:
            return None

        def wait_for_more(known: int) -> tuple[list[Shard], bool]:
            shards = preparation.wait_for_more(known, stop)
            return shards, preparation.complete

        return wait_for_more

    @classmethod
    def open(cls, path: Path) -> "DataFolder":
        """Read `index.json`. Its shards must exist; `Shard.tokens` verifies them later."""
        if not (path / INDEX).is_file():
            if (path / PROGRESS).is_file():
                raise UserError(is_unfinished(path))
            raise UserError(f"{path} is not a data folder; anew prepare makes one from a text.")
        try:
            index = with_retries(lambda: parse_json(path / INDEX), path / INDEX)
            if index["version"] != INDEX_VERSION or index["dtype"] != "uint16":
                raise UserError(
                    f"{path / INDEX} has version {index['version']} and dtype {index['dtype']}; "
                    f"this version of anew reads version {INDEX_VERSION}, uint16."
                )
            splits = _splits_of(path, index["shards"])
            return cls(
                path,
                index["tokenizer"],
                index["source"],
                index["revision"],
                splits,
                conversations=index.get("conversations", False),
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a data folder: its {INDEX} cannot be read ({error})."
            ) from error


def is_unfinished(path: Path) -> str:
    """Return the sentence that refuses a data folder whose preparation has not ended."""
    return f"the preparation of {path} is not complete; run the same anew prepare command again."


def _splits_of(path: Path, entries: list[dict[str, Any]]) -> dict[str, list[Shard]]:
    """Return the shards of each split. Only training shards that were consumed may be missing."""
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    n_consumed = consumed(path)
    for entry in entries:
        split = entry["split"]
        name = Path(entry["name"]).name
        shard = Shard(path / name, int(entry["tokens"]), entry["sha256"])
        was_consumed = split == "train" and len(splits["train"]) < n_consumed
        if not was_consumed and not shard.path.is_file():
            raise UserError(
                f"{path / INDEX} names {name}, which is missing; prepare the data again."
            )
        splits[split].append(shard)
    return splits


def header_of(n_tokens: int) -> bytes:
    """Return the bytes in front of the tokens of a shard."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, SHARD_VERSION, n_tokens
    return header.tobytes()


@dataclass
class SplitWriter:
    """Writes the tokens of one split as shards of `shard_tokens`.

    The shard that is being written is called `train-00003.bin.part`. `entries` (the finished
    shards) and `unfinished` (the tokens in the part) after a `sync` are the whole state: a new
    writer that is given them continues there, and removes what a killed writer wrote after that
    `sync`.
    """

    folder: Path
    split: str
    shard_tokens: int = SHARD_TOKENS
    entries: list[dict[str, Any]] = field(default_factory=list)
    unfinished: int = 0

    def __post_init__(self) -> None:
        part = self._part
        finished = part.with_suffix("")
        if finished.exists() and not part.exists():  # finished after the last sync
            rename(finished, part)
        known = {part.name, *(entry["name"] for entry in self.entries)}
        for path in self.folder.glob(f"{self.split}-*.bin*"):
            if path.name not in known:
                path.unlink()
        if part.exists() and part.stat().st_size < HEADER_BYTES + TOKEN_BYTES * self.unfinished:
            raise UserError(
                f"{part} is shorter than what was written to it; "
                f"remove {self.folder} and prepare again."
            )
        self.file = self._open_part()

    @property
    def _part(self) -> Path:
        return self.folder / f"{self.split}-{len(self.entries):05d}.bin.part"

    def _open_part(self) -> BinaryIO:
        """Open the part to append to its first `unfinished` tokens, or to an empty header."""
        file = self._part.open("r+b" if self._part.exists() else "w+b")
        file.truncate(HEADER_BYTES + TOKEN_BYTES * self.unfinished)
        file.seek(0, os.SEEK_END)
        return file

    @property
    def n_tokens(self) -> int:
        """The number of tokens written so far."""
        return sum(int(entry["tokens"]) for entry in self.entries) + self.unfinished

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, and finish each shard that becomes full."""
        tokens = tokens.astype("<u2", copy=False)
        while self.unfinished + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self.unfinished
            self._append(tokens[:room])
            self.cut()
            tokens = tokens[room:]
        self._append(tokens)

    def _append(self, tokens: np.ndarray) -> None:
        self.file.write(tokens.tobytes())
        self.unfinished += len(tokens)

    def sync(self) -> None:
        """Force everything that was written to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def cut(self) -> None:
        """Finish the current shard, unless it is empty, and begin the next one."""
        if self.unfinished:
            self._finish()
            self.file = self._open_part()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last, shorter shard. Return the entries of this split for `index.json`."""
        if self.unfinished:
            self._finish()
        else:
            self.file.close()
            self._part.unlink()
        return self.entries

    def _finish(self) -> None:
        """Complete the part and rename it: a file without `.part` is always a whole shard."""
        self.file.seek(0)
        self.file.write(header_of(self.unfinished))
        self.sync()
        self.file.close()
        part = self._part
        entry = {
            "name": part.stem,
            "split": self.split,
            "tokens": self.unfinished,
            "sha256": sha256_of(part),
        }
        rename(part, part.with_suffix(""))
        self.entries.append(entry)
        self.unfinished = 0


def write_index(
    folder: Path,
    tokenizer: str,
    source: str,
    revision: str,
    entries: Sequence[dict[str, Any]],
    **more: Any,
) -> None:
    """Write `index.json`, the last file of a data folder. Readers do not need `more`."""
    index = {
        "version": INDEX_VERSION,
        "tokenizer": tokenizer,
        "dtype": "uint16",
        "source": source,
        "revision": revision,
        "shards": list(entries),
        **more,
    }
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def consumed(folder: Path) -> int:
    """Return how many training shards, counted from the first, were removed after use."""
    try:
        return int(parse_json(folder / CONSUMED))
    except (OSError, ValueError):
        return 0


def consume(shards: Sequence[Shard], count: int) -> None:
    """Remove the first `count` training shards, which no run needs any more."""
    folder = shards[0].path.parent
    if count <= consumed(folder):
        return
    note = folder / CONSUMED
    with_retries(lambda: write_atomic(note, f"{count}\n"), note)
    for shard in shards[:count]:
        # Windows does not remove a file that is mapped into memory. Where another reader still maps
        # it, it is removed together with the next shard.
        shard.__dict__.pop("tokens", None)
        with contextlib.suppress(PermissionError):
            with_retries(partial(shard.path.unlink, missing_ok=True), shard.path)


def disk_bytes(folder: Path) -> int:
    """Return the size of all files under `folder`, hidden ones included."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += os.stat(Path(root, name)).st_size
    return total
