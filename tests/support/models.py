"""Small models and checks that unit tests use uncompiled and integration tests compiled."""

import dataclasses
from typing import Any

import pytest
import torch

from anew.config.schema import GPTConfig
from anew.model.gpt import GPT

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)


def ids_for(config: GPTConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the gradient that a backward pass has left in a tensor."""
    assert tensor.grad is not None
    return tensor.grad


def loss_and_gradients(loss_of: Any, model: GPT) -> tuple[float, torch.Tensor]:
    """Return the loss of `loss_of(ids, targets)` and all gradients of `model` in fp64, joined."""
    ids = ids_for(SMALL, 2, 24)
    loss = loss_of(ids, ids.roll(-1, 1))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat([gradient.double().flatten() for gradient in gradients])


def check_gpu_forms(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the layers for GPUs with fp64: biases inside the products, fused bias gradients."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    exact_model = GPT(SMALL, torch.float64, seed=3).double()
    model = GPT(SMALL, dtype, seed=3)
    for parameter in (*exact_model.parameters(), *model.parameters()):
        if parameter.ndim == 1:  # in a new model, biases are 0 and layer-norm weights 1
            parameter.data += 0.1 * torch.linspace(-1, 1, len(parameter), dtype=parameter.dtype)
    exact_loss, exact = loss_and_gradients(exact_model, exact_model)
    monkeypatch.setattr("anew.model.gpt.is_on_gpu", lambda _: True)
    loss_of: Any = model
    if compiled:
        loss_of = torch.compile(model, dynamic=False, backend="aot_eager")
    loss, found = loss_and_gradients(loss_of, model)
    torch._dynamo.reset()
    assert loss == pytest.approx(exact_loss, rel=tolerance / 10)
    assert ((found - exact).norm() / exact.norm()).item() < tolerance


def check_recompute(dropout: float, compiled: bool, rtol: float, atol: float) -> None:
    """Compare the gradients of recomputed blocks with those of blocks that keep activations."""
    ids = ids_for(SMALL, 2, 16)
    gradients = []
    for recompute in (False, True):
        config = dataclasses.replace(SMALL, dropout=dropout, recompute=recompute)
        model = GPT(config, seed=8)
        run: Any = torch.compile(model, dynamic=False) if compiled else model
        torch.manual_seed(5)
        run(ids, ids.roll(-1, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=rtol, atol=atol)


def check_training_with_loss_kernel(
    device: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare loss and gradients with and without the loss kernel, in chunks that leave a rest.

    The model is compiled for `backend`, or not compiled if that is None.
    """
    config = GPTConfig(n_layer=1, n_head=1, n_embd=32, n_positions=64, vocab_size=300)
    ids = ids_for(config, 2, 50, seed=1).to(device)
    targets = ids.roll(-1, 1)
    targets[0, :7] = -100
    results = []
    for use_kernel in (False, True):
        has_kernel = torch.compiler.assume_constant_result(lambda device, found=use_kernel: found)
        monkeypatch.setattr("anew.model.loss.has_kernel", has_kernel)
        monkeypatch.setattr("anew.model.loss.CHUNK_KERNEL", 64)
        model = GPT(config, seed=2).to(device)
        run: Any = model
        if backend is not None:
            run = torch.compile(model, dynamic=False, backend=backend)
        loss = run(ids, targets)
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch._dynamo.reset()
    for without, with_kernel in zip(*results, strict=True):
        # cuBLAS sums products of 64 and of 100 rows in different orders.
        torch.testing.assert_close(without, with_kernel, rtol=1e-4, atol=1e-6)
