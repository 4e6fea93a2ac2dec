"""Documents on their way from a source to shards: cut by position or judged by hash, tokenised by threads, kept in order."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from anew.data.sources import Source
from anew.tokenizer.bpe import Tokenizer

HELD_OUT_OF = 10  # a tenth of the documents is held out, until there are val_tokens of them
JOB_BYTES = 1 << 19
SMALL_BYTES = (
    64 << 20
)  # sources up to this size are read once more beforehand, so that they hold out at least one document


@dataclass(frozen=True)
class Text:
    file: int
    number: int
    content: bytes
    split: str  # "train" or "val" where the source is split by position, else ""


@dataclass(frozen=True)
class Document:
    file: int
    number: int
    bytes: int
    split: str
    hash: int
    tokens: np.ndarray


def jobs_of(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Documents some at a time: enough work for a thread to be worth its hand-over."""
    job: list[Text] = []
    size = 0
    for text in texts:
        job.append(text)
        size += len(text.content)
        if size >= JOB_BYTES:
            yield job
            job, size = [], 0
    if job:
        yield job


def in_order(
    pool: ThreadPoolExecutor, jobs: Iterable[list[Text]], tokenizer: Tokenizer, ahead: int
) -> Iterator[Document]:
    """Every job's documents, in the order of the jobs, with at most `ahead` jobs at work or waiting."""

    def work(texts: list[Text]) -> list[Document]:
        return [
            Document(t.file, t.number, len(t.content), t.split, hash_of(t.content), tokenizer.encode_document(t.content)) for t in texts
        ]  # fmt: skip

    waiting: deque[Future[list[Document]]] = deque()
    for texts in jobs:
        waiting.append(pool.submit(work, texts))
        if len(waiting) >= ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def halves(documents: Iterator[bytes]) -> Iterator[bytes]:
    """Of each text the first nine tenths (by characters, where it is UTF-8), then the rest."""
    for content in documents:
        try:
            text = content.decode()
            at = len(text[: len(text) * (HELD_OUT_OF - 1) // HELD_OUT_OF].encode())
        except UnicodeDecodeError:
            at = len(content) * (HELD_OUT_OF - 1) // HELD_OUT_OF
        yield content[:at]
        yield content[at:]


def hash_of(document: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")


def threshold_of(source: Source) -> int:
    """Documents whose hash lies below are held out: a tenth, so that adding documents moves no other; of a small source at least one."""
    threshold = 2**64 // HELD_OUT_OF
    if source.is_remote or source.by_position or source.total_bytes > SMALL_BYTES:
        return threshold
    hashes = [hash_of(document) for document in itertools.islice(source.documents(), 10_000)]
    return min(hashes) + 1 if len(hashes) > 1 and min(hashes) >= threshold else threshold
