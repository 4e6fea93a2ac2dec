"""The interface of a task: from a file to questions, and from the scorer's answers to figures.

    examples = task.examples(task.fetch(), tokenizer, n_positions)
    answers = score(model, [example.question for example in examples])
    results = [task.result(example.row, answer) for example, answer in zip(examples, answers)]
    task.figures(results)

Every figure is a ratio of sums over examples, so it does not depend on how examples were batched or
divided over processes.
"""

import bz2
import io
import json
import lzma
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.data import sources
from anew.errors import UserError
from anew.evaluate.scorer import Answer, Question
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import cache_folder, sha256_of

# What is stored of one example: numbers and lists of numbers, so that JSON can hold them.
Result = dict[str, Any]
LARGEST_EXPONENT = 709.0  # exp() of a larger number is not a float64


@dataclass(frozen=True)
class Remote:
    """A file on the network that never changes."""

    url: str
    sha256: str

    @property
    def path(self) -> Path:
        """Return where the file is in the cache."""
        return cache_folder() / "downloads" / self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Example:
    """A question for the scorer, and what the task needs to judge the answer."""

    row: Any
    question: Question


class Task:
    """What the runner needs of a task. A subclass defines `rows`, `question` and `result`."""

    name: str  # as in `anew evaluate --task`
    remote: Remote
    count: int = 0  # number of examples in the published measurement; 0: not known
    reads_folders: bool = False  # whether --file may be a folder
    training_limit: int = 0  # examples scored during training if --evaluate-limit is 0; 0: all

    def is_whole(self, examples: Sequence[Example]) -> bool:
        """Return whether `examples` are all that the published figures are about."""
        return len(examples) == self.count

    def fetch(self, file: str = "") -> Path:
        """Return the task's data: `file` if given, else a download, made once and verified."""
        if file:
            given = Path(file)
            if given.is_file() or (self.reads_folders and given.is_dir()):
                return given
            raise UserError(f"the file {file} of task {self.name} does not exist.")
        path = self.remote.path
        if not path.is_file():
            hint = f"fetch it by other means and put it at {path}"
            sources.download(self.remote.url, path, self.remote.sha256, hint=hint)
        elif sha256_of(path) != self.remote.sha256:
            raise UserError(
                f"{path} is not the published file (its sha256 differs); remove it, or give "
                "another with --file."
            )
        return path

    def rows(self, path: Path) -> list[Any]:
        """Return the examples in a file, in its order, as the task's own values."""
        raise NotImplementedError

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        """Return what to ask the scorer about one row."""
        raise NotImplementedError

    def examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int = 0
    ) -> list[Example]:
        """Return the first `limit` examples in a file (0: all), for a model of `n_positions`."""
        try:
            return list(self.read_examples(path, tokenizer, n_positions, limit))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} is not in the format of task {self.name} ({error})."
            ) from error

    def read_examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int
    ) -> Iterator[Example]:
        """Yield what `examples` returns."""
        for row in self.rows(path)[: limit or None]:
            yield Example(row, self.question(row, tokenizer))

    def result(self, row: Any, answer: Answer) -> Result:
        """Return what the answer, one score for each ending, says about one row."""
        raise NotImplementedError

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the task's figures over all rows: by default the mean of each value."""
        return {key: sum(row[key] for row in results) / len(results) for key in results[0]}


def perplexity(nats: float) -> float:
    """Return exp(nats), or exp(709) where that exceeds float64.

    A text without spaces can have thousands of nats per word.
    """
    return math.exp(min(nats, LARGEST_EXPONENT))


def split_pair(tokenizer: Tokenizer, context: str, ending: str) -> Question:
    """Tokenize context + ending and cut where the tokens of the context alone end.

    Spaces at the cut belong to the ending. This is the rule of lm-evaluation-harness.
    """
    stripped = context.rstrip()
    n_context = len(tokenizer.encode(stripped))
    ids = tokenizer.encode(context + ending)
    if n_context == 0:
        return Question([tokenizer.end_of_text], [ids])
    return Question(ids[:n_context], [ids[n_context:]])


def read_text(path: Path, member: str = "") -> str:
    """Return the text of a file, which may be compressed with bzip2 or xz.

    `member` is the name of the text inside a .zip, .tgz or .gz archive. Bytes that are not UTF-8
    become U+FFFD.
    """
    try:
        if path.suffix == ".zip":
            content = zipfile.ZipFile(path).read(member)
        elif path.suffix in (".tgz", ".gz"):
            with tarfile.open(path) as archive:
                content = (archive.extractfile(member) or io.BytesIO()).read()
        elif path.suffix == ".bz2":
            content = bz2.decompress(path.read_bytes())
        elif path.suffix == ".xz":
            content = lzma.decompress(path.read_bytes())
        else:
            content = path.read_bytes()
    except (
        OSError,
        KeyError,
        EOFError,
        ValueError,
        RuntimeError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give the text itself with --file."
        ) from error
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def read_json_lines(path: Path, keys: Sequence[str], member: str = "") -> list[dict[str, Any]]:
    """Return the values of `keys` in each line of a file that has one JSON object a line.

    `member` is as in `read_text`.
    """
    rows = []
    for number, line in enumerate(read_text(path, member).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is not a JSON object with {', '.join(keys)}."
            ) from error
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows
