"""What the command line prints about itself and about errors outside of its commands."""

import errno
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import anew
from anew.cli.main import COMMANDS, console, main
from tests.support import ROOT

STORED_RUN = ROOT / "tests" / "fixtures" / "stored_runs" / "muon"


def run_in_thread(error: BaseException) -> None:
    def work() -> None:
        raise error

    with console():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()


def test_full_disk_in_a_thread_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run_in_thread(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == ""
    run_in_thread(RuntimeError("another error"))
    assert "RuntimeError: another error" in capsys.readouterr().err


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"anew {anew.__version__}\n"
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", shown, re.MULTILINE) for command in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "shakespear"], "no recipe 'shakespear'; did you mean shakespeare or"),
        (["train", "gpt2"], "no recipe 'gpt2'; did you mean gpt2-1m, gpt2-5m, gpt2-124m or"),
        (["train", __file__], "to train on it: anew train shakespeare --data /"),
        (["train", "demo", "--learning-rate=1"], "use --lr: peak learning rate of AdamW."),
        (["train", "demo", "--max_iters", "20"], "there is no --max-iters; use --steps"),
        (["train", str(STORED_RUN)], "to continue a run: anew train --resume RUN"),
        (["export", "m", "--to", "hub"], "--repo OWNER/NAME"),
        (["sample", __file__], "is not a model: torch.save did not write it"),
        (["plan", "--gpu", "rtx 409"], "no GPU 'rtx 409'; did you mean RTX 4090?"),
        (["plan", "--gpu", "h1000", "--price", "2"], "no GPU 'h1000'"),
        (["plan", "--gpu", "h100", "--price", "-2"], "--price -2 cannot be negative"),
    ],
)
def test_wrong_name_is_answered_with_the_one_that_was_meant(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_error_is_left_for_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(SystemExit):
        main(["trian"])
    assert json.loads(path.read_text())["message"].startswith("there is no command 'trian'")


def test_interrupt_while_modules_are_imported_prints_no_traceback() -> None:
    code = "import sys, builtins\n"
    code += "from anew.__main__ import main\n"
    code += "real = builtins.__import__\n"
    code += "def interrupted(name, *rest):\n"
    code += "    if name == 'loguru': raise KeyboardInterrupt\n"
    code += "    return real(name, *rest)\n"
    code += "builtins.__import__ = interrupted\n"
    code += "main()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
