"""CORE: prompts worked by hand, files in all their places, and the arithmetic of the mean.

`tests/integration/test_core.py` compares every task with nanochat's protocol.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anew import UserError
from anew.evaluate.published import compare
from anew.evaluate.scorer import Answer, EndingScore
from anew.evaluate.tasks.core import CORE, CORE_TASKS, MULTIPLE_CHOICE, CoreTask, Row
from anew.evaluate.tasks.registry import TASKS, TASKS_OF_ALL, unknown_task
from tests.support.core import prompts_of, read_rows
from tests.support.evaluation import TOKENIZER

TASK = {task.label: task for task in CORE_TASKS}
# GPT-2 124M in bf16, all examples, as measured with a port of nanochat's code by
# SammyTourani/road-to-52 (results/gpt2-124m-reference/core_per_task.csv): 0.121646.
MEASURED_CORE = 0.121646
MEASURED = {
    "hellaswag_zeroshot": (0.308803, 0.078404),
    "jeopardy": (0.003307, 0.003307),
    "bigbench_qa_wikidata": (0.282614, 0.282614),
    "arc_easy": (0.418350, 0.224467),
    "arc_challenge": (0.222696, -0.036405),
    "copa": (0.620000, 0.240000),
    "commonsense_qa": (0.237510, 0.046888),
    "piqa": (0.620783, 0.241567),
    "openbook_qa": (0.276000, 0.034667),
    "lambada_openai": (0.324083, 0.324083),
    "hellaswag": (0.307011, 0.076014),
    "winograd": (0.593407, 0.186813),
    "winogrande": (0.516180, 0.032360),
    "bigbench_dyck_languages": (0.155000, 0.155000),
    "agi_eval_lsat_ar": (0.230435, 0.038043),
    "bigbench_cs_algorithms": (0.423485, 0.423485),
    "bigbench_operators": (0.090476, 0.090476),
    "bigbench_repeat_copy_logic": (0.031250, 0.031250),
    "squad": (0.057900, 0.057900),
    "coqa": (0.132782, 0.132782),
    "boolq": (0.554434, -0.172541),
    "bigbench_language_identification": (0.259200, 0.185039),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choice_row(number: int) -> dict[str, Any]:
    return {"query": f"Question: {number}?", "choices": [f"yes {number}", "no"], "gold": number % 2}


# --- Prompts


def test_prompt_of_a_question_equals_the_text_worked_by_hand(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [choice_row(number) for number in range(5)])
    task = CoreTask("core:x", MULTIPLE_CHOICE, "x.jsonl", 3, 0.5, 5, delimiter="\nAnswer: ")
    # Python's Random(1337) shuffles five rows to 1, 0, 3, 2, 4. For question 3 of them, which is
    # row 2, Random(1237) draws the questions 1, 4, 2.
    example = task.examples(path, TOKENIZER, 1024)[3]
    text = (
        "Question: 0?\nAnswer: yes 0\n\n"
        "Question: 4?\nAnswer: yes 4\n\n"
        "Question: 3?\nAnswer: no\n\n"
        "Question: 2?\nAnswer:"
    )
    assert list(example.question.context) == [TOKENIZER.end_of_text, *TOKENIZER.encode(text)]
    endings = [TOKENIZER.decode(list(ending)) for ending in example.question.endings]
    assert endings == [" yes 2", " no"]
    assert example.row == Row(gold=0, scored=(2, 1))


def test_schema_counts_the_common_end_only(tmp_path: Path) -> None:
    row = {
        "context_options": ["The council refused because the council", "The council refused it as"],
        "continuation": "feared violence.",
        "gold": 1,
    }
    path = write_rows(tmp_path / "rows.jsonl", [row])
    [example] = TASK["winograd"].examples(path, TOKENIZER, 1024)
    beginning = TOKENIZER.encode("The council refused")
    assert list(example.question.context) == [TOKENIZER.end_of_text, *beginning]
    endings = [TOKENIZER.decode(list(ending)) for ending in example.question.endings]
    assert endings == [" because the council feared violence.", " it as feared violence."]
    assert example.row == Row(gold=1, scored=(3, 3))


@pytest.mark.parametrize("label", ["squad", "coqa"])
def test_reading_comprehension_predicts_the_whole_answer(label: str, tmp_path: Path) -> None:
    rows = [
        {"context": f" Day {n}.\nQuestion: Which?\nAnswer: ", "continuation": f"day {n}"}
        for n in range(12)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for example in TASK[label].examples(path, TOKENIZER, 1024):
        [ending] = example.question.endings
        prompt = TOKENIZER.decode(list(example.question.context)).removeprefix("<|endoftext|>")
        answer = TOKENIZER.decode(list(ending))
        assert prompt.endswith("Which?\nAnswer:")
        assert prompt.rpartition("Day ")[2].startswith(answer.removeprefix(" day "))
        assert prompt.count("\n\n") == TASK[label].shots


def test_white_space_is_encoded_as_in_the_whole_prompt(tmp_path: Path) -> None:
    spaces = ["", " ", "\n", " \n\n", "  "]
    rows = [
        {"query": f"{space}Number {n}?{space}", "choices": [f"yes{space}", f"no{n}"], "gold": 0}
        for n, space in enumerate(spaces * 3)
    ]
    task = TASK["commonsense_qa"]
    write_rows(tmp_path / "commonsense_qa.jsonl", rows)
    shuffled = read_rows(task, tmp_path, limit=15)
    for number, example in enumerate(task.examples(tmp_path, TOKENIZER, 1024)):
        prompts = prompts_of(task, shuffled, number, 1024)
        question = example.question
        asked = [[*question.context, *ending] for ending in question.endings]
        assert asked == [prompt.ids for prompt in prompts]


def test_white_space_before_an_answer_is_predicted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"context": "Day ", "continuation": " two"}])
    [example] = TASK["coqa"].examples(path, TOKENIZER, 1024)
    assert list(example.question.context) == [TOKENIZER.end_of_text, *TOKENIZER.encode("Day")]
    assert TOKENIZER.decode(list(example.question.endings[0])) == "  two"


def test_long_prompt_loses_its_beginning(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [choice_row(number) for number in range(12)])
    task = TASK["arc_easy"]
    for whole, cut in zip(
        task.examples(path, TOKENIZER, 1024), task.examples(path, TOKENIZER, 40), strict=True
    ):
        for ending in cut.question.endings:
            assert cut.question.max_tokens == 40
            room = 40 - len(ending)
            assert len(cut.question.context) >= room
            assert cut.question.context[-room:] == whole.question.context[-room:]


# --- Judgements


def answer_of(*log_probs: list[float]) -> Answer:
    return [
        EndingScore(np.array(values, dtype=np.float32), np.array([True, False][: len(values)]))
        for values in log_probs
    ]


def test_the_lowest_mean_loss_of_the_tokens_that_count_is_chosen() -> None:
    task = TASK["copa"]
    row = Row(gold=1, scored=(2, 1))
    assert task.result(row, answer_of([-2.0, -2.0], [-9.0, -1.9])) == {"acc": 1}
    assert task.result(row, answer_of([-2.0, -1.7], [-0.0, -1.9])) == {"acc": 0}


def test_every_token_must_be_the_most_likely_one() -> None:
    task = TASK["squad"]
    assert task.result(Row(None, ()), answer_of([-1.0])) == {"acc": 1}
    assert task.result(Row(None, ()), answer_of([-1.0, -1.0])) == {"acc": 0}


def test_a_choice_that_begins_another_is_chosen_only_as_the_first(tmp_path: Path) -> None:
    rows = [
        {"query": "Two", "choices": ["words", "words more"], "gold": 0},
        {"query": "Two", "choices": ["words more", "words"], "gold": 0},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    by_order = {}
    for example in TASK["copa"].examples(path, TOKENIZER, 1024):
        scores = [[-9.0] * len(ending) for ending in example.question.endings]
        by_order[example.row.scored] = TASK["copa"].result(example.row, answer_of(*scores))
    assert by_order == {(0, 1): {"acc": 1}, (1, 0): {"acc": 1}}


# --- The mean


def test_mean_equals_a_published_measurement_of_all_tasks() -> None:
    measured = {f"core:{label}": (acc, TASK[label].count) for label, (acc, _) in MEASURED.items()}
    figures = CORE.mean(measured)
    assert figures["centered_acc"] == pytest.approx(MEASURED_CORE, abs=1e-6)
    for label, (acc, centered) in MEASURED.items():
        assert figures[label] == pytest.approx(centered, abs=2e-6)
        hits = acc * TASK[label].count
        assert hits == pytest.approx(round(hits), abs=0.011)  # so the number of examples is right
    assert CORE.count == 91037  # stated by bjlkeng/gpt-training-sandbox


def test_standard_error_equals_that_of_simulated_measurements() -> None:
    generator = np.random.default_rng(3)
    means = []
    for _ in range(2000):
        drawn = {
            f"core:{label}": (generator.binomial(50, acc) / 50, 50)
            for label, (acc, _) in MEASURED.items()
        }
        means.append(CORE.mean(drawn)["centered_acc"])
    expected = CORE.mean({f"core:{label}": (acc, 50) for label, (acc, _) in MEASURED.items()})
    assert expected["standard_error"] == pytest.approx(float(np.std(means)), rel=0.05)


@pytest.mark.guarantee("evidence")
def test_the_mean_passes_within_two_standard_errors() -> None:
    figures = {"centered_acc": 0.1018, "standard_error": 0.00608}
    [found] = compare("core", figures, "124M", 91037, whole=True)
    assert found.verdict == "PASS"
    [found] = compare("core", {**figures, "centered_acc": 0.1016}, "124M", 91037, whole=True)
    assert found.verdict == "FAIL"
    [part] = compare("core", figures, "124M", 2132, whole=True)
    assert part.verdict == ""
    for size, core in (("355M", 0.1849), ("774M", 0.2146), ("1558M", 0.2565)):
        [found] = compare("core", figures, size, 91037, whole=True)
        assert (found.theirs, found.verdict) == (core, "FAIL")


def test_a_mean_without_some_tasks_has_another_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "copa.jsonl", [choice_row(number) for number in range(4)])
    examples = CORE.examples(tmp_path, TOKENIZER, 1024)
    assert not CORE.is_whole(examples)
    assert CORE.missing(examples).startswith("4 of 91,037 examples, and none of hellaswag_zeroshot")
    figures = CORE.figures([{"task": "core:copa", "acc": hit} for hit in (1, 1, 0, 1)])
    assert figures["partial_centered_acc"] == figures["copa"] == 0.5
    assert "centered_acc" not in figures
    assert figures["standard_error"] == pytest.approx(2 * math.sqrt(0.75 * 0.25 / 4))


# --- Files


def test_a_folder_and_an_archive_give_the_same_examples(tmp_path: Path) -> None:
    rows = [choice_row(number) for number in range(12)]
    folder = tmp_path / "folder"
    inside = write_rows(folder / "eval_bundle" / "eval_data" / TASK["arc_easy"].file, rows)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.write(inside, f"eval_bundle/eval_data/{TASK['arc_easy'].file}")
    found = [
        TASK["arc_easy"].examples(path, TOKENIZER, 64)
        for path in (folder, tmp_path / "bundle.zip", inside)
    ]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 12


@pytest.mark.parametrize(
    ("task", "name", "limit", "words"),
    [
        ("core:arc_easy", "", 10, "contains 10 other examples, and there are 10"),
        ("core:arc_easy", "arc_easy.jsonl", 1, "take 11 or more"),
        ("core:squad", "", 0, "does not contain reading_comprehension/squad.jsonl"),
        ("core:squad", "arc_easy.jsonl", 0, "is not a JSON object with context, continuation"),
        ("core:copa", "broken.zip", 0, "is not a zip archive"),
        ("core", "arc_easy.jsonl", 0, "not a folder or zip archive with files of CORE"),
        ("core:copa", "copa.jsonl", 0, "not in the format of task core:copa"),
    ],
)
def test_invalid_data_is_refused(
    task: str, name: str, limit: int, words: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "arc_easy.jsonl", [choice_row(number) for number in range(12)])
    write_rows(tmp_path / "copa.jsonl", [{"query": 1, "choices": ["a"], "gold": 0}])
    (tmp_path / "broken.zip").write_text("no archive")
    with pytest.raises(UserError, match=words):
        TASKS[task].examples(tmp_path / name, TOKENIZER, 1024, limit)


def test_each_task_of_core_is_a_task_and_none_is_part_of_all() -> None:
    assert {task.name for task in CORE_TASKS} <= set(TASKS)
    assert not any(name.startswith("core") for name in TASKS_OF_ALL)
    assert "did you mean core:arc_easy?" in str(unknown_task("core:arc_eazy", TASKS))
    assert "choose one of core:hellaswag_zeroshot," in str(unknown_task("core:zzzz", TASKS))
    sentence = str(unknown_task("unlike", TASKS))
    assert sentence.endswith("wikitext103, core, core:NAME.")
