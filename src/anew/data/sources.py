"""Sources of text: a name, a file, a folder, a glob or a dataset of the hub, as a list of files.

    source = find("my.jsonl")
    for document in source.documents(): ...

| source | files |
|---|---|
| `stdlib` | the source of the Python standard library: text on every machine, no download |
| `tinyshakespeare` | char-rnn's 1.1 MB of Shakespeare, downloaded once and verified |
| `fineweb-edu`, `fineweb`, `openwebtext`, `wikitext-103` | datasets of the hub (hub_datasets.py) |
| `repo:config:split:column` | any other dataset of the hub |
| `book.txt`, any text file | one document, split by position: the last tenth is held out |
| `posts.jsonl`, `.jsonl.gz`, `.csv`, `.tsv`, `.parquet` | one document a row, its "text" |
| a folder, a glob | each file as above; files that are not text are skipped and named |
"""

import codecs
import dataclasses
import glob
import hashlib
import http.client
import logging
import re
import socket
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from anew.data import hub_datasets, readers
from anew.data.conversation_files import conversations_in
from anew.data.hub_datasets import HubFile
from anew.data.shards import PROGRESS, is_unfinished
from anew.errors import UserError, unknown_name
from anew.utils.files import cache_folder, sha256_of, similar_path, write_atomic
from anew.utils.words import counted

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Folders of the standard library that hold tests, caches or packages that were installed.
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
MESSAGES = "messages"  # the column of conversations, by default
MARKUP = {".html", ".htm", ".md"}
LISTED_FILES = 10  # of those that are skipped
log = logging.getLogger("anew")
HUB_SPEC = re.compile(r"([\w.-]+/[\w.-]+):([^:]+):([^:]+)(?::([^:]+))?")


@dataclass(frozen=True)
class Source:
    """A named list of files to read documents from. All are on this machine, or all on the hub."""

    name: str
    files: tuple[Path | HubFile, ...]
    column: str = "text"
    encoding: str = ""  # of files without a byte-order mark; "": UTF-8
    skipped: tuple[tuple[Path, str], ...] = ()  # files that are not text, and why
    conversations: bool = False  # whether a document is a conversation, as a line of JSON

    @property
    def is_remote(self) -> bool:
        """Whether the files are on the hub."""
        return isinstance(self.files[0], HubFile)

    @property
    def by_position(self) -> bool:
        """Whether the source is one text whose end is held out, instead of many documents."""
        file = self.files[0]
        is_text = len(self.files) == 1 and isinstance(file, Path) and not readers.is_table(file)
        return is_text and not self.conversations

    @property
    def total_bytes(self) -> int:
        """The size of all files, as they are stored."""
        sizes = [f.size if isinstance(f, HubFile) else f.stat().st_size for f in self.files]
        return sum(sizes)

    @cached_property
    def revision(self) -> str:
        """The commit on the hub, or a SHA-256 over all files: another text has another revision."""
        if isinstance(self.files[0], HubFile):
            return self.files[0].revision
        digests = hashlib.sha256()
        if self.column != "text" or self.encoding:
            digests.update(f"{self.column} {self.encoding} ".encode())
        if self.conversations:
            digests.update(b"conversations ")
        try:
            for path in self.files:
                assert isinstance(path, Path)
                digests.update(sha256_of(path).encode())
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
        return digests.hexdigest()

    def documents(self, warn: bool = True) -> Iterator[bytes]:
        """Yield every document that is not empty, always in the same order. Not for the hub.

        With `warn`, replaced characters and skipped lines are logged.
        """
        for path in self.files:
            assert isinstance(path, Path), "files on the hub are fetched by prepare.py"
            yield from self.documents_in(path, warn=warn)

    def documents_in(self, path: Path, skip: int = 0, warn: bool = True) -> Iterator[bytes]:
        """Yield the documents of one file without the first `skip`."""
        read = conversations_in if self.conversations else readers.documents
        return read(path, self.column, skip, self.encoding, warn)


def find(
    source: str,
    revision: str = "main",
    column: str = "text",
    encoding: str = "",
    conversations: bool = False,
) -> Source:
    """Return the source that `--data` names; `revision` is that of a dataset of the hub.

    `column` and `encoding` are those of files on this machine. With `conversations`, a document is
    a conversation, which the column "messages" has unless another one is named. Raises UserError if
    there is no such source, or no text in it.
    """
    found = _find(source, revision, column, encoding)
    if not conversations:
        return found if len(found.files) == 1 else _without_other_tables(found)
    column = MESSAGES if found.column == "text" else found.column
    return dataclasses.replace(found, conversations=True, column=column)


def _find(source: str, revision: str, column: str, encoding: str) -> Source:
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(
            f"there is no encoding '{encoding}'; use a name such as latin-1, cp1252 or utf-16."
        ) from error
    if source == "stdlib":
        return _standard_library()
    if source == "tinyshakespeare":
        text = cache_folder() / "downloads" / "tinyshakespeare.txt"
        if not text.is_file():
            download(SHAKESPEARE_URL, text, SHAKESPEARE_SHA256)
        return Source("tinyshakespeare", (text,))
    path = Path(source).expanduser()
    if path.is_file():
        reason = readers.why_not_text(path, encoding)
        if reason:
            raise UserError(f"{path} cannot be read as text: it is {reason}.")
        return Source(path.stem, (path,), column, encoding)
    if (path / PROGRESS).is_file():
        raise UserError(is_unfinished(path))
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
        return _texts_among(files, path, path.resolve().name, column, encoding)
    matches = [Path(match) for match in glob.glob(source, recursive=True)]
    files = [match for match in matches if match.is_file()]
    if files:
        return _texts_among(files, Path(), "glob", column, encoding)
    return _on_the_hub(source, revision, column)


