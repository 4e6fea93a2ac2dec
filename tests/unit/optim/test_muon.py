"""Muon against torch's own, and Newton-Schulz against the singular values."""

import torch

from anew.optim.muon import Muon, orthogonalise


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_muon_equals_torchs_muon_on_square_and_wide_matrices() -> None:
    shapes = [(16, 16), (16, 64), (64, 16)]
    ours = [torch.nn.Parameter(normal(shape, i)) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(normal(shape, i)) for i, shape in enumerate(shapes)]
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    torch_muon = torch.optim.Muon(
        theirs,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = normal(tuple(p.shape), 100 * step + i)
            q.grad = p.grad.clone()
        muon.step()
        torch_muon.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() / q.norm() < 2e-3  # both round to bf16 inside


def test_query_key_and_value_are_three_matrices() -> None:
    def weights_after_step(gradient: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros_like(gradient))
        p.grad = gradient.clone()
        Muon([p], lr=0.02).step()
        return p.detach()

    gradients = [normal((16, 16), seed) for seed in range(3)]
    together = weights_after_step(torch.cat(gradients, dim=1))
    apart = torch.cat([weights_after_step(gradient) for gradient in gradients], dim=1)
    torch.testing.assert_close(together, apart, rtol=2e-2, atol=1e-4)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 32, 96)
    values = torch.linalg.svdvals(orthogonalise(matrices, dtype=torch.float32))
    assert ((values > 0.6) & (values < 1.3)).all()
