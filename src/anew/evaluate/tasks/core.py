"""CORE: 22 tasks with examples in the prompt, and the mean of their centered accuracies.

    anew evaluate gpt2 --task core
    anew evaluate gpt2 --task core:arc_easy

Li et al. 2024, "DataComp-LM" (arXiv 2406.11794), chose the tasks. A centered accuracy is
(accuracy - baseline) / (1 - baseline): a guess has 0, a model without errors has 1.

Order, prompts and arithmetic are those of karpathy/nanochat (`nanochat/core_eval.py` and
`scripts/base_eval.py`), with which the figures of GPT-2 in `published.py` were measured. Examples
are shuffled before the first N are taken; the examples in a prompt are drawn, by the number of the
question, from those that were taken. A prompt begins with end of text. If it is longer than the
model's positions, its beginning is cut off.
"""

import functools
import itertools
import math
import random
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from anew.errors import UserError
from anew.evaluate.scorer import Answer, Question
from anew.evaluate.tasks.task import Example, Remote, Result, Task, read_json_lines
from anew.tokenizer.bpe import Tokenizer

# nanochat does not publish the SHA-256. It is stated, after a download, by several public projects,
# such as bjlkeng/gpt-training-sandbox in src/scratch_llm/core_bundle.py.
BUNDLE = Remote(
    "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200",
)
DATA_FOLDERS = ("", "eval_data", "eval_bundle/eval_data")  # where a folder may have the files
ORDER_SEED = 1337
SHOTS_SEED = 1234  # the number of the question is added to it
BLANK_LINE = "\n\n"  # between the examples of a prompt
ANSWER = "\nAnswer: "

# The kinds of tasks, by the names that the bundle has for them.
MULTIPLE_CHOICE = "multiple_choice"  # choose the ending of a text by its mean loss per token
SCHEMA = "schema"  # choose the beginning of a text by the mean loss per token of its ending
LANGUAGE_MODELING = "language_modeling"  # predict every token of the ending
KEYS = {
    MULTIPLE_CHOICE: ["query", "choices", "gold"],
    SCHEMA: ["context_options", "continuation", "gold"],
    LANGUAGE_MODELING: ["context", "continuation"],
}

Ids: TypeAlias = "array[int]"  # token ids in 4 bytes each: there are 46 million
Encode: TypeAlias = Callable[[str], Ids]


@dataclass(frozen=True)
class Row:
    """What is needed to judge the answer to one question."""

    gold: int | None  # the number of the right choice; None: every token must be predicted
    scored: tuple[int, ...]  # for each choice, how many of its last tokens count


