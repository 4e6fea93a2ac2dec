"""Documents out of a file, whatever its format, a few at a time.

| file | documents |
|---|---|
| `.parquet` | each row's text column |
| `.jsonl`, also `.gz` `.xz` `.bz2` `.zst` | each line's "text" |
| any other, also packed | the file itself |
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from anew.errors import UserError

PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}
ROWS_AT_A_TIME = 512


def is_table(path: Path) -> bool:
    """Does the file hold many documents, rather than be one?"""
    suffixes = [s for s in path.suffixes if s not in PACKED]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".parquet")


def documents(path: Path, column: str = "text", skip: int = 0) -> Iterator[bytes]:
    """Every document of `path` that is not empty, in order, but for the first `skip`. UserError names a file that cannot be read."""
    try:
        stream = (
            _parquet(path, column)
            if path.suffix == ".parquet"
            else _lines(path, column)
            if is_table(path)
            else _whole(path)
        )
        for number, document in enumerate(d for d in stream if d):
            if number >= skip:
                yield document
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        ValueError,
    ) as error:  # pyarrow's errors are ValueErrors
        reason = (
            getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        )
        raise UserError(f"{path} cannot be read ({reason}).") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's content, unpacked as it is read."""
    if path.suffix == ".zst":
        from pyarrow import CompressedInputStream  # type: ignore[attr-defined]

        with CompressedInputStream(str(path), "zstd") as packed:
            yield io.BufferedReader(packed)
    elif (opener := PACKED.get(path.suffix)) is not None:
        with opener(path, "rb") as file:
            yield cast(IO[bytes], file)
    else:
        with path.open("rb") as file:
            yield file


def _whole(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield file.read()


def _lines(path: Path, column: str) -> Iterator[bytes]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _bytes(json.loads(line)[column])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f'{path} line {number} is not a JSON object with a "{column}" string; mend or remove the line.'
                ) from error


def _parquet(path: Path, column: str) -> Iterator[bytes]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise UserError(
                f"{path} has no column '{column}'; it has {', '.join(file.schema_arrow.names)}."
            )
        for batch in file.iter_batches(ROWS_AT_A_TIME, columns=[column]):
            for value in batch.column(0).to_pylist():
                if value is not None:
                    try:
                        yield _bytes(value)
                    except AttributeError as error:
                        raise UserError(f"{path}: column '{column}' does not hold text.") from error


def _bytes(text: Any) -> bytes:
    return bytes(text.encode("utf-8", errors="replace"))
