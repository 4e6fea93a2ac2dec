"""Run the command line from tests, in this process or in one of its own."""

import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from anew.cli.main import main


class Finished(NamedTuple):
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> Finished:
    """Run a command in this process."""
    try:
        main([str(word) for word in argv])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return Finished(code, *capsys.readouterr())


def start(*argv: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "anew", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
