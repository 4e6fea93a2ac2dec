"""What compiler.py finds missing on simulated machines."""

import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch

from anew.utils import compiler


@pytest.mark.parametrize(("exit_code", "expected"), [(0, ""), (2, "xcode-select --install")])
def test_apple_compiler_without_command_line_tools_counts_as_missing(
    exit_code: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sysconfig.get_paths()
    answer: subprocess.CompletedProcess[bytes] = subprocess.CompletedProcess([], exit_code)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    found = compiler.missing_for_compile(torch.device("cpu"))
    if expected:
        assert expected in found
    else:
        assert found == ""
