"""The GPU kernel of the loss against the formula in fp64.

Without a GPU, Triton's interpreter runs the kernel on the CPU; with one, the same tests run it
there.
"""

import importlib
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.models import check_training_with_loss_kernel

pytest.importorskip("triton", reason="Triton is not made for this platform")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel: Any = importlib.import_module("anew.model.kernels.cross_entropy")
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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
def test_losses_and_gradients_equal_those_in_float64(
    vocab_size: int, columns: int, dtype: torch.dtype
) -> None:
    n_rows = 5
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(n_rows, columns, generator=generator) * 4).to(DEVICE, dtype)
    logits[:, vocab_size:] = 1000.0  # the padding columns must not matter
    if vocab_size > 1:
        logits[1] -= 300.0  # a row of large values
        logits[2, 7] += 200.0  # a row where one token has all of the probability
    targets = torch.randint(vocab_size, (n_rows,), generator=generator).to(DEVICE)
    targets[3] = -100
    exact = logits[:, :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    expected.sum().backward()
    work = logits.clone()
    losses = kernel.cross_entropy_(work, targets, vocab_size, False)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    assert torch.equal(work, logits), "without training the kernel writes no gradient"
    assert torch.equal(kernel.cross_entropy_(work, targets, vocab_size, True), losses)
    gradient = work[:, :vocab_size].double()
    torch.testing.assert_close(gradient, exact.grad, rtol=ROUNDING[dtype], atol=1e-6)
    assert not work[:, vocab_size:].any()


def test_training_with_the_kernel_gives_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_training_with_loss_kernel(DEVICE, backend=None, monkeypatch=monkeypatch)
