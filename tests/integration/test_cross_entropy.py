"""The GPU kernel of the loss inside a compiled model, and the code that Triton makes of it."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests.support.models import check_training_with_loss_kernel

pytest.importorskip("triton", reason="Triton is not made for this platform")
importlib.import_module("anew.model.kernels.cross_entropy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Inductor's code for a CPU would take a minute and would show nothing of the kernel.
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"

PRINT_MEMORY_INSTRUCTIONS = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anew.model.kernels.cross_entropy import BLOCK, WARPS, _kernel

types = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "stride": "i32"}
fixed = {"VOCABULARY": 50257, "COLUMNS": 50304, "TRAINING": True, "BLOCK": BLOCK}
signature = types | dict.fromkeys(fixed, "constexpr")
attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
for generation in (80, 90, 100):
    source = ASTSource(_kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", generation, 32)
    ptx = triton.compile(source, target, {"num_warps": WARPS}).asm["ptx"]
    narrow = re.findall(r"(?:ld|st)\\.global\\.b16", ptx)
    wide = re.findall(r"st\\.global\\.v4\\.b32", ptx)
    copies = re.findall(r"cp\\.async\\.cg\\.shared\\.global [^;]*0x10|ld\\.global\\.v4\\.b32", ptx)
    print(generation, *narrow, "wide stores" * bool(wide), "wide loads" * bool(copies))
"""


def test_compiled_training_with_the_kernel_gives_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_training_with_loss_kernel(DEVICE, backend=BACKEND, monkeypatch=monkeypatch)


def test_kernel_reads_and_writes_16_bytes_at_a_time() -> None:
    """Compile for three generations of GPUs, which needs none of them.

    With 2 bytes at a time, the kernel would reach a fifth of the speed of the memory.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_MEMORY_INSTRUCTIONS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        # Only the logit of the target is read by itself.
        assert line.endswith(" ld.global.b16 wide stores wide loads"), line
        assert line.count("b16") == 1, line
