"""Read the documents of a file, a few at a time, as UTF-8.

| file | documents |
|---|---|
| `.parquet` | the text column of each row |
| `.jsonl`, also `.gz` `.xz` `.bz2` `.zst` | the "text" of each line that has one |
| `.csv`, `.tsv`, also compressed | the "text" column of each row |
| any other, also compressed | the file itself |

A byte-order mark tells that a file is in UTF-8, UTF-16 or UTF-32, and is not part of the text. A
file without a mark is in UTF-8 or, if it is not valid UTF-8, in the `encoding` that the user names.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from anew.errors import UserError
from anew.utils.words import counted

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSED = {*OPENERS, ".zst"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = {".jsonl", ".parquet", *DELIMITERS}
ROWS_AT_A_TIME = 512
SNIFFED_BYTES = 1 << 16
MOST_CHARACTERS = 2**31 - 1  # of a field of a .csv file; the module csv allows 131,072 by default
# The mark of UTF-16 (little-endian) is the beginning of that of UTF-32, so it stands behind it.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FORMATS = {
    ".pdf": "a PDF; extract its text first, for example with pdftotext",
    ".docx": "a Word document; save it as plain text first",
    ".epub": "an e-book; convert it to plain text first",
}
# Both `anew prepare` and `anew train` have these flags.
ENCODING_EXAMPLE = "--encoding latin-1, for example"
COLUMN_EXAMPLE = "--column NAME"
log = logging.getLogger("anew")


class MissingColumn(UserError):
    """A table lacks the column, or a .jsonl file the key, that has the text."""


def is_table(path: Path) -> bool:
    """Return whether the file holds many documents instead of being one."""
    return _kind(path) in TABLES


def _kind(path: Path) -> str:
    """Return the ending of a file's name, without that of a compression."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return suffixes[-1].lower() if suffixes else ""


def why_not_text(path: Path, encoding: str = "") -> str:
    """Return why a file cannot be read as text, judged by its name and beginning; "" if it can."""
    if path.stat().st_size == 0:
        return "empty"
    kind = _kind(path)
    if kind in OTHER_FORMATS:
        return OTHER_FORMATS[kind]
    if kind == ".parquet":
        return ""
    try:
        with _opened(path) as file:
            start = file.read(SNIFFED_BYTES)
    except (OSError, EOFError, lzma.LZMAError):
        return ""  # the reader reports what is wrong with the compressed file
    codec = _codec_of(start, encoding)
    if b"\0" in start and not codec.lower().startswith(("utf-16", "utf-32", "utf16", "utf32")):
        return "binary (UTF-16 without a byte-order mark needs --encoding utf-16-le)"
    try:
        _decode_start(start, codec)
    except UnicodeDecodeError:
        return f"not in {codec}; name its encoding: {ENCODING_EXAMPLE}"
    return ""


def _codec_of(start: bytes, encoding: str) -> str:
    """Return the codec of a file from its beginning: `encoding` if it has no mark and no UTF-8."""
    for mark, codec in MARKS:
        if start.startswith(mark):
            return codec
    if encoding and (b"\0" in start or not _is_utf8(start)):
        return encoding
    return "utf-8"


def _is_utf8(start: bytes) -> bool:
    try:
        _decode_start(start, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode_start(start: bytes, codec: str) -> None:
    """Raise UnicodeDecodeError if `start` is not in `codec`.

    The beginning of a longer file may end within a character.
    """
    is_whole = len(start) != SNIFFED_BYTES
    codecs.getincrementaldecoder(codec)().decode(start, is_whole)


def documents(
    path: Path, column: str = "text", skip: int = 0, encoding: str = "", warn: bool = True
) -> Iterator[bytes]:
    """Yield every document of `path` that is not empty, in order, without the first `skip`.

    With `warn`, replaced characters and skipped lines are logged. Raises UserError with the path,
    and with the line where there is one, if the file cannot be read.
    """
    kind = _kind(path)
    if kind == ".parquet":
        stream = _parquet_rows(path, column)
    elif kind in DELIMITERS:
        stream = _csv_rows(path, column, encoding)
    elif kind == ".jsonl":
        stream = _json_lines(path, column, encoding, warn)
    else:
        stream = _whole_file(path, encoding, warn)
    number = 0
    with _reading_errors(path):
        for document in stream:
            if not document:
                continue
            if number >= skip:
                yield document
            number += 1


def rows_of(path: Path, encoding: str = "") -> Iterator[Any]:
    """Yield every row of a table: an object of JSON, or a dictionary by the names of columns.

    A line of a .jsonl file that is not JSON is None. Raises UserError as `documents` does.
    """
    kind = _kind(path)
    with _reading_errors(path):
        if kind == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS_AT_A_TIME):
                    yield from batch.to_pylist()
            return
        with _opened_as_text(path, encoding) as lines:
            checked = _in_encoding(lines, path)
            if kind in DELIMITERS:
                csv.field_size_limit(MOST_CHARACTERS)
                header = next(checked, "")
                delimiter = _delimiter(path, header, "")
                yield from csv.DictReader(itertools.chain([header], checked), delimiter=delimiter)
                return
            for line in checked:
                if line.strip():
                    yield _json_of(line)


