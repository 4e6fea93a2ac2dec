"""Token files of llm.c, build-nanogpt and nanoGPT, read where they are (not copied), and written.

    anew prepare data/edu --to nanogpt --out nanoGPT/data/edu

| project | files | format |
|---|---|---|
| llm.c | `*_train_*.bin`, `*_val_*.bin` | as in shards.py: a header of 1,024 bytes, then uint16 |
| build-nanogpt | `*_train_*.npy`, `*_val_*.npy` (its validation split is shard 0) | numpy, uint16 |
| nanoGPT | `train.bin`, `val.bin` | uint16 without a header |

These files have no hashes, so only their sizes and headers are checked. The shards of anew have the
format of llm.c, so `--to llm.c` changes their names only.

The token ids are those of GPT-2, unless tokenizer files lie beside them, as `write_others` writes
them for any other tokenizer.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from anew.data.shards import (
    HEADER_BYTES,
    MAGIC,
    TOKEN_BYTES,
    DataFolder,
    Shard,
    header_of,
    map_tokens,
    read_header,
)
from anew.errors import UserError, unknown_name
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.files import has_tokenizer
from anew.utils.disk_errors import with_retries
from anew.utils.files import atomic_folder

FORMATS = ("llm.c", "build-nanogpt", "nanogpt")
NANOGPT_VOCABULARY = "meta.pkl"  # which nanoGPT writes for its vocabularies of characters


@dataclass(frozen=True)
class ForeignShard(Shard):
    """A token file of another project. Its `sha256` is empty; its tokens begin at byte `offset`."""

    offset: int = 0

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) uint16, mapped from the file."""
        return with_retries(self._mapped_tokens, self.path)

    def _mapped_tokens(self) -> np.ndarray:
        expected_size = self.offset + TOKEN_BYTES * self.n_tokens
        if not self.path.is_file() or self.path.stat().st_size != expected_size:
            raise UserError(f"{self.path} has changed since it was opened.")
        return map_tokens(self.path, self.offset, self.n_tokens)


def open_others(path: Path) -> DataFolder | None:
    """Open a folder of token files of another project. Return None if it has no training file."""
    splits: dict[str, list[Shard]] = {}
    for split in ("train", "val"):
        files = sorted([*path.glob(f"*_{split}_*.bin"), *path.glob(f"*_{split}_*.npy")])
        whole_split = path / f"{split}.bin"
        if not files and whole_split.is_file():
            files = [whole_split]
        if split == "train" and not files:
            return None
        splits[split] = [_open_file(file) for file in files]
    return DataFolder(path, _tokenizer_name(path), path.name, "", splits)


def _tokenizer_name(path: Path) -> str:
    """Return the name of the tokenizer of a folder of token files."""
    if has_tokenizer(path):
        return Tokenizer.of_folder(path).name
    if (path / NANOGPT_VOCABULARY).is_file():
        raise UserError(
            f"{path} has a vocabulary of nanoGPT ({NANOGPT_VOCABULARY}), whose ids no tokenizer "
            "of GPT-2 has; prepare its text again, usually input.txt."
        )
    return "gpt2"


def _open_file(path: Path) -> ForeignShard:
    if path.suffix == ".npy":
        return _open_numpy(path)
    size = path.stat().st_size
    header = with_retries(lambda: read_header(path), path)
    if header[0] == MAGIC:
        n_tokens = int(header[2])
        if size != HEADER_BYTES + TOKEN_BYTES * n_tokens:
            raise UserError(
                f"{path} is damaged: its size does not fit the {n_tokens:,} tokens of its header."
            )
        return ForeignShard(path, n_tokens, "", HEADER_BYTES)
    if size % TOKEN_BYTES:
        raise UserError(f"{path} is no file of uint16 tokens: it has an odd number of bytes.")
    return ForeignShard(path, size // TOKEN_BYTES, "", 0)


def _open_numpy(path: Path) -> ForeignShard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no numpy file of tokens ({error}).") from error
    if array.dtype != np.uint16 or array.ndim != 1:
        raise UserError(
            f"{path} holds {array.dtype} in {array.ndim} dimensions; tokens are uint16 in one."
        )
    offset = path.stat().st_size - TOKEN_BYTES * len(array)
    return ForeignShard(path, len(array), "", offset)


def write_others(folder: DataFolder, to: str, out: Path) -> list[Path]:
    """Write the tokens of `folder` as the files of project `to`. Return the paths of the files.

    The folder `out` must not exist. It appears when all files are written. It also gets the files
    of the tokenizer, unless that is GPT-2's.
    """
    if to not in FORMATS:
        raise unknown_name("format", to, FORMATS)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
    with atomic_folder(out) as temporary:
        if tokenizer.name != "gpt2":
            tokenizer.save(temporary)
        for split, shards in folder.splits.items():
            for number, shard in enumerate(shards):
                name = f"{folder.source}_{split}_{number:06d}"
                if to == "build-nanogpt":
                    np.save(temporary / f"{name}.npy", shard.tokens)
                elif to == "nanogpt":
                    with (temporary / f"{split}.bin").open("ab") as file:
                        file.write(shard.tokens.data)
                else:
                    with (temporary / f"{name}.bin").open("wb") as file:
                        file.write(header_of(shard.n_tokens))
                        file.write(shard.tokens.data)
    return sorted(out.iterdir())
