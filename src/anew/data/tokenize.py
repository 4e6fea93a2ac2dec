"""Tokenise documents with several threads and return them in their order.

Encoders release Python's lock while they work, so other threads read, hash and write documents
meanwhile, and nothing has to be sent between processes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from anew.data.read_ahead import prefetch

JOB_BYTES = 1 << 19  # text that a thread tokenises at a time
JOBS_A_THREAD = 4  # jobs that are in work or waiting, for each thread


@dataclass(frozen=True)
class Text:
    """A document of a source, or a part of one."""

    file: int
    number: int  # within its file
    content: bytes
    split: str  # "train" or "val" where the source is split by position, else ""


@dataclass(frozen=True)
class Document:
    """A tokenised Text."""

    file: int
    number: int
    bytes: int
    split: str
    hash: int
    tokens: np.ndarray


def encode_in_order(
    texts: Iterable[Text], encode: Callable[[bytes], np.ndarray], threads: int
) -> Iterator[Document]:
    """Yield each text as a document with the tokens that `encode` returns, in order."""

    def work(job: list[Text]) -> list[Document]:
        return [_document(text, encode) for text in job]

    for documents in prefetch(work, _jobs(texts), ahead=JOBS_A_THREAD * threads, threads=threads):
        yield from documents


def _document(text: Text, encode: Callable[[bytes], np.ndarray]) -> Document:
    return Document(
        file=text.file,
        number=text.number,
        bytes=len(text.content),
        split=text.split,
        hash=hash_of(text.content),
        tokens=encode(text.content),
    )


def _jobs(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Group texts into jobs of about JOB_BYTES, so that the work outweighs its overhead."""
    job: list[Text] = []
    size = 0
    for text in texts:
        job.append(text)
        size += len(text.content)
        if size >= JOB_BYTES:
            yield job
            job = []
            size = 0
    if job:
        yield job


def hash_of(document: bytes) -> int:
    """Return a number from 0 to 2**64 - 1 that depends on the text of a document alone."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little")