@dataclass(frozen=True)
class CoreTask(Task):
    """One of the 22 tasks."""

    name: str
    kind: str
    file: str  # in the bundle
    shots: int  # examples in a prompt
    baseline: float  # the accuracy of a guess
    count: int
    delimiter: str = " "  # between a text and its ending

    remote = BUNDLE
    reads_folders = True

    @property
    def label(self) -> str:
        """Return the name that the bundle has for the task."""
        return self.name.removeprefix("core:")

    def find(self, path: Path) -> tuple[Path, str] | None:
        """Return the task's file in a folder, or an archive and the name in it; None if absent.

        Any other `path` is the file itself.
        """
        if path.is_dir():
            file_name = self.file.rpartition("/")[2]
            for folder in DATA_FOLDERS:
                for name in (self.file, file_name):
                    for file in (path / folder / name, path / folder / f"{name}.xz"):
                        if file.is_file():
                            return file, ""
            return None
        if path.suffix == ".zip":
            found = [name for name in _names_in(path) if f"/{name}".endswith(f"/{self.file}")]
            return (path, found[0]) if found else None
        return path, ""

    def rows(self, path: Path) -> list[Any]:
        found = self.find(path)
        if found is None:
            raise UserError(f"{path} does not contain {self.file}, the data of {self.name}.")
        file, member = found
        rows = read_json_lines(file, KEYS[self.kind], member)
        random.Random(ORDER_SEED).shuffle(rows)
        return rows

    def read_examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int
    ) -> Iterator[Example]:
        """Yield the first `limit` questions (0: all) in the shuffled order, with their prompts."""
        rows = self.rows(path)[: limit or None]
        if len(rows) <= self.shots:
            raise UserError(
                f"a prompt of {self.name} contains {self.shots} other examples, and there are "
                f"{len(rows)} examples in all; take {self.shots + 1} or more."
            )

        @functools.cache  # the text of an example is part of several prompts
        def encode(text: str) -> Ids:
            return array("i", tokenizer.encode(text))

        solved = [self._solved(row) for row in rows]
        for number, row in enumerate(rows):
            shots = [solved[other] for other in self._shots(number, len(rows))]
            context, before = _encode_shots(shots, encode, tokenizer.end_of_text)
            judged, question = self._question(row, context, before, encode)
            yield Example(judged, _cut(question, n_positions))

    def _shots(self, number: int, count: int) -> list[int]:
        """Return which of `count` examples the prompt of question `number` contains."""
        others = random.Random(SHOTS_SEED + number).sample(range(count - 1), self.shots)
        return [other + (other >= number) for other in others]

    def _solved(self, row: Any) -> str:
        """Return an example with its right answer, as the prompts of others contain it."""
        if self.kind == MULTIPLE_CHOICE:
            return str(row["query"] + self.delimiter + row["choices"][row["gold"]])
        if self.kind == SCHEMA:
            chosen = row["context_options"][row["gold"]]
            return str(chosen + self.delimiter + row["continuation"])
        return str(row["context"].strip() + self.delimiter + row["continuation"])

    def _question(
        self, row: Any, context: Ids, before: str, encode: Encode
    ) -> tuple[Row, Question]:
        """Return the question about an example, and how to judge the answer.

        `context` has the token ids of the examples in the prompt, and `before` is the text between
        them and this one.
        """
        if self.kind == LANGUAGE_MODELING:
            beginning = before + row["context"].strip() + self.delimiter
            text = encode(beginning + row["continuation"])
            # White space at the end would become part of the first token of the ending.
            start = _common_start([encode(beginning.rstrip()), text])
            start = min(start, len(text) - 1)
            return Row(None, ()), Question(context + text[:start], [text[start:]])
        if self.kind == MULTIPLE_CHOICE:
            beginning = before + row["query"] + self.delimiter
            texts = [encode(beginning + choice) for choice in row["choices"]]
            shared = _common_start(texts)
            scored = [len(text) - shared for text in texts]
        else:
            ending = self.delimiter + row["continuation"]
            texts = [encode(before + option + ending) for option in row["context_options"]]
            shared = _common_start(texts)
            scored = [_common_start([text[::-1] for text in texts])] * len(texts)
        # The scorer needs at least one token, and a choice may have none of its own.
        unscored = [len(text) - max(1, n) for text, n in zip(texts, scored, strict=True)]
        start = min(shared, *unscored)
        question = Question(context + texts[0][:start], [text[start:] for text in texts])
        return Row(row["gold"], tuple(scored)), question

    def result(self, row: Row, answer: Answer) -> Result:
        """Return whether the answer is right.

        A choice without tokens of its own has no mean loss. It is chosen only if it is the first,
        as in nanochat: min() keeps a first value that is not a number.
        """
        if row.gold is None:
            [ending] = answer
            return {"acc": int(ending.is_top.all())}
        losses = []
        for ending, scored in zip(answer, row.scored, strict=True):
            tokens = len(ending.log_probs)
            nats = -ending.part(tokens - scored, tokens).total
            losses.append(nats / scored if scored else math.nan)
        return {"acc": int(losses.index(min(losses)) == row.gold)}

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        acc = super().figures(results)["acc"]
        return {"acc": acc, "centered_acc": self.centered(acc)}

    def centered(self, acc: float) -> float:
        """Return an accuracy on the scale where a guess has 0 and no errors have 1."""
        return (acc - self.baseline) / (1 - self.baseline)