def text_of(path: Path, encoding: str = "", warn: bool = True) -> str:
    """Return the text of a file that is one document. Raises UserError as `documents` does.

    Lines end with a newline, also those of a file from Windows.
    """
    with _reading_errors(path):
        text = b"".join(_whole_file(path, encoding, warn)).decode()
        return text.replace("\r\n", "\n")


def _in_encoding(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield lines. Raises UserError for one that is not in the encoding of the file."""
    for number, line in enumerate(lines, start=1):
        _check_encoding(path, number, line)
        yield line


def _check_encoding(path: Path, number: int, line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:  # a lone surrogate stands for a byte that is no UTF-8
        raise UserError(
            f"{path} line {number} is not in the encoding of the file; name its encoding: "
            f"{ENCODING_EXAMPLE}"
        ) from error


def _json_of(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into a UserError."""
    try:
        yield
    except UserError:
        raise
    # pyarrow raises ValueErrors.
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or first_line
        raise UserError(f"{path} cannot be read ({reason}).") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; its content is decompressed as it is read."""
    if path.suffix == ".zst":
        from pyarrow import CompressedInputStream

        with CompressedInputStream(str(path), "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        opener: Any = OPENERS.get(path.suffix, open)
        with opener(path, "rb") as file:
            yield file


def _whole_file(path: Path, encoding: str, warn: bool) -> Iterator[bytes]:
    with _opened(path) as file:
        content = file.read()
    codec = _codec_of(content, encoding)
    try:
        text = content.decode(codec)
    except UnicodeDecodeError:
        text = content.decode(codec, errors="replace")
        if warn:
            n_replaced = counted(text.count(chr(0xFFFD)), "character")
            log.warning(f"{path}: {n_replaced} not in {codec} replaced by U+FFFD")
    yield text.encode()


@contextlib.contextmanager
def _opened_as_text(path: Path, encoding: str) -> Iterator[IO[str]]:
    """Open a file of rows. Bytes that are not in its encoding are read as lone surrogates."""
    with _opened(path) as file:
        codec = _codec_of(file.read(SNIFFED_BYTES), encoding)
    with _opened(path) as file:
        yield io.TextIOWrapper(file, encoding=codec, errors="surrogateescape", newline="")


def _csv_rows(path: Path, column: str, encoding: str) -> Iterator[bytes]:
    csv.field_size_limit(MOST_CHARACTERS)
    with _opened_as_text(path, encoding) as lines:
        header = lines.readline()
        all_lines = itertools.chain([header], lines)
        rows = csv.DictReader(all_lines, delimiter=_delimiter(path, header, column))
        names = rows.fieldnames or []
        if column not in names:
            raise MissingColumn(
                f"{path} has no column '{column}'; choose one of its columns "
                f"({', '.join(names)}): {COLUMN_EXAMPLE}"
            )
        for number, row in enumerate(rows, start=1):
            text = row[column] or ""
            try:
                yield text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{path} row {number} is not in {encoding or 'utf-8'}; name its encoding: "
                    f"{ENCODING_EXAMPLE}"
                ) from error


def _delimiter(path: Path, header: str, column: str) -> str:
    """Return what separates the columns of a table: by its name, or a semicolon.

    Programs in languages with a decimal comma write semicolons into .csv files.
    """
    usual = DELIMITERS[_kind(path)]
    is_one_column = len(next(csv.reader([header], delimiter=usual), [])) == 1
    return ";" if is_one_column and ";" in header and header.strip() != column else usual


def _json_lines(path: Path, column: str, encoding: str, warn: bool) -> Iterator[bytes]:
    """Yield the text of each line. Lines without one are skipped and counted in the log.

    Raises UserError if the first line has no text, because then most files have none at all.
    """
    first_line = True
    n_skipped = 0
    with _opened_as_text(path, encoding) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _text_of_line(path, number, line, column)
            if text is not None:
                yield _utf8(text)
            elif first_line:
                raise MissingColumn(_why_no_text(path, line, column))
            else:
                n_skipped += 1
            first_line = False
    if n_skipped and warn:
        lines_skipped = counted(n_skipped, "line")
        log.warning(f'{path}: skipped {lines_skipped} without a "{column}" string in JSON')


def _text_of_line(path: Path, number: int, line: str, column: str) -> str | None:
    """Return the text in a line of a .jsonl file; None if it has none."""
    _check_encoding(path, number, line)
    row = _json_of(line)
    if not isinstance(row, dict) or column not in row:
        return None
    text = "" if row[column] is None else row[column]
    return text if isinstance(text, str) else None


def _why_no_text(path: Path, line: str, column: str) -> str:
    """Return the sentence that refuses a .jsonl file whose first line has no text."""
    row = _json_of(line)
    if not isinstance(row, dict):
        row = {}
    names = [name for name, value in row.items() if isinstance(value, str)]
    if isinstance(row.get("messages"), list) or isinstance(row.get("conversations"), list):
        return (
            f"{path} has conversations; prepare it with --conversations, or train on it with "
            "anew train chat."
        )
    if names:
        return (
            f"{path} has no text '{column}'; choose one of its keys ({', '.join(names)}): "
            f"{COLUMN_EXAMPLE}"
        )
    return f'{path} line 1 is not a JSON object with a "{column}" string.'


def _parquet_rows(path: Path, column: str) -> Iterator[bytes]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise MissingColumn(
                f"{path} has no column '{column}'; choose one of its columns "
                f"({', '.join(names)}): {COLUMN_EXAMPLE}"
            )
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
