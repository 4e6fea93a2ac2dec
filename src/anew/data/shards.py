"""The files that hold tokens: a data folder of shards and its `index.json`. Reader and writer, side by side.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens as uint16: the
format of llm.c, which its tools read as it is. Each document starts with end-of-text. `index.json` names the shards of each split with
their sha256; it is written last, so a folder that has one is whole.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from anew.config.values import TOKENIZERS
from anew.errors import UserError
from anew.utils.files import rename, sha256_of, write_atomic

MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
INDEX_VERSION = 1
SHARD_TOKENS = 100_000_000
CONSUMED = "consumed.json"


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
        except FileNotFoundError as error:
            raise UserError(
                f"shard {self.path.name} was removed after it was trained on, to keep within the disk budget, and is needed again; remove "
                f"{self.path.parent} and start again with a larger --disk-budget."
            ) from error
        except OSError as error:
            raise UserError(
                f"shard {self.path} cannot be read ({error.strerror}); prepare the data again."
            ) from error
        if len(header) < 3 or header[0] != MAGIC:
            raise UserError(
                f"{self.path} is not a shard: it does not start with {MAGIC}; prepare the data again."
            )
        if header[1] != SHARD_VERSION:
            raise UserError(
                f"shard {self.path} has version {header[1]}, and this anew reads version {SHARD_VERSION}; prepare the data again."
            )
        if header[2] != self.n_tokens or not right_size or sha256_of(self.path) != self.sha256:
            raise UserError(
                f"shard {self.path} is damaged: its size or sha256 is not what index.json says; prepare the data again."
            )
        return np.memmap(
            self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,)
        )


@dataclass(frozen=True)
class DataFolder:
    """An opened data folder."""

    path: Path
    tokenizer: str
    source: str
    revision: str
    splits: dict[str, list[Shard]] = field(default_factory=dict)
    growth: Any = None  # open.Growth, while the folder is still being prepared

    @property
    def identity(self) -> str:
        """What the tokens are: the revision of the text, and the vocabulary where it is not a built-in one."""
        return (
            self.revision if self.tokenizer in TOKENIZERS else f"{self.revision} {self.tokenizer}"
        )

    def n_tokens(self, split: str) -> int:
        """Tokens in the split "train" or "val"."""
        return sum(shard.n_tokens for shard in self.splits.get(split, []))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.growth is not None:
            self.growth.close()

    def more(self, stop: threading.Event) -> Callable[[int], tuple[list[Shard], bool]] | None:
        """What `Batches` asks for further shards, if there will be any."""
        growth = self.growth
        return (
            None
            if growth is None or growth.complete
            else lambda known: (growth.wait_for_more(known, stop), growth.complete)
        )

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
                shard = Shard(
                    path / Path(entry["name"]).name, int(entry["tokens"]), entry["sha256"]
                )
                if not shard.path.is_file() and (entry["split"], len(splits["train"])) >= (
                    "train",
                    consumed(path),
                ):
                    raise UserError(
                        f"{path}/index.json names {shard.path.name}, which is missing; prepare the data again."
                    )
                splits[entry["split"]].append(shard)
            return cls(path, index["tokenizer"], index["source"], index["revision"], splits)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a data folder: its index.json cannot be read ({error})."
            ) from error


def header_of(n_tokens: int) -> bytes:
    """What stands before the tokens in a shard."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, SHARD_VERSION, n_tokens
    return header.tobytes()


@dataclass
class SplitWriter:
    """Cuts one split's stream of tokens into shards of `shard_tokens`; can be stopped after any `sync` and taken up again.

    The shard being written is `train-00003.bin.part`. `entries` (the finished shards) and `unfinished` (tokens in the part) are all that
    has to be remembered: what a killed writer wrote behind them is cut off.
    """

    folder: Path
    split: str
    shard_tokens: int = SHARD_TOKENS
    entries: list[dict[str, Any]] = field(default_factory=list)
    unfinished: int = 0

    def __post_init__(self) -> None:
        part, final = self._part, self._part.with_suffix("")
        if (
            not part.exists() and final.exists()
        ):  # killed between finishing this shard and remembering it
            rename(final, part)
        for path in self.folder.glob(f"{self.split}-*.bin*"):
            if path != part and path.name not in {entry["name"] for entry in self.entries}:
                path.unlink()
        if part.exists() and part.stat().st_size < HEADER_BYTES + 2 * self.unfinished:
            raise UserError(
                f"{part} is shorter than was written to it; remove {self.folder} and prepare again."
            )
        self.file = part.open("r+b" if part.exists() else "w+b")
        self.file.truncate(HEADER_BYTES + 2 * self.unfinished)
        self.file.seek(0, os.SEEK_END)

    @property
    def _part(self) -> Path:
        return self.folder / f"{self.split}-{len(self.entries):05d}.bin.part"

    @property
    def n_tokens(self) -> int:
        """Tokens written so far."""
        return sum(int(entry["tokens"]) for entry in self.entries) + self.unfinished

    def write(self, tokens: np.ndarray) -> None:
        """Append documents' tokens (each with its end-of-text first)."""
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
        """Everything written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> list[dict[str, Any]]:
        """The split ends here: what is unfinished becomes its last, shorter shard. The entries of this split for `index.json`."""
        if self.unfinished:
            self._finish()
        else:
            self.file.close()
            self._part.unlink()
        return self.entries

    def cut(self) -> None:
        """End the shard here."""
        if self.unfinished:
            self._finish()
            self.file = self._part.open("w+b")
            self.file.truncate(HEADER_BYTES)
            self.file.seek(0, os.SEEK_END)

    def _finish(self) -> None:
        """Header, flush, hash, rename: a file without `.part` is always a whole shard."""
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
    """Write `index.json`: the last file of a data folder. `more` says where it comes from; readers do not need it."""
    index = {
        "version": INDEX_VERSION,
        "tokenizer": tokenizer,
        "dtype": "uint16",
        "source": source,
        "revision": revision,
    }
    write_atomic(
        folder / "index.json",
        json.dumps({**index, "shards": list(entries), **more}, indent=2) + "\n",
    )


def consumed(folder: Path) -> int:
    """How many training shards, from the first on, were removed after use."""
    try:
        return int(json.loads((folder / CONSUMED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0


def consume(shards: Sequence[Shard], count: int) -> None:
    """Remove the first `count` training shards: a run is done with them."""
    folder = shards[0].path.parent
    if count > consumed(folder):
        write_atomic(folder / CONSUMED, f"{count}\n")
        for shard in shards[:count]:
            shard.__dict__.pop(
                "tokens", None
            )  # Windows does not remove a file that is mapped into memory
            with contextlib.suppress(
                PermissionError
            ):  # still mapped by a reader: removed with the next shard
                shard.path.unlink(missing_ok=True)


def disk_bytes(folder: Path) -> int:
    """What the files under `folder` take, hidden ones too."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(Path(root, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total
