"""CORE against nanochat's protocol, transformers and lm-evaluation-harness; kills and training."""

import dataclasses
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anew import GPT, Config, GPTConfig, UserError
from anew.checkpoint.huggingface import save_model
from anew.evaluate import published
from anew.evaluate.runner import run_task
from anew.evaluate.scorer import score
from anew.evaluate.tasks.core import CORE, CORE_TASKS, LANGUAGE_MODELING
from anew.evaluate.tasks.task import Remote
from anew.report.html import write
from anew.training.trainer import train
from anew.utils.files import sha256_of
from tests.support import shared
from tests.support.commands import run, start
from tests.support.core import is_right, prompts_of, read_rows, write_bundle
from tests.support.evaluation import TOKENIZER, task_model

TASK = {task.label: task for task in CORE_TASKS}
LABELS = list(TASK)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 50 rows of each task."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), rows=50)


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 rows of each task."""
    return write_bundle(tmp_path_factory.mktemp("small"), rows=12)


@pytest.fixture(scope="module")
def random_model() -> GPT:
    return task_model()


@pytest.fixture(scope="module")
def trained_model() -> GPT:
    """A model that has learnt which tokens are frequent in Shakespeare."""
    text = shared("tinyshakespeare/input.txt").read_text()
    ids = torch.tensor(TOKENIZER.encode(text[:30_000]))
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=128), seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for first in range(0, 20 * 256, 256):
        batch = ids[first : first + 257]
        loss = model(batch[:-1].view(4, 64), batch[1:].view(4, 64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# --- Prompts


@pytest.mark.guarantee("evidence")
@pytest.mark.parametrize("label", LABELS)
def test_questions_equal_the_public_protocol(bundle: Path, label: str) -> None:
    task = TASK[label]
    rows = read_rows(task, bundle, limit=50)
    examples = task.examples(bundle, TOKENIZER, 1024)
    assert len(examples) == min(50, task.count)
    for number, example in enumerate(examples):
        prompts = prompts_of(task, rows, number, 1024)
        question = example.question
        assert question.max_tokens == 1024
        for i, (prompt, ending) in enumerate(zip(prompts, question.endings, strict=True)):
            context = question.context[-(1024 - len(ending)) :]
            assert [*context, *ending] == prompt.ids
            counted = len(ending)
            if task.kind != LANGUAGE_MODELING:
                counted = example.row.scored[i]
            assert len(prompt.ids) - counted == prompt.start
        assert example.row.gold == rows[number].get("gold")


def test_a_limit_takes_the_first_of_the_shuffled_examples(bundle: Path) -> None:
    task = TASK["arc_easy"]
    rows = read_rows(task, bundle, limit=20)
    examples = task.examples(bundle, TOKENIZER, 1024, limit=20)
    assert len(examples) == 20
    for number, example in enumerate(examples):
        prompts = prompts_of(task, rows, number, 1024)
        ending = example.question.endings[0]
        assert [*example.question.context, *ending] == prompts[0].ids


# --- Answers


@pytest.mark.guarantee("evidence")
@pytest.mark.parametrize("which", ["random_model", "trained_model"])
def test_answers_equal_a_plain_loop_over_transformers(
    which: str, small_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    model = request.getfixturevalue(which)
    save_model(tmp_path, model, TOKENIZER)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    answers: dict[str, list[bool]] = {}
    for task in CORE_TASKS:
        rows = read_rows(task, small_bundle, limit=12)
        examples = task.examples(small_bundle, TOKENIZER, 128)[:4]
        scores = score(model, [example.question for example in examples])
        for number, (example, answer) in enumerate(zip(examples, scores, strict=True)):
            prompts = prompts_of(task, rows, number, 128)
            expected = is_right(theirs, rows[number], prompts)
            assert task.result(example.row, answer) == {"acc": expected}
            answers.setdefault(task.kind, []).append(expected)
    for kind, found in answers.items():
        if kind != LANGUAGE_MODELING:  # small models predict no whole answer; see the next test
            assert 0 < sum(found) < len(found)


@torch.no_grad()
def test_the_ending_that_a_model_prefers_is_right(random_model: GPT, tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        context = f"Context: The ship left on day {number}.\nAnswer:"
        ids = [TOKENIZER.end_of_text, *TOKENIZER.encode(context)]
        best, second = random_model(torch.tensor([ids]))[0, -1].topk(2).indices.tolist()
        for token, expected in ((best, 1), (second, 0)):
            word = TOKENIZER.decode([token])
            if TOKENIZER.encode(context + word)[len(ids) - 1 :] == [token] and word[0] == " ":
                rows.append({"context": context, "continuation": word[1:], "expected": expected})
    path = tmp_path / "coqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK["coqa"]
    report = run_task(random_model, task, task.examples(path, TOKENIZER, 128))
    assert report.figures["acc"] == np.mean([row["expected"] for row in rows])
    assert 0 < report.figures["acc"] < 1


def test_likelihoods_equal_the_harness(
    random_model: GPT, small_bundle: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    save_model(tmp_path, random_model, TOKENIZER)
    harness = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=16)
    for label in ("copa", "openbook_qa", "winograd", "lambada_openai"):
        examples = TASK[label].examples(small_bundle, TOKENIZER, 128)
        asked = [example.question for example in examples]
        requests = [
            (("", str(i)), list(question.context), list(ending))
            for i, question in enumerate(asked)
            for ending in question.endings
        ]
        theirs = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        ours = [ending for answer in score(random_model, asked) for ending in answer]
        expected = [nats for nats, _ in theirs]
        np.testing.assert_allclose([ending.total for ending in ours], expected, rtol=1e-5)
        assert [bool(ending.is_top.all()) for ending in ours] == [hit for _, hit in theirs]


def test_core_as_one_task_equals_its_parts(random_model: GPT, small_bundle: Path) -> None:
    examples = CORE.examples(small_bundle, TOKENIZER, 128, limit=11)
    together = run_task(random_model, CORE, examples).figures
    parts: dict[str, tuple[float, int]] = {}
    for task, own in CORE.split(examples):
        report = run_task(random_model, task, own)
        parts[task.name] = (report.figures["acc"], report.examples)
    assert together == pytest.approx(CORE.mean(parts), rel=1e-12)
    assert len(parts) == 22


# --- The command


@pytest.fixture
def saved(random_model: GPT, tmp_path: Path) -> Path:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    save_model(folder, random_model, TOKENIZER)
    return folder


def test_whole_core_of_a_published_size_has_a_verdict(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    saved: Path,
    small_bundle: Path,
) -> None:
    count = 12 * len(CORE_TASKS)
    figures = [
        dataclasses.replace(figure, examples=count) if figure.examples else figure
        for figure in published.FIGURES
    ]
    monkeypatch.setattr(published, "FIGURES", figures)
    monkeypatch.setattr(CORE, "count", count)
    monkeypatch.setattr("anew.cli.evaluate.size_of", lambda config: "124M")
    command = ["evaluate", saved, "--task", "core", "--file", small_bundle, "--json"]
    done = run(capsys, *command)
    assert done.code == 0, done.stderr
    *table, line = done.stdout.splitlines()
    result = json.loads(line)
    values = result["tasks"]["core"]
    [mean] = [found for found in result["comparisons"] if found["figure"] == "centered_acc"]
    assert mean["published"] == 0.1139
    assert mean["allowed"] == pytest.approx(2 * values["standard_error"])
    passed = values["centered_acc"] >= 0.1139 - mean["allowed"]
    assert mean["verdict"] == ("PASS" if passed else "FAIL")
    assert result["partial"] == {}
    text = "\n".join(table)
    assert all(f" {label} " in text for label in LABELS)
    assert max(map(len, table)) <= 80
    part = run(capsys, *command, "--limit", 11)
    assert "core is partial: 242 of 264 examples" in part.stdout
    assert json.loads(part.stdout.splitlines()[-1])["comparisons"][0]["verdict"] == ""
    alone = run(capsys, "evaluate", saved, "--task", "core:piqa", "--file", small_bundle, "--json")
    assert "12 of them kept from an earlier evaluation" in alone.stderr
    own = json.loads(alone.stdout.splitlines()[-1])["tasks"]["core:piqa"]
    assert own["centered_acc"] == values["piqa"]


def test_killed_core_continues_with_the_same_figures(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    saved: Path,
    small_bundle: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    command = ["evaluate", saved, "--task", "core", "--file", small_bundle, "--json"]
    process = start(*command)
    store = tmp_path / "cache" / "evaluations"
    while process.poll() is None and len(list(store.glob("*/*.jsonl"))) < 3:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode < 0, "the command ended before it was killed"
    continued = run(capsys, *command)
    assert "kept from an earlier evaluation" in continued.stderr
    fresh = run(capsys, *command, "--fresh")
    assert "kept" not in fresh.stderr
    tasks = [json.loads(done.stdout.splitlines()[-1])["tasks"] for done in (continued, fresh)]
    assert tasks[0] == tasks[1]


# --- While a model trains


def test_training_measures_core_and_the_report_shows_it(
    monkeypatch: pytest.MonkeyPatch, tiny: Config, small_bundle: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "cache" / "downloads" / "eval_bundle.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in small_bundle.rglob("*.jsonl"):
            file.write(path, Path("eval_bundle") / path.relative_to(small_bundle))
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(CORE, "remote", Remote(CORE.remote.url, sha256_of(archive)))
    config = tiny.override(evaluate_every=6, evaluate_tasks="core", evaluate_limit=11)
    result = train(config)
    metrics = (result.folder / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics]
    measured = [row for row in rows if "eval/core/centered_acc" in row]
    assert {row["step"] for row in measured} == {6, 12}
    for row in measured:
        centered = [row[f"eval/core/{label}"] for label in LABELS]
        assert row["eval/core/centered_acc"] == pytest.approx(np.mean(centered))
        assert row["eval/core/examples"] == 242
    page = write([result.folder], tmp_path / "report.html").read_text()
    assert "core: centered accuracy of each task" in page
    shown = f"<td>boolq</td><td>{measured[0]['eval/core/boolq']:.3f}</td>"
    assert shown in page


def test_training_with_core_is_refused_before_it_begins_without_data(
    monkeypatch: pytest.MonkeyPatch, tiny: Config, tmp_path: Path
) -> None:
    def no_network(url: str, *_: object, hint: str, **__: object) -> None:
        raise UserError(f"{url} could not be downloaded (no network); {hint}.")

    monkeypatch.setattr("anew.data.sources.download", no_network)
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"eval_bundle\.zip could not be downloaded"):
        train(tiny.override(evaluate_every=6, evaluate_tasks="core"))
    assert (tiny.folder / "metrics.jsonl").read_text() == ""  # no step
