"""The network against published figures and against the same network in fp64."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from anew.config.schema import GPTConfig
from anew.model.gpt import GPT, gelu
from anew.model.kernels.fused_bias import gelu_by_sigmoid
from tests.support.models import SMALL, check_gpu_forms, check_recompute, gradient_of, ids_for


def test_initial_weights_have_the_std_of_gpt2() -> None:
    model = GPT(GPTConfig(n_layer=8, n_embd=256, n_head=4))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.02)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert std["transformer.wpe.weight"] == pytest.approx(0.01, rel=0.02)
    wte = model.transformer.wte.weight
    assert wte[:50257].std().item() == pytest.approx(0.02, rel=0.02)
    assert (wte[50257:] == 0).all()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_gelu_and_its_compiled_form_are_the_tanh_gelu() -> None:
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    tanh_gelu = F.gelu(x, approximate="tanh")
    assert torch.equal(gelu(x), tanh_gelu)
    by_sigmoid = x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    assert (by_sigmoid - tanh_gelu).abs().max() < 1e-14
    assert (gelu_by_sigmoid(x) - tanh_gelu).abs().max() < 2e-6  # it computes in fp32
    assert (gelu(x) - F.gelu(x)).abs().max() > 4e-4  # the exact GELU is another function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_for_gpus_equal_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpu_forms(dtype, compiled=False, monkeypatch=monkeypatch)


def test_bf16_activations_with_fp32_weights() -> None:
    model = GPT(SMALL, torch.bfloat16)
    ids = ids_for(SMALL, 2, 12)
    assert model(ids).dtype == torch.bfloat16
    loss = model(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    for p in model.parameters():
        assert p.dtype == torch.float32
        assert gradient_of(p).dtype == torch.float32
    assert loss.item() == pytest.approx(GPT(SMALL)(ids, ids).item(), rel=5e-3)


def test_dropout_is_active_in_training_only() -> None:
    model = GPT(dataclasses.replace(SMALL, dropout=0.5))
    ids = ids_for(SMALL, 2, 12)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_recomputed_blocks_give_the_same_gradients() -> None:
    """The second forward pass draws the same random numbers for dropout."""
    check_recompute(dropout=0.2, compiled=False, rtol=0, atol=0)


def test_recomputed_blocks_keep_less_than_half_of_the_activations() -> None:
    def saved_by(tensors: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensors.setdefault(id(tensor), tensor)

    sizes = []
    for recompute in (False, True):
        model = GPT(dataclasses.replace(SMALL, recompute=recompute))
        ids = ids_for(SMALL, 2, 16)
        saved: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(saved_by(saved), lambda tensor: tensor):
            model(ids, ids)
        sizes.append(sum(tensor.numel() for tensor in saved.values()))
    assert sizes[1] < 0.5 * sizes[0]
