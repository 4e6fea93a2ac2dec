"""The command line starts without the packages that only one command needs."""

import subprocess
import sys


def test_command_line_starts_without_packages_of_single_commands() -> None:
    script = """
import sys

packages = "boto3 fastapi gguf llama_cpp lm_eval matplotlib onnx starlette tensorboard"
for name in [*packages.split(), "transformers", "triton", "uvicorn"]:
    sys.modules[name] = None  # importing it raises ImportError

import anew.cli.main

anew.cli.main.main(["--help"])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
