"""Read the documents of a file, a few at a time.

| file | documents |
|---|---|
| `.parquet` | the text column of each row |
| `.jsonl`, also `.gz` `.xz` `.bz2` `.zst` | the "text" of each line |
| any other, also compressed | the file itself |
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from anew.errors import UserError

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSED = {*OPENERS, ".zst"}
ROWS_AT_A_TIME = 512


def is_table(path: Path) -> bool:
    """Return whether the file holds many documents instead of being one."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".parquet")


def documents(path: Path, column: str = "text", skip: int = 0) -> Iterator[bytes]:
    """Yield every document of `path` that is not empty, in order, without the first `skip`.

    Raises UserError with the path, and with the line where there is one, if the file cannot be
    read.
    """
    if path.suffix == ".parquet":
        stream = _parquet_rows(path, column)
    elif is_table(path):
        stream = _json_lines(path, column)
    else:
        stream = _whole_file(path)
    try:
        number = 0
        for document in stream:
            if not document:
                continue
            if number >= skip:
                yield document
            number += 1
    except UserError:
        raise
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:  # pyarrow raises ValueErrors
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or first_line
        raise UserError(f"{path} cannot be read ({reason}).") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; its content is decompressed as it is read."""
    if path.suffix == ".zst":
        from pyarrow import CompressedInputStream  # type: ignore[attr-defined]

        with CompressedInputStream(str(path), "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        opener: Any = OPENERS.get(path.suffix, open)
        with opener(path, "rb") as file:
            yield file


def _whole_file(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield file.read()


def _json_lines(path: Path, column: str) -> Iterator[bytes]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _utf8(json.loads(line)[column])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f'{path} line {number} is not a JSON object with a "{column}" string; '
                    "correct or remove the line."
                ) from error


def _parquet_rows(path: Path, column: str) -> Iterator[bytes]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise UserError(f"{path} has no column '{column}'; it has {', '.join(names)}.")
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[column]):
            for value in batch.column(0).to_pylist():
                if value is None:
                    continue
                try:
                    yield _utf8(value)
                except AttributeError as error:
                    raise UserError(f"{path}: column '{column}' does not hold text.") from error


def _utf8(text: Any) -> bytes:
    """Return a string as UTF-8; a lone surrogate becomes a question mark."""
    return bytes(text.encode("utf-8", errors="replace"))
