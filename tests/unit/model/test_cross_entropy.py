"""The GPU's kernel for the loss, by Triton's interpreter on a CPU, against the formula in fp64.

On a GPU the same tests run it for real.
"""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anew import GPT, GPTConfig

pytest.importorskip("triton", reason="Triton is not made for this platform")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = (
    "inductor" if DEVICE == "cuda" else "aot_eager"
)  # code for a CPU would take a minute and prove nothing of the kernel
kernel: Any = importlib.import_module("anew.model.kernels.cross_entropy")


@pytest.mark.parametrize(
    ("vocab_size", "columns", "dtype"),
    [
        (50257, 50304, torch.bfloat16),
        (50257, 50304, torch.float32),
        (257, 384, torch.float32),
        (8192, 8192, torch.float16),
        (8193, 8193, torch.float32),
        (1, 128, torch.float32),
    ],
)
def test_losses_and_gradients_are_those_of_float64(
    vocab_size: int, columns: int, dtype: torch.dtype
) -> None:
    rows = 5
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, columns, generator=generator) * 4).to(DEVICE, dtype)
    logits[:, vocab_size:] = 1000.0  # what stands in the padding must not matter
    if vocab_size > 1:
        logits[1] -= 300.0  # a row of large values, and one where a single token has all
        logits[2, 7] += 200.0
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(DEVICE)
    targets[3] = -100
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    expected.sum().backward()
    work = logits.clone()
    losses = kernel.cross_entropy_(work, targets, vocab_size, False)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    assert torch.equal(work, logits), "without training nothing is written"
    assert torch.equal(kernel.cross_entropy_(work, targets, vocab_size, True), losses)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(work[:, :vocab_size].double(), exact.grad, rtol=rounding, atol=1e-6)
    assert not work[:, vocab_size:].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_trains_the_same_with_it(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that do not divide the rows, compiled and not."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=32, n_positions=64, vocab_size=300)
    ids = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = ids.roll(-1, 1)
    targets[0, :7] = -100
    results = []
    for by_kernel in (False, True):
        monkeypatch.setattr(
            "anew.model.loss.has_kernel",
            torch.compiler.assume_constant_result(lambda device, found=by_kernel: found),
        )
        monkeypatch.setattr("anew.model.loss.CHUNK_KERNEL", 64)
        model = GPT(config, seed=2).to(DEVICE)
        loss = (torch.compile(model, dynamic=False, backend=BACKEND) if compiled else model)(
            ids, targets
        )
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch._dynamo.reset()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-6
        )  # cuBLAS sums products of 64 and of 100 rows in different orders


def test_for_a_gpu_it_reads_and_writes_16_bytes_at_a_time() -> None:
    """Compiled for three generations, on any machine;

    2 bytes at a time would be a fifth of the memory's speed.
    """
    script = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anew.model.kernels.cross_entropy import BLOCK, WARPS, _kernel
types = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "stride": "i32"}
fixed = {"VOCABULARY": 50257, "COLUMNS": 50304, "TRAINING": True, "BLOCK": BLOCK}
for generation in (80, 90, 100):
    signature = types | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(_kernel, signature, fixed, aligned)
    ptx = triton.compile(source, GPUTarget("cuda", generation, 32), {"num_warps": WARPS}).asm["ptx"]
    narrow = re.findall(r"(?:ld|st)\\.global\\.b16", ptx)
    wide = re.findall(r"st\\.global\\.v4\\.b32", ptx)
    copies = re.findall(r"cp\\.async\\.cg\\.shared\\.global [^;]*0x10|ld\\.global\\.v4\\.b32", ptx)
    print(generation, *narrow, "wide stores" * bool(wide), "wide loads" * bool(copies))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        assert line.endswith(" ld.global.b16 wide stores wide loads"), (
            f"the target's logit alone is read by itself: {line}"
        )
        assert line.count("b16") == 1, line
    assert len(done.stdout.splitlines()) == 3
