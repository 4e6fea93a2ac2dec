"""The commands as people type them: what they print, what they return, and what they say to wrong input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anew import GPT, Config, GPTConfig, Tokenizer, UserError
from anew.checkpoint import folder as checkpoint
from anew.checkpoint import huggingface as weights
from anew.cli.main import main
from anew.training.trainer import train

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


def run(
    capsys: pytest.CaptureFixture[str], *argv: str, stdin: str | None = None
) -> tuple[int, str, str]:
    try:
        main([str(a) for a in argv])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def command(*argv: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "anew", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def model(tiny: Config) -> Path:
    train(tiny)
    return tiny.folder


def test_train_then_sample_from_the_shell(
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
    assert "warm-up shortened from 20 to 0 steps" in stderr
    assert "vocabulary 257 padded to 384" in stderr
    code, stdout, _ = run(
        capsys, "sample", out, "--prompt", "The ", "--tokens", "9", "--count", "3", "--json"
    )
    assert code == 0
    assert len(json.loads(stdout.splitlines()[-1])["samples"]) == 3
    again = run(capsys, "sample", out, "--prompt", "The ", "--tokens", "9", "--count", "3")[1]
    assert again == "".join(line for line in stdout.splitlines(keepends=True)[: again.count("\n")])
    code, stdout, _ = run(capsys, "train", "--resume", out)
    assert code == 0
    assert f"run folder: {out}" in stdout


def test_recipe_may_stand_before_or_after_the_flags(
    capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path
) -> None:
    for i, argv in enumerate(
        (["overfit", *TINY], [*TINY, "overfit"], [*TINY[:4], "overfit", *TINY[4:]])
    ):
        code, stdout, stderr = run(
            capsys, "train", *argv, "--data", text_file, f"--out={tmp_path / str(i)}"
        )
        assert code == 0, stderr
        assert "loss of the one batch" in stdout


WRONG = [
    (["train", "nonsense"], "no recipe 'nonsense'"),
    (["train", "shakespeare", "twice"], "one word too many"),
    (["train", "shakespeare", "--data", "{tmp}/missing.txt"], "there is no data at"),
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
        "empty.txt/.* cannot be used|empty.txt cannot be used",
    ),
    (["train", "--resume", "{model}", "--memorise"], "leave one out"),
    (["train", "--resume="], "needs the run folder"),
    (["train", "finetune", "--init", "{model}", "--n-layer", "3"], "--n-layer contradicts --init"),
    (["train", "--memorise", "demo"], "variant of the shakespeare recipe"),
    (["train", "--resume", "{tmp}/nowhere"], "is not the config.json of a run"),
    (["train", "demo", "--resume", "{tmp}"], "leave out the recipe demo"),
    (["train", "overfit", "--data", "{shard}"], "is damaged: its size or sha256"),
    (["sample", "{tmp}"], "is not a model"),
    (["sample", "{model}", "--temperature", "-1"], "temperature -1.0 must be 0"),
    (["sample", "{model}", "--top-p", "0"], "top_p 0.0 must lie above 0"),
    (["sample", "{model}", "--count", "0"], "count 0 must be at least 1"),
    (["sample", "{model}", "--prompt-file", "{tmp}/none.txt"], "prompt file .* cannot be read"),
    (["sample", "{broken}"], "damaged: model.safetensors"),
    (["prepare", "{tmp}/missing", "--out", "{tmp}/d"], "there is no data at"),
    (["prepare", "{tmp}/short.txt", "--out", "{tmp}/full"], "exists already"),
    (["fly"], "no verb 'fly'"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_is_one_sentence_and_exit_code_2(
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
    shutil.copytree(checkpoint.folder_of(model, 12), broken)
    raw = bytearray((broken / "model.safetensors").read_bytes())
    raw[-5] ^= 2
    (broken / "model.safetensors").write_bytes(raw)
    shard = tmp_path / "shard"
    assert run(capsys, "prepare", text_file, "--out", shard, "--tokenizer", "bytes")[0] == 0
    raw = bytearray((shard / "train-00000.bin").read_bytes())
    raw[5000] ^= 1
    (shard / "train-00000.bin").write_bytes(raw)
    if argv[:2] == ["train", "shakespeare"] and "--data" not in argv:
        argv = [*argv, "--data", "{tmp}/short.txt"]
    code, stdout, stderr = run(
        capsys, *(a.format(tmp=tmp_path, model=model, broken=broken, shard=shard) for a in argv)
    )
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
def test_malformed_flags_are_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    code, stdout, stderr = run(capsys, *argv)
    assert code == 2
    assert "Traceback" not in stdout + stderr


@pytest.mark.parametrize("verb", ["train", "sample", "prepare"])
def test_help_names_units_defaults_and_an_example(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    code, stdout, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: anew {verb}" in " ".join(stdout.split())
    assert "default" in stdout
    assert run(capsys, "--help")[0] == 0


def test_help_of_a_recipe_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    stdout = run(capsys, "train", "gpt2-1558m", "--help")[1]
    assert re.search(r"--n-layer INT.{0,200}default: 48", stdout.replace("\n", " "))


def test_a_sample_streams_stops_at_end_of_text_and_crops_a_long_prompt(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("long " * 50)
    code, stdout, stderr = run(
        capsys, "sample", model, "--prompt-file", tmp_path / "prompt.txt", "--tokens", "5"
    )
    assert code == 0
    assert stdout.startswith("long long")
    assert "only its last 16 tokens are read" in stderr


def test_interactive_answers_each_line(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["The cat", "A dog", ""])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    code, stdout, _ = run(capsys, "sample", model, "--interactive", "--tokens", "4")
    assert code == 0
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


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_75_and_the_same_command_finishes(
    text_file: Path, tmp_path: Path, number: int
) -> None:
    argv = [
        "train",
        "shakespeare",
        *TINY,
        "--steps",
        "3000",
        "--warmup-steps",
        "5",
        "--data",
        text_file,
        "--out",
        tmp_path / "run",
        "--log-every",
        "1",
    ]
    process = command(*argv)
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(r"\s+7/3,000", line):
            process.send_signal(number)
            break
    stderr = process.stderr.read()
    assert process.wait() == 75, stderr
    assert "the same command goes on from there" in stderr
    newest, skipped = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert skipped == []
    step = int(newest.name[5:])
    assert 7 <= step < 3000
    stopped = command(*argv)
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if re.match(rf"\s+{step + 1:,}/3,000", line):
            stopped.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail("the run did not go on behind its checkpoint")
    stopped.wait()


def test_last_line_of_output_is_of_anew(text_file: Path, tmp_path: Path) -> None:
    """Libraries that find their objects alive when Python ends complain about it, below what a run has to say."""
    _, stderr = command(
        "train", "shakespeare", *TINY, "--data", text_file, "--out", tmp_path / "run"
    ).communicate()
    assert stderr.splitlines()[-1].startswith("step 4: val loss "), stderr


def test_closed_pipe_is_not_an_error(model: Path) -> None:
    process = command("sample", model, "--tokens", "3000")
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.wait()


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "lambada.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "text": f"The ship leaves on day {i} and the king stays {'at home ' * (i % 7)}here"
                }
            )
            + "\n"
            for i in range(90)
        )
    )
    return path


def test_evaluate_prints_a_table_and_one_json_line(
    capsys: pytest.CaptureFixture[str], model: Path, passages: Path
) -> None:
    code, out, err = run(
        capsys,
        "evaluate",
        model,
        "--task",
        "lambada",
        "--file",
        passages,
        "--limit",
        "20",
        "--against",
        model,
        "--json",
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["tasks"]["lambada"]["examples"] == 20
    assert result["against"]["lambada"]["acc"] == result["tasks"]["lambada"]["acc"]
    assert result["limit"] == 20
    assert "No GPT-2 of this shape was published" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    again = run(
        capsys,
        "evaluate",
        model,
        "--task",
        "lambada",
        "--file",
        passages,
        "--limit",
        "20",
        "--json",
    )
    assert json.loads(again[1].splitlines()[-1])["tasks"] == result["tasks"]
    assert "20 of them kept from an earlier evaluation" in again[2]
    rows = [
        json.loads(line) for line in (model / "evaluations.jsonl").read_text().splitlines() if line
    ]
    assert [row["step"] for row in rows] == [12, 12]
    fresh = run(
        capsys,
        "evaluate",
        model,
        "--task",
        "lambada",
        "--file",
        passages,
        "--limit",
        "20",
        "--fresh",
    )
    assert "kept" not in fresh[2]


def test_tasks_that_could_not_run_are_listed(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(url: str, *_: object, hint: str, **__: object) -> None:
        raise UserError(f"{url} could not be downloaded (no network); {hint}.")

    monkeypatch.setattr("anew.data.sources.download", no_network)
    code, out, err = run(capsys, "evaluate", model, "--against", model)
    assert code == 0, err
    assert re.search(r"val +loss +(\d\.\d{4}) +\1", out)
    said = " ".join(out.split())
    assert "hellaswag not run: https://" in said


@pytest.mark.parametrize(("arguments", "words"), [
    ("--task nothing", "there is no task 'nothing'"), ("--task ptb", "task ptb no longer exists"), ("--task ,", "names no task"), ("--task val --limit -1", "must be 0 or above"),
    ("--file {passages}", "--file is the data of one task"), ("--task lambada --stride 4", "--stride is for tasks of running text"),
    ("--task harness:x --fresh", "tasks of the harness take neither"), ("--task lambada --file nowhere", "does not exist"),
    ("--task wikitext2 --file {passages} --against {other}", "figures per token cannot be compared"),
])  # fmt: skip
def test_evaluate_refuses_invalid_arguments(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    passages: Path,
    tmp_path: Path,
    arguments: str,
    words: str,
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    weights.save_model(
        other,
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_positions=16)),
        Tokenizer.named("gpt2"),
    )
    code, _, err = run(
        capsys, "evaluate", model, *arguments.format(passages=passages, other=other).split()
    )
    assert code == 2
    assert words in err


def test_val_task_uses_the_validation_text_of_the_run(
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluate_under_torchrun_reports_the_same(
    capsys: pytest.CaptureFixture[str], model: Path, passages: Path, ranks: int, tmp_path: Path
) -> None:
    arguments = ["evaluate", str(model), "--task", "lambada", "--file", str(passages), "--json"]
    alone = json.loads(run(capsys, *arguments)[1].splitlines()[-1])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "anew",
    ]
    env = {**os.environ, "ANEW_CACHE": str(tmp_path / "other")}
    done = subprocess.run(
        [*torchrun, *arguments], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["tasks"] == alone["tasks"]
    stores = list((tmp_path / "other" / "evaluations").glob("lambada-*/*.jsonl"))
    assert {path.name.split("-")[0] for path in stores} <= {str(rank) for rank in range(ranks)}
