"""What anew does to CUDA and NCCL, seen in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support.ranks import run_ranks


def test_import_of_anew_does_not_initialise_cuda() -> None:
    """A process that has initialised CUDA cannot be forked, and has memory on GPU 0."""
    script = """
import importlib
import os
import torch
def refuse(*arguments):
    raise AssertionError("CUDA was initialised at import")
torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = refuse
torch._C._cuda_getDeviceCount = lambda: 1
import anew, anew.training.trainer, anew.bench.timing, anew.plan, anew.cli.main
for command in anew.cli.main.COMMANDS:
    importlib.import_module(f"anew.cli.{command}")
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    environment = dict(os.environ)
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def nccl_algorithm_at_start(run: Path) -> str:
    """Train, and return NCCL_ALGO as it was when the process group was created."""
    from torch import distributed

    real = distributed.init_process_group
    seen: list[str] = []

    def watched(*arguments: Any, **named: Any) -> None:
        seen.append(os.environ.get("NCCL_ALGO", ""))
        real(*arguments, **named)

    distributed.init_process_group = watched
    train(tiny(run, steps=3, deterministic=True))
    return seen[0]


def test_deterministic_run_excludes_nvls_before_nccl_starts(tmp_path: Path) -> None:
    assert run_ranks(2, nccl_algorithm_at_start, tmp_path / "run") == [("ok", "^NVLS")] * 2
