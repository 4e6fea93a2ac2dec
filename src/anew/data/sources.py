"""Where text comes from: names, files, folders and globs, each as a stream of documents (bytes).

| source | documents |
|---|---|
| `stdlib` | the Python standard library's own source files: real text on every machine, without a download |
| `tinyshakespeare` | char-rnn's 1.1 MB of Shakespeare, downloaded once and checked |
| `book.txt`, any text file | one document, split by position: the last tenth is held out |
| `posts.jsonl` | one document a line, its "text" |
| a folder, a glob | each file a document (a .jsonl: each line) |
"""

import glob
import hashlib
import http.client
import json
import os
import socket
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anew.config import UserError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NOT_YET = ("fineweb-edu", "fineweb", "openwebtext", "wikitext-103")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "lib2to3", "ensurepip"}


def cache_folder() -> Path:
    """Where downloads and prepared data go: $ANEW_CACHE, else $XDG_CACHE_HOME/anew, else ~/.cache/anew."""
    if "ANEW_CACHE" in os.environ:
        return Path(os.environ["ANEW_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anew"


@dataclass(frozen=True)
class Source:
    """A named list of files to read documents from."""

    name: str
    files: tuple[Path, ...]

    @property
    def by_position(self) -> bool:
        """One text, whose end is held out, instead of many documents, of which some are."""
        return len(self.files) == 1 and self.files[0].suffix != ".jsonl"

    def documents(self) -> Iterator[bytes]:
        """Every document that is not empty, always in the same order."""
        for path in self.files:
            try:
                if path.suffix == ".jsonl":
                    yield from _lines(path)
                elif content := path.read_bytes():
                    yield content
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}).") from error

    def revision(self) -> str:
        """sha256 over all documents: other text is another revision."""
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document)
        return digest.hexdigest()


def find(source: str) -> Source:
    """The source that `--data` names: a known name, a file, a folder or a glob."""
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
        return Source("stdlib", _ordered(files, root))
    if source == "tinyshakespeare":
        path = cache_folder() / "downloads" / "tinyshakespeare.txt"
        if not path.is_file():
            download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        return Source("tinyshakespeare", (path,))
    path = Path(source).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; give a file with text in it.")
        return Source(path.stem, (path,))
    if path.is_dir():
        texts = _ordered([p for p in path.rglob("*") if _is_text(p, path)], path)
        if not texts:
            raise UserError(f"folder {path} holds no text files.")
        return Source(path.resolve().name, texts)
    if matches := [Path(p) for p in glob.glob(source, recursive=True)]:
        return Source("glob", _ordered([p for p in matches if p.is_file()], Path()))
    if source in NOT_YET:
        raise UserError(
            f"source '{source}' cannot be prepared by this version of anew yet; prepare its text yourself and pass the folder with --data."
        )
    raise UserError(f"there is no data at '{source}': it is no file, folder, glob or known source (stdlib, tinyshakespeare).")


def _ordered(files: list[Path], root: Path) -> tuple[Path, ...]:
    return tuple(sorted(files, key=lambda p: (p.relative_to(root) if p.is_relative_to(root) else p).as_posix()))


def _is_text(path: Path, root: Path) -> bool:
    """A visible regular file without a NUL byte at its start."""
    if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"].encode("utf-8", errors="replace")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{path} line {number} is not a JSON object with a "text" string; mend or remove the line.') from error
            if text:
                yield text


def download(
    url: str,
    path: Path,
    sha256: str,
    attempts: int = 4,
    pause_seconds: float = 1.0,
    hint: str = "fetch it by other means and pass the file with --data",
) -> None:
    """Fetch `url` into `path`, which appears only when its sha256 is right: no half file, no error page saved as data.

    Network failures and 5xx/429 answers are tried again, each after twice the pause; any other failure is a UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause_seconds * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code}"
            if error.code != 429 and error.code < 500:
                break
            continue
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            if attempt and isinstance(getattr(error, "reason", None), socket.gaierror):  # no such host twice: there is no network
                break
            continue
        if hashlib.sha256(body).hexdigest() == sha256:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(body)
            os.replace(temporary, path)
            return
        problem = f"the {len(body):,} bytes received have another sha256 than the published file"
    raise UserError(f"{url} could not be downloaded ({problem}); {hint}.")
