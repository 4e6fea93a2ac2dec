"""A process that is killed while it saves loses no checkpoint that it reported as saved."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anew.checkpoint.folder import list_checkpoints, newest_valid, remove_leftovers, step_of, verify

WRITER = """
import os, sys
from pathlib import Path
from anew.checkpoint.folder import prune, write_checkpoint
run = Path(sys.argv[1])
step = 0
print("ready", flush=True)
while True:
    step += 1
    with write_checkpoint(run, step) as folder:
        for name in "abc":
            (folder / name).write_bytes(os.urandom(200_000))
    print(step, flush=True)
    prune(run, 2)
"""


@pytest.mark.guarantee("durable")
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_sigkill_at_any_moment_of_saving_loses_no_reported_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    for trial in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            n_saves = chance.randint(1, 40)
            reported = [int(process.stdout.readline()) for _ in range(n_saves)]
            process.send_signal(signal.SIGKILL)  # The writer is somewhere in a later save.
            rest = process.stdout.read().split()
        last = int(rest[-1]) if rest else reported[-1]
        found, skipped = newest_valid(tmp_path)
        assert found is not None
        assert step_of(found) >= last, f"trial {trial}"
        assert skipped == []
        remove_leftovers(tmp_path)
        assert not list((tmp_path / "checkpoints").glob(".*"))
        for folder in list_checkpoints(tmp_path):
            verify(folder)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
