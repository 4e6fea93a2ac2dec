"""The compiled network, and fp16 with the whole vocabulary. These take seconds each."""

from typing import Any

import pytest
import torch

from anew.config.schema import GPTConfig
from anew.model.gpt import GPT
from anew.model.kernels.cpu_attention import TILE
from anew.utils.device import pick_compile
from tests.support.models import check_gpu_forms, check_recompute, gradient_of, ids_for

needs_compiler = pytest.mark.skipif(
    not pick_compile("auto", torch.device("cpu"))[0], reason="needs a C++ compiler"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_for_gpus_equal_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are traced as for Inductor and run by torch."""
    check_gpu_forms(dtype, compiled=True, monkeypatch=monkeypatch)


@needs_compiler
def test_compiled_gradients_equal_uncompiled_ones() -> None:
    """Compiled code uses TiledBackward and computes GELU by a sigmoid."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_positions=2 * TILE, vocab_size=257)
    ids = ids_for(config, 2, 2 * TILE)
    gradients = []
    for compiled in (False, True):
        model = GPT(config, seed=8)
        run: Any = torch.compile(model, dynamic=False) if compiled else model
        run(ids, ids.roll(-1, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@needs_compiler
def test_compiled_recomputed_blocks_give_the_same_gradients() -> None:
    check_recompute(dropout=0.0, compiled=True, rtol=1e-5, atol=1e-7)


def test_fp16_gradients_are_neither_lost_nor_infinite() -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=512)
    ids = ids_for(config, 4, 512)
    scale = 65536.0
    gradients = []
    for dtype in (torch.float16, torch.float32):
        model = GPT(config, dtype, seed=3)
        (model(ids, ids.roll(-1, 1)) * scale).backward()
        gradients.append(gradient_of(model.transformer.wte.weight) / scale)
    half, full = gradients
    assert (half - full).norm() / full.norm() < 5e-3
    # Rows of tokens that are never a target get tiny gradients from tiny probabilities.
    is_tiny = full.abs() < 1e-9
    expected = ~is_tiny[:50257]
    assert half[:50257][expected].count_nonzero() > 0.99 * expected.sum()
