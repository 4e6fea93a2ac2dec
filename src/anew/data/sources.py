"""Where text comes from: names, files, folders, globs and datasets of the hub, each as an ordered list of files.

| source | files |
|---|---|
| `stdlib` | the Python standard library's own source files: real text on every machine, without a download |
| `tinyshakespeare` | char-rnn's 1.1 MB of Shakespeare, downloaded once and checked |
| `fineweb-edu`, `fineweb`, `openwebtext`, `wikitext-103` | web text and Wikipedia from the hub (hub_data.py) |
| `repo:config:split:column` | any other dataset of the hub |
| `book.txt`, any text file | one document, split by position: the last tenth is held out |
| `posts.jsonl`, `.jsonl.gz`, `.xz`, `.zst`, `.parquet` | one document a row, its "text" |
| a folder, a glob | each file as above |
"""

import glob
import hashlib
import http.client
import re
import socket
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from anew.data import hub_datasets as hub_data
from anew.data import readers
from anew.data.hub_datasets import HubFile
from anew.errors import UserError
from anew.utils.files import cache_folder, sha256_of, write_atomic

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "ensurepip",
}
HUB_SPEC = re.compile(r"([\w.-]+/[\w.-]+):([^:]+):([^:]+)(?::([^:]+))?")


@dataclass(frozen=True)
class Source:
    """A named list of files to read documents from, all here or all on the hub."""

    name: str
    files: tuple[Path | HubFile, ...]
    column: str = "text"

    @property
    def is_remote(self) -> bool:
        """Do the files have to be fetched?"""
        return isinstance(self.files[0], HubFile)

    @property
    def by_position(self) -> bool:
        """One text, whose end is held out, instead of many documents, of which some are."""
        return (
            len(self.files) == 1
            and isinstance(self.files[0], Path)
            and not readers.is_table(self.files[0])
        )

    @property
    def total_bytes(self) -> int:
        """Size of all files, as they are stored."""
        return sum(f.size if isinstance(f, HubFile) else f.stat().st_size for f in self.files)

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or a sha256 over all local files: other text is another revision."""
        if isinstance(self.files[0], HubFile):
            return self.files[0].revision
        try:
            return hashlib.sha256(
                "".join(sha256_of(f) for f in self.files if isinstance(f, Path)).encode()
            ).hexdigest()
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error

    def documents(self) -> Iterator[bytes]:
        """Every document that is not empty, always in the same order, of a source that is here."""
        for path in self.files:
            assert isinstance(path, Path), "files on the hub are fetched by prepare.py"
            yield from readers.documents(path, self.column)


def find(source: str, revision: str = "main") -> Source:
    """The source that `--data` names: a known name, a file, a folder, a glob or a dataset of the hub (at `revision`)."""
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            p
            for p in root.rglob("*.py")
            if not SKIPPED_FOLDERS & set(p.relative_to(root).parts) and p.stat().st_size
        ]
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
    return _on_the_hub(source, revision)


def cache_name(source: str) -> str:
    """What a dataset of the hub is called in the cache."""
    return re.sub(r"\W+", "-", source)


def is_hub_name(source: str) -> bool:
    """Does `source` name a dataset of the hub?"""
    return source in hub_data.NAMED or HUB_SPEC.fullmatch(source) is not None


def _on_the_hub(source: str, revision: str) -> Source:
    if source in hub_data.NAMED:
        repository, prefix = hub_data.NAMED[source]
        return Source(source, tuple(hub_data.listing(repository, prefix, revision)))
    match = HUB_SPEC.fullmatch(source)
    if match is None:
        known = ", ".join(["stdlib", "tinyshakespeare", *hub_data.NAMED])
        raise UserError(
            f"there is no data at '{source}': it is no file, folder, glob, repo:config:split:column or known source ({known})."
        )
    repository, config, split, column = match.groups()
    revision = (
        hub_data.CONVERTED if revision == "main" else revision
    )  # by name, where the hub converts; a commit on a restart
    files = hub_data.listing(repository, f"{config}/{split}/", revision)
    return Source(cache_name(source), tuple(files), column or "text")


def _ordered(files: list[Path], root: Path) -> tuple[Path, ...]:
    return tuple(
        sorted(
            files, key=lambda p: (p.relative_to(root) if p.is_relative_to(root) else p).as_posix()
        )
    )


def _is_text(path: Path, root: Path) -> bool:
    """A visible regular file that is a table or packed, or has no NUL byte at its start."""
    if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
        return False
    if readers.is_table(path) or path.suffix in readers.PACKED:
        return True
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


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
            if attempt and isinstance(
                getattr(error, "reason", None), socket.gaierror
            ):  # no such host twice: there is no network
                break
            continue
        if hashlib.sha256(body).hexdigest() == sha256:
            write_atomic(path, body)
            return
        problem = f"the {len(body):,} bytes received have another sha256 than the published file"
    raise UserError(f"{url} could not be downloaded ({problem}); {hint}.")
