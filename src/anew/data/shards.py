"""The files that hold tokens: a data folder of shards and its `index.json`. Reader and writer, side by side.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens as uint16: the
format of llm.c, which its tools read as it is. Each document starts with end-of-text. `index.json` names the shards of each split with
their sha256; it is written last, so a folder that has one is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from anew.config import UserError

MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
INDEX_VERSION = 1
SHARD_TOKENS = 100_000_000


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file of tokens. It is checked when it is first read: a flipped bit is refused, never trained on."""

    path: Path
    n_tokens: int
    sha256: str

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) uint16, mapped from the file."""
        try:
            header = np.fromfile(self.path, dtype="<i4", count=3)
            right_size = self.path.stat().st_size == HEADER_BYTES + 2 * self.n_tokens
        except OSError as error:
            raise UserError(f"shard {self.path} cannot be read ({error.strerror}); prepare the data again.") from error
        if len(header) < 3 or header[0] != MAGIC:
            raise UserError(f"{self.path} is not a shard: it does not start with {MAGIC}; prepare the data again.")
        if header[1] != SHARD_VERSION:
            raise UserError(
                f"shard {self.path} has version {header[1]}, and this anew reads version {SHARD_VERSION}; prepare the data again."
            )
        if header[2] != self.n_tokens or not right_size or sha256_of(self.path) != self.sha256:
            raise UserError(f"shard {self.path} is damaged: its size or sha256 is not what index.json says; prepare the data again.")
        return np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,))


@dataclass(frozen=True)
class DataFolder:
    """An opened data folder."""

    path: Path
    tokenizer: str
    source: str
    revision: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)

    def n_tokens(self, split: str) -> int:
        """Tokens in the split "train" or "val"."""
        return sum(shard.n_tokens for shard in self.splits.get(split, []))

    @classmethod
    def open(cls, path: Path) -> "DataFolder":
        """Read `index.json`; every shard must be there, their contents are checked when read."""
        try:
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            if index["version"] != INDEX_VERSION or index["dtype"] != "uint16":
                raise UserError(
                    f"{path}/index.json has version {index['version']} and dtype {index['dtype']}; "
                    f"this anew reads version {INDEX_VERSION}, uint16."
                )
            splits: dict[str, list[Shard]] = {"train": [], "val": []}
            for entry in index["shards"]:
                shard = Shard(path / Path(entry["name"]).name, int(entry["tokens"]), entry["sha256"])
                if not shard.path.is_file():
                    raise UserError(f"{path}/index.json names {shard.path.name}, which is missing; prepare the data again.")
                splits[entry["split"]].append(shard)
            return cls(path, index["tokenizer"], index["source"], index["revision"], splits)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a data folder: its index.json cannot be read ({error}).") from error


@dataclass
class SplitWriter:
    """Cuts one split's stream of tokens into shards of `shard_tokens`."""

    folder: Path
    split: str
    shard_tokens: int = SHARD_TOKENS
    entries: list[dict[str, object]] = field(default_factory=list)
    pending: list[np.ndarray] = field(default_factory=list)
    n_pending: int = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append one document (its end-of-text first)."""
        self.pending.append(tokens.astype("<u2", copy=False))
        self.n_pending += len(tokens)
        while self.n_pending >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def close(self) -> list[dict[str, object]]:
        """Write what is left; the entries of this split for `index.json`."""
        if self.n_pending:
            self._flush(self.n_pending)
        return self.entries

    def _flush(self, n: int) -> None:
        stream = np.concatenate(self.pending)
        tokens, self.pending = stream[:n], [stream[n:]]
        self.n_pending = len(stream) - n
        path = self.folder / f"{self.split}-{len(self.entries):05d}.bin"
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, SHARD_VERSION, n
        with path.open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.entries.append({"name": path.name, "split": self.split, "tokens": n, "sha256": sha256_of(path)})


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    If somebody else has finished the same folder meanwhile, theirs stays.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not (path / "index.json").exists():
            if path.is_dir():  # empty: Windows does not replace even that
                path.rmdir()
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_index(folder: Path, tokenizer: str, source: str, revision: str, shards: Sequence[dict[str, object]]) -> None:
    """Write `index.json`: the last file of a data folder."""
    index = {
        "version": INDEX_VERSION,
        "tokenizer": tokenizer,
        "dtype": "uint16",
        "source": source,
        "revision": revision,
        "shards": list(shards),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
