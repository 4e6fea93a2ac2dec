"""Files and folders that are complete or absent, hashes, versioned JSON and the cache folder.

    write_atomic(path, text)                    # readers see the old content or the new content
    with atomic_folder(path) as temporary:      # `path` appears when the block has ended
        (temporary / "part").write_bytes(...)

Everything is written under a temporary name beside its target, flushed to the disk, and renamed. A
process that is killed leaves at most the temporary file or folder.
"""

import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anew.errors import UserError

RENAME_ATTEMPTS = 10
RENAME_WAIT_SECONDS = 0.05


def rename(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing a file that is there, as `os.replace` does.

    Windows refuses with PermissionError while another process, such as a virus scanner or a report,
    has one of them open. Such processes close it soon, so the rename is tried again for a while.
    """
    for attempt in range(RENAME_ATTEMPTS):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if sys.platform != "win32" or attempt == RENAME_ATTEMPTS - 1:
                raise
            time.sleep(RENAME_WAIT_SECONDS * 2**attempt / 4)


def flush_to_disk(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk.

    Windows cannot flush folders and does not need it.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path, shared: bool = False) -> Path:
    """Return the hidden name beside `path` under which it is written.

    The name is fixed, so that the next write replaces what a killed process has left. If the path
    is `shared`, which means that several processes may write it at once, it has the process's
    number.
    """
    suffix = f".{os.getpid()}.tmp" if shared else ".tmp"
    return path.with_name(f".{path.name}{suffix}")


def write_atomic(
    path: Path, content: str | bytes, shared: bool = False, durable: bool = True
) -> None:
    """Replace `path` by a file with this content. The flags are those of `atomic_file`."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    with atomic_file(path, shared=shared, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: Path, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path to write; it replaces `path` when the block ends without an error.

    `shared` says that several processes may write `path` at once. If `durable`, the file survives a
    loss of power after the block; otherwise it is not flushed to the disk, which is faster.
    """
    temporary = temporary_name(path, shared)
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        flush_to_disk(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder; it becomes `path` when the block ends without an error.

    `path` must not exist, or be an empty folder.
    """
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(temporary)
        rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_to_disk(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, or a copy where that is not possible.

    `target` must be replaced as a whole and never be written to.
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def similar_path(path: Path) -> str:
    """Return the end of a sentence about a path that does not exist: a similar one beside it."""
    others = os.listdir(path.parent) if path.parent.is_dir() else []
    names = [name for name in others if name != path.name]
    similar = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / similar[0]}?" if similar else "."


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any], format: int, durable: bool = True) -> None:
    """Replace `path` by a JSON object that has `content` and the number of its format."""
    text = json.dumps({"format": format, **content}, indent=2) + "\n"
    write_atomic(path, text, durable=durable)


def parse_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises OSError if the file cannot be read and ValueError if it is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path, newest_format: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object at `path` without its format, and the format.

    A file that does not state its format has format 1. Raises UserError for a format above
    `newest_format`, OSError if the file cannot be read and ValueError if it is not a JSON object.
    """
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    format = int(content.pop("format", 1))
    if format > newest_format:
        raise UserError(
            f"{path} has format {format}, and this version of anew reads formats up to "
            f"{newest_format}; update anew."
        )
    return content, format


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object a line.

    Lines that are not JSON objects are left out, because a process that was killed may have written
    half a line.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def cache_folder() -> Path:
    """Return the folder of downloads, prepared data and compiled kernels.

    It is $ANEW_CACHE, else $XDG_CACHE_HOME/anew, else ~/.cache/anew.
    """
    if "ANEW_CACHE" in os.environ:
        return Path(os.environ["ANEW_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anew"
