"""The commands: what they print, their exit codes, and how they refuse invalid input."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from anew import Config
from anew.checkpoint.folder import checkpoint_folder, newest_valid
from anew.training.trainer import train
from tests.support.commands import run, start

TINY = [
    "--n-layer", "1",
    "--n-head", "1",
    "--n-embd", "16",
    "--n-positions", "16",
    "--seq-len", "16",
    "--batch-tokens", "64",
    "--steps", "4",
    "--precision", "fp32",
    "--sample-tokens", "8",
]  # fmt: skip


@pytest.fixture
def model(tiny: Config) -> Path:
    train(tiny)
    return tiny.folder


def test_train_then_sample_then_resume(
    capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = run(
        capsys, "train", *TINY, "shakespeare", "--data", text_file, "--out", out, "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["step"] == 4
    assert result["folder"] == str(out)
    assert result["val_loss"] > 0
    assert "warm-up of 20 steps left out, because the run has only 4 steps" in stderr
    assert "vocabulary 257 padded to 384" in stderr
    code, stdout, _ = run(
        capsys, "sample", out, "--prompt", "The ", "--tokens", "9", "--count", "3", "--json"
    )
    assert code == 0
    assert len(json.loads(stdout.splitlines()[-1])["samples"]) == 3
    again = run(capsys, "sample", out, "--prompt", "The ", "--tokens", "9", "--count", "3").stdout
    lines = stdout.splitlines(keepends=True)
    assert again == "".join(lines[: again.count("\n")])
    code, stdout, _ = run(capsys, "train", "--resume", out)
    assert code == 0
    assert f"run folder: {out}" in stdout


def test_recipe_may_stand_before_or_after_the_flags(
    capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path
) -> None:
    orders = (["overfit", *TINY], [*TINY, "overfit"], [*TINY[:4], "overfit", *TINY[4:]])
    for i, argv in enumerate(orders):
        out = tmp_path / str(i)
        finished = run(capsys, "train", *argv, "--data", text_file, f"--out={out}")
        assert finished.code == 0, finished.stderr
        assert "loss of the one batch" in finished.stdout


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 2
    path.write_bytes(content)


INVALID = [
    (["train", "nonsense"], "no recipe 'nonsense'"),
    (["train", "shakespeare", "twice"], "one word too many"),
    (["train", "shakespeare", "--data", "{tmp}/missing.txt"], "there is no data"),
    (["train", "shakespeare", "--data", "{tmp}/empty.txt"], "is empty"),
    (["train", "shakespeare", "--data", "{tmp}/short.txt"], r"needs seq_len \+ 1 = 129 tokens"),
    (["train", "shakespeare", "--lr", "nan"], "lr is nan"),
    (["train", "shakespeare", "--micro-batch", "3"], "choose a --micro-batch that divides 32"),
    (["train", "shakespeare", "--device", "cuda"], "has no cuda"),
    (["train", "shakespeare", "--precision", "tf32"], "tf32 needs an NVIDIA GPU"),
    (["train", "gpt2-124m"], "hub cannot be reached for HuggingFaceFW/fineweb-edu"),
    (["train", "finetune"], "add --init MODEL"),
    (["train", "finetune", "--init", "{tmp}"], "is not a model"),
    (
        ["train", "demo", "--out", "{tmp}/empty.txt"],
        "empty.txt is a file",
    ),
    (["train", "--resume", "{model}", "--memorise"], "leave one out"),
    (["train", "--resume="], "needs the run folder"),
    (["train", "finetune", "--init", "{model}", "--n-layer", "3"], "--n-layer contradicts --init"),
    (["train", "--memorise", "demo"], "variant of the shakespeare recipe"),
    (["train", "--resume", "{tmp}/nowhere"], "there is no run at .*/nowhere"),
    (["train", "demo", "--resume", "{tmp}"], "leave out the recipe demo"),
    (["train", "overfit", "--data", "{shard}"], "is damaged: its size or sha256"),
    (["sample", "{tmp}"], "is not a model"),
    (["sample", "{model}", "--temperature", "-1"], "temperature -1.0 must be 0"),
    (["sample", "{model}", "--top-p", "0"], "top_p 0.0 must lie above 0"),
    (["sample", "{model}", "--count", "0"], "count 0 must be at least 1"),
    (["sample", "{model}", "--prompt-file", "{tmp}/none.txt"], "prompt file .* cannot be read"),
    (["sample", "{broken}"], "damaged: model.safetensors"),
    (["prepare", "{tmp}/missing", "--out", "{tmp}/d"], "there is no data"),
    (["prepare", "{tmp}/short.txt", "--out", "{tmp}/full"], "exists already"),
    (["fly"], "no command 'fly'"),
]


@pytest.mark.parametrize(("argv", "words"), INVALID, ids=[" ".join(a) for a, _ in INVALID])
def test_invalid_input_ends_with_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    words: str,
) -> None:
    if "cuda" in argv:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder(model, 12), broken)
    flip_bit(broken / "model.safetensors", -5)
    shard = tmp_path / "shard"
    assert run(capsys, "prepare", text_file, "--out", shard, "--tokenizer", "bytes").code == 0
    flip_bit(shard / "train-00000.bin", 5000)
    if argv[:2] == ["train", "shakespeare"] and "--data" not in argv:
        argv = [*argv, "--data", "{tmp}/short.txt"]
    places = {"tmp": tmp_path, "model": model, "broken": broken, "shard": shard}
    code, stdout, stderr = run(capsys, *(word.format(**places) for word in argv))
    assert code == 2
    assert re.search(words, stderr), stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("anew: ")
    assert last.endswith((".", "none."))
    assert "Traceback" not in stderr + stdout
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "argv",
    [["train", "--steps", "many"], ["train", "--no-such-flag", "3"], ["sample"], ["prepare", "x"]],
)
def test_malformed_flags_end_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    code, stdout, stderr = run(capsys, *argv)
    assert code == 2
    assert "Traceback" not in stdout + stderr


@pytest.mark.parametrize("command", ["train", "sample", "prepare"])
def test_help_shows_defaults_and_an_example(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code, stdout, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: anew {command}" in " ".join(stdout.split())
    assert "default" in stdout
    assert run(capsys, "--help").code == 0


def test_sample_reads_a_prompt_file_and_crops_a_long_prompt(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("long " * 50)
    code, stdout, stderr = run(
        capsys, "sample", model, "--prompt-file", tmp_path / "prompt.txt", "--tokens", "5"
    )
    assert code == 0
    assert stdout.startswith("long long")
    assert "only its last 16 tokens are read" in stderr


def test_interactive_sample_continues_each_line(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["The cat", "A dog", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, stdout, stderr = run(capsys, "sample", model, "--interactive", "--tokens", "4")
    assert code == 0
    assert "Type a prompt and press Enter" in stderr
    assert stdout.startswith("The cat")
    assert "\nA dog" in stdout


def test_prepare_writes_a_folder_that_train_reads(
    capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = run(
        capsys, "prepare", text_file, "--out", tmp_path / "data", "--tokenizer", "bytes", "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["train"] > 10_000
    code, _, stderr = run(
        capsys, "train", "overfit", *TINY, "--data", tmp_path / "data", "--out", tmp_path / "run"
    )
    assert code == 0, stderr


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> None:
    """Read the standard error of a process up to a line that begins with `pattern`."""
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(pattern, line):
            return
    pytest.fail(f"the process ended without a line {pattern}")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_75_and_the_same_command_resumes(
    text_file: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    settings = [*TINY, "--steps", "3000", "--warmup-steps", "5", "--log-every", "1"]
    argv = ["train", "shakespeare", *settings, "--data", text_file, "--out", out]
    process = start(*argv)
    wait_for_line(process, r"\s+7/3,000")
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "the same command goes on from there" in stderr
    checkpoint, skipped = newest_valid(out)
    assert checkpoint is not None
    assert skipped == []
    step = int(checkpoint.name.removeprefix("step-"))
    assert 7 <= step < 3000
    resumed = start(*argv)
    wait_for_line(resumed, rf"\s+{step + 1:,}/3,000")
    resumed.kill()
    resumed.communicate()


def test_libraries_print_nothing_after_the_end_of_a_run(text_file: Path, tmp_path: Path) -> None:
    """Some libraries warn about objects that still exist when Python ends."""
    out = tmp_path / "run"
    process = start("train", "shakespeare", *TINY, "--data", text_file, "--out", out)
    _, stderr = process.communicate()
    assert stderr.splitlines()[-1].startswith("step 4: val loss "), stderr


def test_closed_standard_output_is_not_an_error(model: Path) -> None:
    with start("sample", model, "--tokens", "3000") as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
