"""Token files of other projects: read as a data folder where they are, with no copy and no index, and written.

    anew prepare data/edu --to nanogpt --out nanoGPT/data/edu

| project | files | format |
|---|---|---|
| llm.c | `*_train_*.bin`, `*_val_*.bin` | ours: a header of 1,024 bytes, uint16 |
| build-nanogpt | `*_train_*.npy`, `*_val_*.npy` (shard 0 is its validation) | numpy, uint16 |
| nanoGPT | `train.bin`, `val.bin` | uint16 and nothing else |

They carry no hashes, so only their sizes and headers are checked. Our own shards are llm.c's, so its tools read them as they are; its
names are all that `--to llm.c` changes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from anew.data.shards import HEADER_BYTES, MAGIC, DataFolder, Shard, header_of
from anew.errors import UserError
from anew.utils.files import atomic_folder

FORMATS = ("llm.c", "build-nanogpt", "nanogpt")


@dataclass(frozen=True)
class ForeignShard(Shard):
    """One of their files; `sha256` is empty, and `offset` bytes stand before the tokens."""

    offset: int = 0

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) uint16, mapped from the file."""
        if not self.path.is_file() or self.path.stat().st_size != self.offset + 2 * self.n_tokens:
            raise UserError(f"{self.path} has changed since it was opened.")
        return np.memmap(
            self.path, dtype="<u2", mode="r", offset=self.offset, shape=(self.n_tokens,)
        )


def open_others(path: Path) -> DataFolder | None:
    """The folder as token files of one of these projects, or None if it holds none of them."""
    found: dict[str, list[Path]] = {}
    for split in ("train", "val"):
        files = [p for suffix in ("bin", "npy") for p in path.glob(f"*_{split}_*.{suffix}")]
        found[split] = sorted(files) or [p for p in (path / f"{split}.bin",) if p.is_file()]
    if not found["train"]:
        return None
    splits: dict[str, list[Shard]] = {
        split: [_shard(file) for file in files] for split, files in found.items()
    }
    return DataFolder(path, "gpt2", path.name, "", splits)


def write_others(folder: DataFolder, to: str, out: Path) -> list[Path]:
    """The tokens of `folder` in the files of another project, in a new folder `out`, which appears whole; the files."""
    if to not in FORMATS:
        raise UserError(f"there is no format '{to}'; choose one of {', '.join(FORMATS)}.")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as temporary:
        for split, found in folder.splits.items():
            for i, shard in enumerate(found):
                name = f"{folder.source}_{split}_{i:06d}"
                if to == "nanogpt":
                    with (temporary / f"{split}.bin").open("ab") as file:
                        file.write(shard.tokens.data)
                elif to == "build-nanogpt":
                    np.save(temporary / f"{name}.npy", shard.tokens)
                else:
                    with (temporary / f"{name}.bin").open("wb") as file:
                        file.write(header_of(shard.n_tokens))
                        file.write(shard.tokens.data)
    return sorted(out.iterdir())


def _shard(path: Path) -> ForeignShard:
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no numpy file of tokens ({error}).") from error
        if array.dtype != np.uint16 or array.ndim != 1:
            raise UserError(
                f"{path} holds {array.dtype} of {array.ndim} dimensions, and tokens are uint16 in a row."
            )
        return ForeignShard(path, len(array), "", size - 2 * len(array))
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) == 3 and header[0] == MAGIC:
        if size != HEADER_BYTES + 2 * int(header[2]):
            raise UserError(
                f"{path} is damaged: its header says {header[2]:,} tokens, and its size another number."
            )
        return ForeignShard(path, int(header[2]), "", HEADER_BYTES)
    if size % 2:
        raise UserError(f"{path} is no file of uint16 tokens: it has an odd number of bytes.")
    return ForeignShard(path, size // 2, "", 0)
