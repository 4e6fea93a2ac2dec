"""Small texts, shards and data folders for tests."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from anew import Tokenizer
from anew.data.holdout import Settings
from anew.data.shards import DataFolder, Shard, SplitWriter
from anew.data.sources import Source

GPT2 = Tokenizer.named("gpt2")
SMALL = Settings("gpt2", shard_tokens=20_000, block_bytes=8_000, val_tokens=6_000)
SMALL_BYTES = Settings("bytes", shard_tokens=20_000, block_bytes=8_000, val_tokens=6_000)
WORDS = [
    "the",
    "king",
    "crosses",
    "a",
    "river",
    "and",
    "12",
    "ships",
    "leave",
    "while",
    "nobody",
    "sees",
    "them",
    "again",
]


def make_shards(folder: Path, lengths: list[int]) -> list[Shard]:
    """Write shards of these lengths, with tokens 0, 1, 2 ... across all of them."""
    shards = []
    start = 0
    for number, length in enumerate(lengths):
        writer = SplitWriter(folder, f"part{number}")
        writer.write(np.arange(start, start + length, dtype=np.uint16))
        shards += [shard_of(folder, entry) for entry in writer.close()]
        start += length
    return shards


def shard_of(folder: Path, entry: dict[str, Any]) -> Shard:
    """Return the shard that an entry of index.json describes."""
    return Shard(folder / entry["name"], entry["tokens"], entry["sha256"])


def file_names(source: Source) -> list[str]:
    """Return the names of the files of a source on this machine."""
    names = []
    for file in source.files:
        assert isinstance(file, Path)
        names.append(file.name)
    return names


def write_documents(path: Path, documents: list[str]) -> None:
    """Write documents as JSON lines."""
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    path.write_text("".join(lines))


def write_posts(path: Path) -> None:
    """Write 1,500 documents of uneven length, about 0.9 MB."""
    generator = random.Random(1)
    documents = []
    for number in range(1500):
        length = generator.choice([3, 40, 300])
        documents.append(" ".join(generator.choices(WORDS, k=length)) + f" {number}")
    write_documents(path, documents)


def read_documents(path: Path) -> list[str]:
    """Return the documents of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a finished data folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def tokens_of(folder: DataFolder, split: str) -> np.ndarray:
    """Return the tokens of all shards of a split."""
    return np.concatenate([shard.tokens for shard in folder.splits[split]])


def texts_of(folder: DataFolder, split: str, tokenizer: Tokenizer = GPT2) -> list[str]:
    """Return the documents of a split, decoded."""
    text = tokenizer.decode(tokens_of(folder, split).tolist())
    return text.split("<|endoftext|>")[1:]
