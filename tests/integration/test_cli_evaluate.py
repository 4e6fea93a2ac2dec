"""`anew evaluate`: its table, its JSON line, and how it refuses invalid input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anew import GPT, Config, GPTConfig, Tokenizer, UserError
from anew.checkpoint.huggingface import save_model
from anew.training.trainer import train
from tests.support.commands import run


@pytest.fixture
def model(tiny: Config) -> Path:
    train(tiny)
    return tiny.folder


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    """Ninety passages in the format of LAMBADA."""
    lines = []
    for i in range(90):
        place = "at home " * (i % 7)
        text = f"The ship leaves on day {i} and the king stays {place}here"
        lines.append(json.dumps({"text": text}) + "\n")
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(lines))
    return path


def test_evaluate_prints_a_table_and_one_json_line(
    capsys: pytest.CaptureFixture[str], model: Path, passages: Path
) -> None:
    command = ["evaluate", model, "--task", "lambada", "--file", passages, "--limit", "20"]
    first = run(capsys, *command, "--against", model, "--json")
    assert first.code == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    assert result["tasks"]["lambada"]["examples"] == 20
    assert result["against"]["lambada"]["acc"] == result["tasks"]["lambada"]["acc"]
    assert result["limit"] == 20
    assert "No GPT-2 of this shape was published" in first.stdout
    assert max(map(len, first.stdout.splitlines()[:-1])) <= 80
    again = run(capsys, *command, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["tasks"] == result["tasks"]
    assert "20 of them kept from an earlier evaluation" in again.stderr
    lines = (model / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    assert [row["step"] for row in rows] == [12, 12]
    fresh = run(capsys, *command, "--fresh")
    assert "kept" not in fresh.stderr


def test_tasks_that_could_not_be_run_are_listed(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(url: str, *_: object, hint: str, **__: object) -> None:
        raise UserError(f"{url} could not be downloaded (no network); {hint}.")

    monkeypatch.setattr("anew.data.sources.download", no_network)
    code, out, err = run(capsys, "evaluate", model, "--against", model)
    assert code == 1, err
    assert "no figures of hellaswag, hellaswag_harness, lambada" in err
    assert re.search(r"val +loss +(\d\.\d{4}) +\1", out)
    said = " ".join(out.split())
    assert "hellaswag not run: https://" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--task nothing", "there is no task 'nothing'"),
        ("--task ptb", "task ptb no longer exists"),
        ("--task ,", "names no task"),
        ("--task val --limit -1", "must be 0 or above"),
        ("--file {passages}", "--file is the data of one task"),
        ("--task lambada --stride 4", "--stride is for tasks of running text"),
        ("--task harness:x --fresh", "tasks of the harness take neither"),
        ("--task lambada --file nowhere", "does not exist"),
        (
            "--task wikitext2 --file {passages} --against {other}",
            "figures per token cannot be compared",
        ),
    ],
)
def test_invalid_evaluation_is_refused(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    passages: Path,
    tmp_path: Path,
    arguments: str,
    words: str,
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shape = GPTConfig(n_layer=1, n_head=1, n_embd=8, n_positions=16)
    save_model(other, GPT(shape), Tokenizer.named("gpt2"))
    argv = arguments.format(passages=passages, other=other).split()
    finished = run(capsys, "evaluate", model, *argv)
    assert finished.code == 2
    assert words in finished.stderr


def test_val_scores_only_the_unchanged_text_of_the_run(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newest = sorted((model / "checkpoints").iterdir())[-1]
    monkeypatch.chdir(model / "checkpoints")
    assert run(capsys, "evaluate", newest.name, "--task", "val")[0] == 0
    stray = tmp_path / "elsewhere" / "checkpoints" / newest.name
    shutil.copytree(newest, stray)
    code, _, err = run(capsys, "evaluate", stray, "--task", "val")
    assert code == 2
    assert "its validation text is not known" in err
    story = tmp_path / "changed.txt"
    story.write_text(Path(tiny.data.data).read_text())
    train(tiny.override(data=str(story), out=str(tmp_path / "changed")))
    story.write_text(story.read_text() + "One more line.\n")
    code, _, err = run(capsys, "evaluate", tmp_path / "changed", "--task", "val")
    assert code == 2
    assert "no longer the one" in err


def test_val_is_scored_for_a_run_that_validated_nothing(
    capsys: pytest.CaptureFixture[str], tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "anew"):
        assert train(tiny.override(val_tokens=0)).val_loss is None
    assert "training tokens; val_tokens 0: nothing is validated" in caplog.text
    finished = run(capsys, "evaluate", tiny.folder, "--task", "val", "--json")
    assert json.loads(finished.stdout.splitlines()[-1])["tasks"]["val"]["examples"] > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluate_under_torchrun_reports_the_same_figures(
    capsys: pytest.CaptureFixture[str], model: Path, passages: Path, ranks: int, tmp_path: Path
) -> None:
    arguments = ["evaluate", str(model), "--task", "lambada", "--file", str(passages), "--json"]
    alone = json.loads(run(capsys, *arguments).stdout.splitlines()[-1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={ranks}", "-m", "anew"]
    env = {**os.environ, "ANEW_CACHE": str(tmp_path / "other")}
    done = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["tasks"] == alone["tasks"]
    stores = list((tmp_path / "other" / "evaluations").glob("lambada-*/*.jsonl"))
    assert {path.name.split("-")[0] for path in stores} <= {str(rank) for rank in range(ranks)}