class Core(Task):
    """All tasks together. The row of an example is the task that it belongs to, and its row."""

    name = "core"
    remote = BUNDLE
    reads_folders = True
    training_limit = 100  # of each task: 0.9 million tokens, at 1,024 positions

    def __init__(self, tasks: Sequence[CoreTask]) -> None:
        self.tasks = tasks
        self.count = sum(task.count for task in tasks)

    def read_examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int
    ) -> Iterator[Example]:
        """Yield the examples of each task whose file is there, at most `limit` of each."""
        is_bundle = path.is_dir() or path.suffix == ".zip"
        present = [task for task in self.tasks if is_bundle and task.find(path)]
        if not present:
            raise UserError(
                f"{path} is not a folder or zip archive with files of CORE, such as "
                f"{self.tasks[0].file}."
            )
        for task in present:
            for example in task.examples(path, tokenizer, n_positions, limit):
                yield Example((task, example.row), example.question)

    def split(self, examples: Sequence[Example]) -> Iterator[tuple[CoreTask, list[Example]]]:
        """Yield each task with its own examples."""
        for task, group in itertools.groupby(examples, key=lambda example: example.row[0]):
            yield task, [Example(example.row[1], example.question) for example in group]

    def missing(self, examples: Sequence[Example]) -> str:
        """Return in words what `examples` lack of the whole; empty if they are all."""
        if self.is_whole(examples):
            return ""
        text = f"{len(examples):,} of {self.count:,} examples"
        present = {task.label for task, _ in self.split(examples)}
        absent = [task.label for task in self.tasks if task.label not in present]
        return f"{text}, and none of {', '.join(absent)}" if absent else text

    def result(self, row: tuple[CoreTask, Row], answer: Answer) -> Result:
        task, own_row = row
        return {"task": task.name, **task.result(own_row, answer)}

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        hits: dict[str, list[int]] = {}
        for result in results:
            hits.setdefault(result["task"], []).append(result["acc"])
        return self.mean({name: (sum(own) / len(own), len(own)) for name, own in hits.items()})

    def mean(self, measured: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
        """Return the figures for (accuracy, number of examples) of tasks, by their names.

        These are the mean of centered accuracies, its standard error, and the centered accuracy of
        each task. If a task is absent, the mean has another name, because it is not CORE.
        """
        centered = {}
        variance = 0.0
        for task in self.tasks:
            if task.name in measured:
                acc, n_examples = measured[task.name]
                centered[task.label] = task.centered(acc)
                variance += acc * (1 - acc) / n_examples / (1 - task.baseline) ** 2
        is_complete = len(centered) == len(self.tasks)
        name = "centered_acc" if is_complete else "partial_centered_acc"
        return {
            name: sum(centered.values()) / len(centered),
            "standard_error": math.sqrt(variance) / len(centered),
            **centered,
        }


def _names_in(archive: Path) -> list[str]:
    """Return the names of the files in a zip archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            return file.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive} is not a zip archive ({error}).") from error


def _encode_shots(shots: Sequence[str], encode: Encode, end_of_text: int) -> tuple[Ids, str]:
    """Return the token ids of the examples in a prompt, and the text between them and the next.

    The texts are encoded separately, since GPT-2's pattern always splits between white space and
    another character before it. A text that ends with white space is encoded with the next one.
    """
    ids = array("i", [end_of_text])
    before = ""
    for shot in shots:
        text = before + shot
        if text[-1:].isspace():
            before = text + BLANK_LINE
        else:
            ids.extend(encode(text))
            before = BLANK_LINE
    return ids, before


def _common_start(sequences: Sequence[Ids]) -> int:
    """Return how many token ids at the beginning are the same in all sequences."""
    for place, ids in enumerate(zip(*sequences, strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(len(ids) for ids in sequences)


def _cut(question: Question, n_positions: int) -> Question:
    """Return the question without the beginning of its context that exceeds the positions.

    As in nanochat, the last token of an ending takes a position, although it is not read.
    """
    shortest = min(len(ending) for ending in question.endings)
    room = max(1, n_positions - shortest)
    return Question(question.context[-room:], question.endings, max_tokens=n_positions)


CORE_TASKS = (
    CoreTask(
        "core:hellaswag_zeroshot",
        MULTIPLE_CHOICE,
        "language_understanding/hellaswag.jsonl",
        shots=0,
        baseline=0.25,
        count=10042,
    ),
    CoreTask(
        "core:jeopardy",
        LANGUAGE_MODELING,
        "world_knowledge/jeopardy_all.jsonl",
        shots=10,
        baseline=0.0,
        count=2117,
        delimiter=ANSWER,
    ),
    CoreTask(
        "core:bigbench_qa_wikidata",
        LANGUAGE_MODELING,
        "world_knowledge/bigbench_qa_wikidata.jsonl",
        shots=10,
        baseline=0.0,
        count=20321,
    ),
    CoreTask(
        "core:arc_easy",
        MULTIPLE_CHOICE,
        "world_knowledge/arc_easy.jsonl",
        shots=10,
        baseline=0.25,
        count=2376,
        delimiter=ANSWER,
    ),
    CoreTask(
        "core:arc_challenge",
        MULTIPLE_CHOICE,
        "world_knowledge/arc_challenge.jsonl",
        shots=10,
        baseline=0.25,
        count=1172,
        delimiter=ANSWER,
    ),
    CoreTask(
        "core:copa",
        MULTIPLE_CHOICE,
        "commonsense_reasoning/copa.jsonl",
        shots=0,
        baseline=0.5,
        count=100,
    ),
    CoreTask(
        "core:commonsense_qa",
        MULTIPLE_CHOICE,
        "commonsense_reasoning/commonsense_qa.jsonl",
        shots=10,
        baseline=0.2,
        count=1221,
    ),
    CoreTask(
        "core:piqa",
        MULTIPLE_CHOICE,
        "commonsense_reasoning/piqa.jsonl",
        shots=10,
        baseline=0.5,
        count=1838,
        delimiter=ANSWER,
    ),
    CoreTask(
        "core:openbook_qa",
        MULTIPLE_CHOICE,
        "commonsense_reasoning/openbook_qa.jsonl",
        shots=0,
        baseline=0.25,
        count=500,
    ),
    CoreTask(
        "core:lambada_openai",
        LANGUAGE_MODELING,
        "language_understanding/lambada_openai.jsonl",
        shots=0,
        baseline=0.0,
        count=5153,
    ),
    CoreTask(
        "core:hellaswag",
        MULTIPLE_CHOICE,
        "language_understanding/hellaswag.jsonl",
        shots=10,
        baseline=0.25,
        count=10042,
    ),
    CoreTask(
        "core:winograd",
        SCHEMA,
        "language_understanding/winograd_wsc.jsonl",
        shots=0,
        baseline=0.5,
        count=273,
    ),
    CoreTask(
        "core:winogrande",
        SCHEMA,
        "language_understanding/winogrande.jsonl",
        shots=0,
        baseline=0.5,
        count=1267,
    ),
    CoreTask(
        "core:bigbench_dyck_languages",
        LANGUAGE_MODELING,
        "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
        shots=10,
        baseline=0.0,
        count=1000,
    ),
    CoreTask(
        "core:agi_eval_lsat_ar",
        MULTIPLE_CHOICE,
        "symbolic_problem_solving/agi_eval_lsat_ar.jsonl",
        shots=3,
        baseline=0.2,
        count=230,
    ),
    CoreTask(
        "core:bigbench_cs_algorithms",
        LANGUAGE_MODELING,
        "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
        shots=10,
        baseline=0.0,
        count=1320,
    ),
    CoreTask(
        "core:bigbench_operators",
        LANGUAGE_MODELING,
        "symbolic_problem_solving/bigbench_operators.jsonl",
        shots=10,
        baseline=0.0,
        count=210,
    ),
    CoreTask(
        "core:bigbench_repeat_copy_logic",
        LANGUAGE_MODELING,
        "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
        shots=10,
        baseline=0.0,
        count=32,
    ),
    CoreTask(
        "core:squad",
        LANGUAGE_MODELING,
        "reading_comprehension/squad.jsonl",
        shots=10,
        baseline=0.0,
        count=10570,
    ),
    CoreTask(
        "core:coqa",
        LANGUAGE_MODELING,
        "reading_comprehension/coqa.jsonl",
        shots=0,
        baseline=0.0,
        count=7983,
    ),
    CoreTask(
        "core:boolq",
        MULTIPLE_CHOICE,
        "reading_comprehension/boolq.jsonl",
        shots=10,
        baseline=0.62,
        count=3270,
        delimiter=ANSWER,
    ),
    CoreTask(
        "core:bigbench_language_identification",
        MULTIPLE_CHOICE,
        "language_understanding/bigbench_language_identification.jsonl",
        shots=10,
        baseline=0.091,
        count=10000,
    ),
)
CORE = Core(CORE_TASKS)
