"""A checkpoint is whole or not there, whatever kills the writer and whatever flips a bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anew import UserError
from anew.checkpoint import folder as checkpoint

WRITER = """
import os, sys
from pathlib import Path
from anew import checkpoint
run, step = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    step += 1
    with checkpoint.writing(run, step) as folder:
        for name in "abc":
            (folder / name).write_bytes(os.urandom(200_000))
    print(step, flush=True)
    checkpoint.prune(run, 2)
"""


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    with checkpoint.writing(run, step) as folder:
        (folder / "model").write_bytes(content)
    return checkpoint.folder_of(run, step)


def test_write_verify_and_find_the_newest(tmp_path: Path) -> None:
    for step in (1, 20, 3):
        write(tmp_path, step)
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000020"
    assert skipped == []
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest", "manifest gone"])
def test_damage_is_found_named_and_stepped_over(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2, b"x" * 1000)
    model = folder / "model"
    if harm == "flip":
        raw = bytearray(model.read_bytes())
        raw[500] ^= 1
        model.write_bytes(raw)
    elif harm == "truncate":
        model.write_bytes(model.read_bytes()[:-1])
    elif harm == "delete":
        model.unlink()
    elif harm == "manifest":
        (folder / "manifest.json").write_text('{"files": 3}')
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"damaged: .*(model|manifest)"):
        checkpoint.verify(folder)
    newest, skipped = checkpoint.newest(tmp_path)
    assert newest == checkpoint.folder_of(tmp_path, 1)
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_only_verified_checkpoints_count_for_retention(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    (checkpoint.folder_of(tmp_path, 5) / "model").write_bytes(b"broken!")
    checkpoint.prune(tmp_path, 2)
    assert [p.name[-1] for p in checkpoint.steps(tmp_path)] == ["3", "4", "5"]
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.steps(tmp_path)) == 3


def test_an_error_while_writing_leaves_the_old_and_no_leftover(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), checkpoint.writing(tmp_path, 2) as folder:
        (folder / "model").write_bytes(b"half")
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_step_written_again_replaces_the_broken_one(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "model").write_bytes(b"broken!")
    write(tmp_path, 1, b"whole")
    checkpoint.verify(folder)
    assert (folder / "model").read_bytes() == b"whole"


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_sigkill_at_any_moment_of_saving_loses_nothing_acknowledged(tmp_path: Path) -> None:
    chance = random.Random(0)
    for trial in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wanted = chance.randint(1, 40)
        acknowledged = [int(process.stdout.readline()) for _ in range(wanted)]
        process.send_signal(signal.SIGKILL)  # the writer is somewhere in a later save
        rest = process.stdout.read().split()
        process.wait()
        last = int(rest[-1]) if rest else acknowledged[-1]
        newest, skipped = checkpoint.newest(tmp_path)
        assert newest is not None
        assert int(newest.name[5:]) >= last, f"trial {trial}"
        assert skipped == []
        checkpoint.clean(tmp_path)
        assert not list((tmp_path / "checkpoints").glob(".*"))
        for folder in checkpoint.steps(tmp_path):
            checkpoint.verify(folder)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
