"""HellaSwag: choose which of four endings continues a text. Zellers et al. 2019.

The 10,042 validation examples are scored in two ways, which give different published figures:

| task | text | `acc_norm` compares | GPT-2 124M | measured by |
|---|---|---|---|---|
| hellaswag | as in the file | loss per token | 0.2955 | build-nanogpt |
| hellaswag_harness | cleaned | loss per character | 0.3114 | lm-evaluation-harness |

`acc` compares the loss of whole endings: 0.2859 and 0.2892.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from anew.errors import UserError
from anew.evaluate.scorer import Answer, Question
from anew.evaluate.tasks.task import (
    Remote,
    Result,
    Task,
    read_json_lines,
    read_text,
    split_pair,
)
from anew.tokenizer.bpe import Tokenizer

KEYS = ["activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"]
LABELS = ("0", "1", "2", "3")
LINES_PER_EXAMPLE = 2 + len(LABELS)  # in a text file: the context, the label and the endings


class HellaSwag(Task):
    """HellaSwag as build-nanogpt scores it: raw text, each ending tokenized behind a space.

    A row is {"context", "endings", "label"}.
    """

    name = "hellaswag"
    count = 10042
    remote = Remote(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    )

    def rows(self, path: Path) -> list[Any]:
        labelled = _read_labelled(path)
        return [_row(row["ctx"], row["endings"], row["label"]) for row in labelled]

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        context = tokenizer.encode(row["context"]) or [tokenizer.end_of_text]
        endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
        return Question(context, endings)

    def result(self, row: Any, answer: Answer) -> Result:
        n_tokens = [len(ending.log_probs) for ending in answer]
        return _accuracies(row, answer, n_tokens)


class HellaSwagHarness(HellaSwag):
    """HellaSwag as lm-evaluation-harness scores it: cleaned text that begins with its activity.

    Reads the original JSON lines, or a file of cleaned text with six lines an example: the context,
    the label and four endings. Such files lack the harness's one capital letter, at the beginning
    of the context's second part, which can change a prediction.
    """

    name = "hellaswag_harness"

    def rows(self, path: Path) -> list[Any]:
        if not read_text(path).startswith("{"):
            return _read_cleaned(path)
        rows = []
        for row in _read_labelled(path):
            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            endings = [_cleaned(ending) for ending in row["endings"]]
            rows.append(_row(_cleaned(context), endings, row["label"]))
        return rows

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        pairs = [split_pair(tokenizer, row["context"], " " + ending) for ending in row["endings"]]
        endings = [pair.endings[0] for pair in pairs]
        return Question(pairs[0].context, endings)

    def result(self, row: Any, answer: Answer) -> Result:
        n_characters = [len(ending) for ending in row["endings"]]
        return _accuracies(row, answer, n_characters)


def _row(context: str, endings: list[str], label: int) -> dict[str, Any]:
    return {"context": context, "endings": endings, "label": label}


def _accuracies(row: Any, answer: Answer, lengths: list[int]) -> Result:
    """Return whether the likeliest ending is right, by log-likelihood in total and per length."""
    totals = np.array([ending.total for ending in answer])
    means = totals / lengths
    return {
        "acc": int(totals.argmax() == row["label"]),
        "acc_norm": int(means.argmax() == row["label"]),
    }


def _read_labelled(path: Path) -> list[dict[str, Any]]:
    """Return the examples of the original JSON lines, labels as int."""
    rows = read_json_lines(path, KEYS)
    for row in rows:
        has_endings = len(row["endings"]) == len(LABELS)
        if not has_endings or str(row["label"]) not in LABELS:
            raise UserError(
                f"{path} is not HellaSwag's labelled part: an example lacks four endings and a "
                "label of 0 to 3."
            )
        row["label"] = int(row["label"])
    return rows


def _read_cleaned(path: Path) -> list[dict[str, Any]]:
    """Return the examples of a file with six lines an example."""
    lines = read_text(path).rstrip("\n").split("\n")
    rows = []
    for start in range(0, len(lines), LINES_PER_EXAMPLE):
        example = lines[start : start + LINES_PER_EXAMPLE]
        if len(example) != LINES_PER_EXAMPLE or example[1] not in LABELS:
            raise UserError(
                f"{path} is not HellaSwag: it has neither JSON lines nor six lines an example."
            )
        context, label, *endings = example
        rows.append(_row(context, endings, int(label)))
    return rows


def _cleaned(text: str) -> str:
    """Remove the marks in brackets of the half from WikiHow, as lm-evaluation-harness does.

    A title mark becomes the end of a sentence.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
