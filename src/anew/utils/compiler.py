"""What code can be compiled here: for torch.compile, and for kernels of one's own. Each function gives the reason why not, or nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch


def missing_for_compile(device: torch.device) -> str:
    """Why torch.compile cannot work on this device."""
    if device.type == "mps":
        return "torch.compile is not reliable on MPS"
    if device.type == "cuda":
        return missing_for_triton(device)
    if device.type == "xpu" and not find_spec("triton"):
        return "Triton is not installed"
    return _missing_compiler(*(("cl",) if sys.platform == "win32" else ("g++", "clang++")))


def missing_for_triton(device: torch.device | None = None) -> str:
    """Why Triton cannot compile for this NVIDIA GPU. It also builds a small C extension, at its first launch."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0"
    if not find_spec("triton"):
        return "Triton is not installed"
    return _missing_compiler(os.environ.get("CC", ""), "gcc", "clang", "g++", "clang++")


def _missing_compiler(*names: str) -> str:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *names) if name):
        return "there is no C++ compiler"
    if (
        sys.platform == "darwin"
        and subprocess.run(["xcrun", "-f", "clang++"], capture_output=True, check=False).returncode
    ):
        return "Apple's command-line tools are not installed (xcode-select --install)"  # without them g++ and clang++ only ask for them
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's C headers are not installed (Debian: python3-dev)"
    return ""
