"""CORE as karpathy/nanochat computes it: whole prompts, one forward pass for each question.

Written from the description of `nanochat/core_eval.py`, to compare anew.evaluate.tasks.core with.
"""

import json
import lzma
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anew.evaluate.tasks.core import CORE_TASKS, LANGUAGE_MODELING, MULTIPLE_CHOICE, CoreTask
from tests.support import shared
from tests.support.evaluation import TOKENIZER


class Prompt(NamedTuple):
    """Token ids, and which of them count."""

    ids: list[int]
    start: int


def write_bundle(folder: Path, rows: int) -> Path:
    """Write a folder with the first rows of the files at hand, and rows of the other tasks."""
    hellaswag = shared("hellaswag/hellaswag_val_raw_1000.jsonl").read_text().splitlines()
    lambada = shared("lambada/lambada_test.jsonl").read_text().splitlines()
    for task in CORE_TASKS:
        name = task.file.rpartition("/")[2]
        if name == "hellaswag.jsonl":
            lines = [json.dumps(_hellaswag_row(json.loads(line))) for line in hellaswag[:rows]]
        elif name == "lambada_openai.jsonl":
            lines = [json.dumps(_lambada_row(json.loads(line))) for line in lambada[:rows]]
        elif name in ("squad.jsonl", "coqa.jsonl"):
            lines = [json.dumps(_reading_row(number)) for number in range(rows)]
        else:
            text = lzma.decompress(shared(f"core/{name}.xz").read_bytes()).decode()
            lines = text.splitlines()[:rows]
        file = folder / "eval_data" / task.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def _hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "query": f"{row['activity_label']}: {row['ctx']}",
        "choices": row["endings"],
        "gold": int(row["label"]),
    }


def _lambada_row(row: dict[str, Any]) -> dict[str, Any]:
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": word}


def _reading_row(number: int) -> dict[str, Any]:
    """Return a row in the form of SQuAD and CoQA, with white space at the end of the context."""
    answer = f"on day {number}"
    return {
        "context": f"Context: The ship left {answer}.\nQuestion: When did it leave?\nAnswer: ",
        "continuation": answer,
    }


def read_rows(task: CoreTask, folder: Path, limit: int) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a task in the order of the protocol."""
    found = task.find(folder)
    assert found is not None
    content = found[0].read_bytes()
    if found[0].suffix == ".xz":
        content = lzma.decompress(content)
    rows = [json.loads(line) for line in content.decode().splitlines()]
    random.Random(1337).shuffle(rows)
    return rows[:limit]


def prompt_texts(task: CoreTask, rows: list[dict[str, Any]], number: int) -> tuple[str, list[str]]:
    """Return the prompt without what is chosen or predicted, and the prompts with it."""
    row = rows[number]
    others = [other for other in range(len(rows)) if other != number]
    shots = ""
    if task.shots:
        for other in random.Random(1234 + number).sample(others, task.shots):
            shots += _solved(task, rows[other]) + "\n\n"
    if task.kind == MULTIPLE_CHOICE:
        stem = shots + row["query"] + task.delimiter
        return stem, [stem + choice for choice in row["choices"]]
    if task.kind == LANGUAGE_MODELING:
        stem = shots + row["context"].strip() + task.delimiter
        return stem.strip(), [stem + row["continuation"]]
    ending = task.delimiter + row["continuation"]
    return shots, [shots + option + ending for option in row["context_options"]]


def _solved(task: CoreTask, row: dict[str, Any]) -> str:
    if task.kind == MULTIPLE_CHOICE:
        parts = [row["query"], row["choices"][row["gold"]]]
    elif task.kind == LANGUAGE_MODELING:
        parts = [row["context"].strip(), row["continuation"]]
    else:
        parts = [row["context_options"][row["gold"]], row["continuation"]]
    return task.delimiter.join(parts)


def prompts_of(
    task: CoreTask, rows: list[dict[str, Any]], number: int, n_positions: int
) -> list[Prompt]:
    """Return the prompts of a question, cut to the last `n_positions` tokens."""
    stem, texts = prompt_texts(task, rows, number)
    encoded = [[TOKENIZER.end_of_text, *TOKENIZER.encode(text)] for text in texts]
    if task.kind == LANGUAGE_MODELING:
        stem_ids = [TOKENIZER.end_of_text, *TOKENIZER.encode(stem)]
        assert encoded[0][: len(stem_ids)] == stem_ids
        starts = [len(stem_ids)]
    elif task.kind == MULTIPLE_CHOICE:
        starts = [_shared(encoded)] * len(encoded)
    else:
        suffix = _shared([ids[::-1] for ids in encoded])
        starts = [len(ids) - suffix for ids in encoded]
    prompts = []
    for ids, start in zip(encoded, starts, strict=True):
        cut = max(0, len(ids) - n_positions)
        prompts.append(Prompt(ids[cut:], start - cut))
    return prompts


def _shared(sequences: list[list[int]]) -> int:
    count = 0
    while count < min(map(len, sequences)):
        if any(ids[count] != sequences[0][count] for ids in sequences):
            break
        count += 1
    return count


@torch.no_grad()
def is_right(model: torch.nn.Module, row: dict[str, Any], prompts: list[Prompt]) -> bool:
    """Return whether a model of transformers answers right: one padded batch, all logits."""
    width = max(len(prompt.ids) for prompt in prompts)
    padding = [TOKENIZER.end_of_text] * width
    rows = torch.tensor([(prompt.ids + padding)[:width] for prompt in prompts])
    logits = model(rows).logits
    means = []
    for prompt, prompt_logits in zip(prompts, logits, strict=True):
        predictions = prompt_logits[prompt.start - 1 : len(prompt.ids) - 1]
        targets = torch.tensor(prompt.ids[prompt.start :])
        if "gold" not in row:
            return bool((predictions.argmax(-1) == targets).all())
        means.append(torch.nn.functional.cross_entropy(predictions, targets).item())
    return bool(means.index(min(means)) == row["gold"])
