"""From a source to a data folder: read, split, tokenise, write shards.

    anew prepare my.txt --out data/mine --tokenizer gpt2

`open_data` is what training calls: it takes a prepared folder as it is, and prepares anything else once into a cache keyed by the
source's name, its revision (a sha256 over its documents) and the tokenizer.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from anew.config import UserError
from anew.data import shards, sources
from anew.tokenizer import Tokenizer

log = logging.getLogger("anew")

HELD_OUT_OF = 10  # a tenth of the text is never trained on
BATCH_DOCUMENTS = 256


def open_data(data: str, tokenizer: str) -> shards.DataFolder:
    """The data folder that `--data` means, prepared now if it has to be. Its tokenizer must be `tokenizer`."""
    path = Path(data).expanduser()
    if (path / "index.json").is_file():
        folder = shards.DataFolder.open(path)
        if folder.tokenizer != tokenizer:
            raise UserError(
                f"{path} was prepared with the tokenizer {folder.tokenizer}, and this run uses {tokenizer}; "
                f"add --tokenizer {folder.tokenizer}."
            )
        return folder
    source = sources.find(data)
    revision = source.revision()
    cached = sources.cache_folder() / "data" / f"{source.name}-{tokenizer}-{revision[:12]}"
    if not (cached / "index.json").is_file():
        log.info(f"preparing {data} with the {tokenizer} tokenizer into {cached}")
        prepare(source, revision, Tokenizer.named(tokenizer), cached)
    return shards.DataFolder.open(cached)


def prepare(source: sources.Source, revision: str, tokenizer: Tokenizer, out: Path) -> None:
    """Write `source` as a data folder at `out`: whole, or not at all."""
    with shards.writing(out) as folder:
        writers = {split: shards.SplitWriter(folder, split) for split in ("train", "val")}
        pieces = _split_by_position(source) if source.by_position else _split_by_document(source)
        for batch in _batched(pieces):
            for (split, _), ids in zip(batch, tokenizer.encode_documents([text for _, text in batch]), strict=True):
                writers[split].write(np.concatenate([np.array([tokenizer.end_of_text], dtype=np.uint16), ids]))
        entries = [entry for writer in writers.values() for entry in writer.close()]
        shards.write_index(folder, tokenizer.name, source.name, revision, entries)


def _split_by_position(source: sources.Source) -> Iterator[tuple[str, bytes]]:
    """The first nine tenths of one text (by characters, where it is UTF-8) train, the rest is held out."""
    for content in source.documents():
        try:
            text = content.decode()
            at = len(text[: len(text) * (HELD_OUT_OF - 1) // HELD_OUT_OF].encode())
        except UnicodeDecodeError:
            at = len(content) * (HELD_OUT_OF - 1) // HELD_OUT_OF
        yield "train", content[:at]
        yield "val", content[at:]


def _split_by_document(source: sources.Source) -> Iterator[tuple[str, bytes]]:
    """A document is held out by its own hash, so that adding documents moves no other. At least one is, if there are two."""
    hashes = [_hash(document) for document in source.documents()]
    threshold = 2**64 // HELD_OUT_OF
    if len(hashes) > 1 and min(hashes) >= threshold:
        threshold = min(hashes) + 1
    for document in source.documents():
        yield "val" if _hash(document) < threshold else "train", document


def _hash(document: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def _batched(pieces: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    iterator = iter(pieces)
    while batch := list(itertools.islice(iterator, BATCH_DOCUMENTS)):
        yield batch
