"""A tiny ladder through the command line, killed and continued."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.support.commands import start

SIZES = "1x32,2x32,3x32"


def command(text: Path, out: Path, *more: object) -> list[object]:
    flags = {
        "--data": text,
        "--out": out,
        "--sizes": SIZES,
        "--tokens-per-parameter": 0.15,
        "--seeds": 1,
        "--over": "optimizer=adamw,muon",
        "--lr": 0.003,
        "--batch-tokens": 128,
        "--seq-len": 16,
        "--val-tokens": 500,
        "--precision": "fp32",
    }
    words = [word for pair in flags.items() for word in pair]
    return ["bench", "scaling", *words, "--json", *more]


def facts_of(process: Any) -> tuple[dict[str, Any], str]:
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts, out


def wait_for(path: Path, process: Any) -> None:
    for _ in range(2000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_killed_ladder_continues_to_the_same_result(text_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "killed"
    undisturbed = start(*command(text_file, tmp_path / "whole"), env=environment)
    process = start(*command(text_file, folder), env=environment)
    wait_for(folder / "optimizer=muon-2x32-seed-1" / "metrics.jsonl", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    whole, out = facts_of(undisturbed)
    table = out.split("\noptimizer=adamw\n")[1].rpartition("\n{")[0]
    assert all(len(line) <= 80 for line in table.splitlines()), table
    assert [len(arm["sizes"]) for arm in whole["arms"]] == [3, 3]
    assert len(whole["multipliers"]) == 1

    finished = folder / "optimizer=adamw-3x32-seed-1" / "metrics.jsonl"
    before = finished.read_bytes()
    assert not (folder / "optimizer=muon-1x32-seed-1").exists()
    picture = tmp_path / "picture.png"
    again = start(*command(text_file, folder, "--picture", picture), env=environment)
    facts, _ = facts_of(again)
    assert facts == whole
    assert finished.read_bytes() == before, "a finished run is not run again"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "scaling.json").read_text())["arms"] == whole["arms"]
