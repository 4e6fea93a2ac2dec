"""Attention kernels against the formula, and the model's attention against causality."""

import dataclasses

import pytest
import torch

from anew.model.attention import plain_attention
from anew.model.gpt import GPT
from anew.model.kernels.cpu_attention import TILE, TiledBackward
from tests.support.models import SMALL, gradient_of, ids_for


def test_no_token_depends_on_later_tokens() -> None:
    model = GPT(SMALL)
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
        out.retain_grad()
        embedded.append(out)

    model.transformer.wte.register_forward_hook(keep)
    logits = model(ids_for(SMALL, 1, 12))
    logits[0, 5].sum().backward()
    assert embedded[0].grad is not None
    by_position = embedded[0].grad[0].abs().sum(dim=-1)
    assert (by_position[6:] == 0).all()
    assert (by_position[:6] > 0).all()


def test_plain_attention_trains_like_fused_attention() -> None:
    fused = GPT(SMALL, seed=3)
    plain = GPT(dataclasses.replace(SMALL, attention="plain"), seed=3)
    ids = ids_for(SMALL, 2, 24)
    targets = ids_for(SMALL, 2, 24, seed=1)
    fused_loss = fused(ids, targets)
    plain_loss = plain(ids, targets)
    assert fused_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    fused_loss.backward()
    plain_loss.backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiled_backward_is_the_gradient_of_the_formula(dtype: torch.dtype) -> None:
    shape = (2, 3, 3 * TILE, 8)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    inputs = [x.to(dtype).requires_grad_() for x in drawn[:3]]
    exact_inputs = [x.to(dtype).double().requires_grad_() for x in drawn[:3]]
    d_out = drawn[3].to(dtype)
    out = TiledBackward.apply(*inputs)
    exact_out = plain_attention(*exact_inputs, causal=True)
    out.backward(d_out)
    exact_out.backward(d_out.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-2
    found = [out, *(gradient_of(x) for x in inputs)]
    exact = [exact_out, *(gradient_of(x) for x in exact_inputs)]
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance
