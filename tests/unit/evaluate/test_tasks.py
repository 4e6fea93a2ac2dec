"""The tasks: questions of real rows worked by hand, files that are refused, and sums.

`tests/integration/test_tasks.py` compares figures with lm-evaluation-harness and transformers.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import UserError
from anew.data import prepare, sources
from anew.data.dataloader import evaluation_windows
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.evaluate.loss import mean_loss
from anew.evaluate.runner import run_task
from anew.evaluate.scorer import Question
from anew.evaluate.tasks.registry import REMOVED_TASKS, TASKS, unknown_task
from anew.evaluate.tasks.running_text import windows
from anew.evaluate.tasks.task import split_pair
from anew.evaluate.tasks.validation import Validation
from anew.evaluate.tasks.wikitext import WIKITEXT103
from tests.support import shared
from tests.support.evaluation import TOKENIZER, task_model

ROW: dict[str, Any] = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """The beginning of WikiText's test articles."""
    path = tmp_path / "wikitext.raw"
    path.write_bytes(shared("wikitext/wikitext2.test.raw").read_bytes()[:40_000])
    return path


def test_hellaswag_questions_equal_tokens_worked_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    [raw] = TASKS["hellaswag"].examples(path, TOKENIZER, 1024)
    # "A man is sitting on a roof. he"
    assert raw.question.context == [32, 582, 318, 5586, 319, 257, 9753, 13, 339]
    # " is ripping level tiles off.", with the space before it
    assert raw.question.endings[1] == [318, 34759, 1241, 19867, 572, 13]
    [clean] = TASKS["hellaswag_harness"].examples(path, TOKENIZER, 1024)
    context = TOKENIZER.decode(clean.question.context)
    assert context == "Roof shingle removal: A man is sitting on a roof. He"
    endings = [TOKENIZER.decode(ending) for ending in clean.question.endings]
    assert endings == [" " + ending for ending in ROW["endings"]]


def test_windows_predict_every_token_once_behind_as_many_as_fit() -> None:
    ids = list(range(100))
    for positions, stride in ((16, 0), (16, 4), (16, 1), (128, 0), (16, 99)):
        predicted: list[int] = []
        for example in windows(ids, positions, 10, 1000, stride):
            [ending] = example.question.endings
            first = ending[0]
            start = max(0, first + len(ending) - 1 - positions)
            assert list(example.question.context) == ids[start:first]
            predicted += ending
        assert predicted == ids[1:]
    words = sum(example.row.words for example in windows(ids, 16, words=10))
    assert words == pytest.approx(10)


def test_figures_of_running_text_agree_with_each_other(wikitext: Path) -> None:
    model = task_model()
    task = dataclasses.replace(WIKITEXT103, stride=64)
    examples = task.examples(wikitext, TOKENIZER, 128)[:40]
    figures = run_task(model, task, examples).figures
    assert math.log(figures["token_perplexity"]) == pytest.approx(figures["loss"])
    # The first tokens of an article, and those behind a half-full window.
    assert set(figures["loss_by_position"]) >= {"1", "64"}
    tokens = sum(len(example.question.endings[0]) for example in examples)
    n_bytes = sum(example.row.bytes for example in examples)
    bits = figures["bits_per_byte"] * n_bytes
    assert bits * math.log(2) == pytest.approx(figures["loss"] * tokens)


def test_smaller_stride_gives_the_same_tokens_more_context(wikitext: Path) -> None:
    coarse_task = dataclasses.replace(WIKITEXT103, stride=64)
    fine_task = dataclasses.replace(WIKITEXT103, stride=8)
    coarse = coarse_task.examples(wikitext, TOKENIZER, 128)[:40]
    fine = fine_task.examples(wikitext, TOKENIZER, 128)[: 40 * 8]
    predicted = [token for example in fine for token in example.question.endings[0]]
    assert predicted[: 40 * 64] != []
    # Windows at the beginning of the text have no context yet.
    coarse_seen = [example.row.seen for example in coarse[1:]]
    fine_seen = [example.row.seen for example in fine[8:]]
    assert sum(fine_seen) / len(fine_seen) > sum(coarse_seen) / len(coarse_seen)


def test_validation_task_equals_the_loss_that_training_reports(
    text_file: Path, tmp_path: Path
) -> None:
    model = task_model()
    prepare.prepare_data(sources.find(str(text_file)), Settings("gpt2"), tmp_path / "data")
    folder = open_data(str(tmp_path / "data"), "gpt2")
    task = Validation(folder, 48, 500)
    examples = task.examples(Path(), TOKENIZER, 128)
    figures = run_task(model, task, examples).figures
    batches = evaluation_windows(folder.splits["val"], 48, 500, batch=4)
    expected = mean_loss(model, batches, torch.float32)
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    predicted = sum(len(example.question.endings[0]) for example in examples)
    assert predicted == 499
    n_bytes = sum(example.row.bytes for example in examples)
    bits_per_byte = expected * 499 / math.log(2) / n_bytes
    assert figures["bits_per_byte"] == pytest.approx(bits_per_byte)
    with pytest.raises(UserError, match="has no validation text"):
        Validation(folder, 48, 0)


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("hellaswag", "{}\n", "line 1 is not a JSON object"),
        ("hellaswag", "", "is empty"),
        ("hellaswag", "A man\n3\n", "is not a JSON"),
        ("hellaswag", json.dumps({**ROW, "label": ""}), "labelled"),
        ("hellaswag", json.dumps({**ROW, "ctx": None}), "not in the format"),
        ("hellaswag_harness", "A man\n9\na\nb\nc\nd\n", "is not HellaSwag"),
        ("hellaswag_harness", json.dumps({**ROW, "ctx_b": 5}), "not in the format"),
        ("lambada", '{"text": "word"}', "no last word"),
        ("lambada", '{"text": null}', "not in the format"),
        ("wikitext2", " \n ", "holds no text"),
    ],
)
def test_file_of_another_format_is_refused(
    task: str, content: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        TASKS[task].examples(path, TOKENIZER, 128)


@pytest.mark.parametrize("name", REMOVED_TASKS)
def test_removed_task_is_refused_with_what_to_do_instead(name: str) -> None:
    assert name not in TASKS
    sentence = str(unknown_task(name, TASKS))
    assert f"the task {name} no longer exists" in sentence
    assert "--task harness:" in sentence


def test_a_task_with_a_typing_error_is_refused_with_the_task_that_was_meant() -> None:
    assert "did you mean hellaswag?" in str(unknown_task("helaswag", TASKS))


def test_split_pair_moves_the_space_to_the_ending() -> None:
    assert split_pair(TOKENIZER, "Hello ", "world") == Question([15496], [[995]])
    assert split_pair(TOKENIZER, "", "Hello") == Question([TOKENIZER.end_of_text], [[15496]])
