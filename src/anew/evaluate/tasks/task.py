"""What a task is: from a file to questions, and from the scorer's answers to figures.

    examples = task.examples(task.fetch(), tokenizer, positions)
    answers = score(model, [example.question for example in examples])
    task.figures([task.result(example.row, answer) for example, answer in zip(examples, answers)])

Every figure is a ratio of sums over examples, so it does not depend on how they were batched or shared out between processes.
"""

import bz2
import io
import json
import math
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.data import sources
from anew.errors import UserError
from anew.evaluate.scorer import Question, Scored
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import cache_folder, sha256_of

Result = dict[
    str, Any
]  # what is kept of one example: numbers and lists of numbers, as JSON can hold them


@dataclass(frozen=True)
class Remote:
    """A file on the network that never changes."""

    url: str
    sha256: str

    @property
    def path(self) -> Path:
        return cache_folder() / "downloads" / self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Example:
    """What the scorer is asked, and what the task has to remember to judge the answer."""

    row: Any
    question: Question


class Task:
    """What the runner needs of a task; `name` is what `--task` calls it."""

    name: str
    remote: Remote
    count: int = 0  # examples in the published measurement; 0: not known

    def is_whole(self, examples: Sequence[Example]) -> bool:
        """Are `examples` all that the published figures are about?"""
        return len(examples) == self.count

    def fetch(self, file: str = "") -> Path:
        """The task's data: `file` if given, else downloaded once and checked."""
        if file:
            if not Path(file).is_file():
                raise UserError(f"the file {file} of task {self.name} does not exist.")
            return Path(file)
        if self.remote.path.is_file() and sha256_of(self.remote.path) != self.remote.sha256:
            raise UserError(
                f"{self.remote.path} is not the published file (another sha256); remove it, or give another with --file."
            )
        if not self.remote.path.is_file():
            hint = f"fetch it by other means and put it at {self.remote.path}"
            sources.download(self.remote.url, self.remote.path, self.remote.sha256, hint=hint)
        return self.remote.path

    def rows(self, path: Path) -> list[Any]:
        """What stands in the file, in its order."""
        raise NotImplementedError

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        """What to ask the scorer about one row."""
        raise NotImplementedError

    def examples(self, path: Path, tokenizer: Tokenizer, positions: int) -> list[Example]:
        """The file as examples for a model of `positions` positions."""
        try:
            return [Example(row, self.question(row, tokenizer)) for row in self.rows(path)]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} is not in the format of task {self.name} ({error})."
            ) from error

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        """What the answer says about one row."""
        raise NotImplementedError

    def figures(self, results: Sequence[Result]) -> dict[str, float]:
        """The task's figures over all rows: by default the mean of everything in the results."""
        return {key: sum(r[key] for r in results) / len(results) for key in results[0]}


def perplexity(nats: float) -> float:
    """exp(nats), or the largest number there is: text without spaces can have thousands of nats a word."""
    return math.exp(min(nats, 709.0))


def split_pair(tokenizer: Tokenizer, context: str, ending: str) -> Question:
    """Tokens of context + ending, cut where the context's own tokens end: lm-evaluation-harness's rule for where an ending begins."""
    stripped = context.rstrip()
    context, ending = (
        stripped,
        context[len(stripped) :] + ending,
    )  # a space at the cut belongs to the next word's token
    n = len(tokenizer.encode(context))
    ids = tokenizer.encode(context + ending)
    return Question([tokenizer.end_of_text], [ids]) if n == 0 else Question(ids[:n], [ids[n:]])


def text_of(path: Path, member: str = "") -> str:
    """The text in a file; `member` names it in a .zip or .tgz, and .bz2 is opened too. Bytes that are no UTF-8 become U+FFFD."""
    try:
        if path.suffix == ".zip":
            content = zipfile.ZipFile(path).read(member)
        elif path.suffix in (".tgz", ".gz"):
            with tarfile.open(path) as archive:
                content = (archive.extractfile(member) or io.BytesIO()).read()
        else:
            content = (
                bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
            )
    except (
        OSError,
        KeyError,
        EOFError,
        ValueError,
        RuntimeError,
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give the text itself with --file."
        ) from error
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def json_lines(path: Path, needs: Sequence[str]) -> list[dict[str, Any]]:
    """A JSON object a line, each with all of the keys `needs`."""
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append({key: row[key] for key in needs})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {number} is not a JSON object with {', '.join(needs)}."
                ) from error
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows
