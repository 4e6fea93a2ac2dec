"""Find out whether torch.compile, Triton or a C++ compiler can be used on this machine.

    reason = missing_for_compile(torch.device("cpu"))       # "" or "there is no C++ compiler"

Each function returns what is missing, or an empty string.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch


def missing_for_compile(device: torch.device) -> str:
    """Return why torch.compile cannot work on this device."""
    if device.type == "mps":
        return "torch.compile is not reliable on MPS"
    if device.type == "cuda":
        return missing_for_triton(device)
    if device.type == "xpu" and not find_spec("triton"):
        return "Triton is not installed"
    if sys.platform == "win32":
        return _missing_compiler("cl")
    return _missing_compiler("g++", "clang++")


def missing_for_triton(device: torch.device | None = None) -> str:
    """Return why Triton cannot compile for this NVIDIA GPU.

    Triton also needs a C compiler, because it builds a small extension at its first launch.
    """
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0"
    if not find_spec("triton"):
        return "Triton is not installed"
    return _missing_compiler(os.environ.get("CC", ""), "gcc", "clang", "g++", "clang++")


def _missing_compiler(*names: str) -> str:
    """Return why none of these compilers, nor $CXX, can build a Python extension."""
    candidates = [os.environ.get("CXX", ""), *names]
    if not any(name and shutil.which(name) for name in candidates):
        return "there is no C++ compiler"
    if sys.platform == "darwin":
        # Without the command-line tools, g++ and clang++ are programs that offer to install them.
        found = subprocess.run(["xcrun", "-f", "clang++"], capture_output=True, check=False)
        if found.returncode != 0:
            return "Apple's command-line tools are not installed (xcode-select --install)"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return "Python's C headers are not installed (Debian: python3-dev)"
    return ""