def _without_other_tables(source: Source) -> Source:
    """Return the source without tables that lack its column. Raises UserError if no file is left.

    The files that are left out are named in the log.
    """
    if source.is_remote:
        return source
    files = []
    skipped: list[tuple[Path, str]] = []
    for file in source.files:
        assert isinstance(file, Path)
        try:
            if readers.is_table(file):
                next(source.documents_in(file, warn=False), None)
        except readers.MissingColumn:
            if len(skipped) == len(source.files) - 1:  # no file is left
                raise
            skipped.append((file, f"a table without the column '{source.column}'"))
        else:
            files.append(file)
    _log_skipped(skipped)
    return dataclasses.replace(source, files=tuple(files), skipped=(*source.skipped, *skipped))


def _log_skipped(skipped: Sequence[tuple[Path, str]]) -> None:
    for file, reason in skipped[:LISTED_FILES]:
        log.warning(f"skipped {file}: it is {reason}")
    if len(skipped) > LISTED_FILES:
        log.warning(f"skipped {counted(len(skipped) - LISTED_FILES, 'more file')} of this kind")


def _texts_among(files: list[Path], root: Path, name: str, column: str, encoding: str) -> Source:
    """Return the source of those files that can be read as text; the others are named in the log.

    Raises UserError if there is none.
    """
    texts = []
    skipped = []
    for file in _ordered(files, root):
        reason = readers.why_not_text(file, encoding)
        if reason:
            skipped.append((file, reason))
        else:
            texts.append(file)
    _log_skipped(skipped)
    if not texts:
        n_skipped = counted(len(skipped), "file")
        raise UserError(f"there is no text in {root}; {n_skipped} in it cannot be read as text.")
    marked_up = sum(file.suffix.lower() in MARKUP for file in texts)
    if marked_up:
        log.info(
            f"HTML and Markdown are read with their markup ({marked_up} of {len(texts)} files)"
        )
    return Source(name, tuple(texts), column, encoding, tuple(skipped))


def cache_name(source: str) -> str:
    """Return the name of a dataset of the hub within the cache folder."""
    return re.sub(r"\W+", "-", source)


def is_hub_name(source: str) -> bool:
    """Return whether `source` names a dataset of the hub."""
    return source in hub_datasets.NAMED or HUB_SPEC.fullmatch(source) is not None


def _standard_library() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        is_skipped = SKIPPED_FOLDERS & set(path.relative_to(root).parts)
        if not is_skipped and path.stat().st_size > 0:
            files.append(path)
    return Source("stdlib", _ordered(files, root))


def _on_the_hub(source: str, revision: str, column: str) -> Source:
    if column != "text":
        raise UserError(
            "the column of a dataset of the hub is part of its name: repo:config:split:column."
        )
    if source in hub_datasets.NAMED:
        repository, prefix = hub_datasets.NAMED[source]
        return Source(source, tuple(hub_datasets.listing(repository, prefix, revision)))
    match = HUB_SPEC.fullmatch(source)
    if match is None:
        known = ["stdlib", "tinyshakespeare", *hub_datasets.NAMED]
        advice = (
            "it is no file, folder, glob, repo:config:split:column or known source "
            f"({', '.join(known)}){similar_path(Path(source))}"
        )
        if Path(source).suffix or "/" in source:  # the name of a file or folder
            raise UserError(f"there is no data '{source}'; {advice}")
        raise unknown_name("data", source, known, advice)
    repository, config, split, named_column = match.groups()
    if revision == "main":  # else the commit of that branch which a preparation began with
        revision = hub_datasets.CONVERTED
    files = hub_datasets.listing(repository, f"{config}/{split}/", revision)
    return Source(cache_name(source), tuple(files), named_column or "text")


def _ordered(files: Sequence[Path], root: Path) -> tuple[Path, ...]:
    """Sort files by their path within `root`, in the same order on every operating system."""

    def key(path: Path) -> str:
        relative = path.relative_to(root) if path.is_relative_to(root) else path
        return relative.as_posix()

    return tuple(sorted(files, key=key))


def _is_hidden(path: Path, root: Path) -> bool:
    """Return whether a name on the way from `root` to `path` begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def download(
    url: str,
    path: Path,
    sha256: str,
    attempts: int = 4,
    pause_seconds: float = 1.0,
    hint: str = "fetch it by other means and pass the file with --data",
) -> None:
    """Download `url` to `path`, which appears only if its SHA-256 is the given one.

    Network failures, the answers 5xx and 429, and wrong content are tried again, each time after
    twice the pause. Raises UserError, which ends with `hint`, for any other failure and after the
    last attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    for attempt in range(attempts):
        if attempt > 0:
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
            is_unknown_host = isinstance(getattr(error, "reason", None), socket.gaierror)
            if is_unknown_host and attempt > 0:  # the second time: there is no network
                break
            continue
        if hashlib.sha256(body).hexdigest() == sha256:
            write_atomic(path, body, shared=True)
            return
        problem = f"the {len(body):,} bytes received have another sha256 than the published file"
    raise UserError(f"{url} could not be downloaded ({problem}); {hint}.")
