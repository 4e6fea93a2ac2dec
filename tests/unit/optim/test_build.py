"""Parameter groups, learning rates by group, and steps that are skipped."""

import math
from typing import Any

import pytest
import torch

from anew.config.schema import GPTConfig, OptimConfig
from anew.model.gpt import GPT, Block
from anew.optim.build import build_optimizers, set_learning_rates
from anew.optim.muon import Muon
from tests.support.models import gradient_of

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=257)


def test_weight_decay_is_for_matrices_only() -> None:
    model = GPT(CONFIG)
    [adamw] = build_optimizers(model, OptimConfig())
    decayed = {
        name
        for group in adamw.param_groups
        if group["weight_decay"] > 0
        for name in group["param_names"]
    }
    assert decayed == {name for name, p in model.named_parameters() if p.ndim == 2}
    n_parameters = sum(len(group["params"]) for group in adamw.param_groups)
    assert n_parameters == len(list(model.parameters()))


def test_learning_rates_are_shares_of_the_peak_of_each_group() -> None:
    config = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02)
    adamw, muon = build_optimizers(GPT(CONFIG), config)
    set_learning_rates([adamw, muon], 0.5)
    assert adamw.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert {p.ndim for p in muon.param_groups[0]["params"]} == {2}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_with_found_inf_changes_neither_weights_nor_state(optimizer: Any) -> None:
    model = GPT(CONFIG)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer))
    ids = torch.arange(8)[None]

    def step(found_inf: bool) -> None:
        model(ids, ids).backward()
        if found_inf:
            block = model.transformer.h[0]
            assert isinstance(block, Block)
            gradient_of(block.mlp.c_fc.weight)[0, 0] = math.nan
        for o in optimizers:
            # Muon and the fused AdamW read it; torch's type of an optimizer does not have it.
            o.found_inf = torch.tensor(float(found_inf))  # type: ignore[attr-defined]
            o.step()
            o.zero_grad()

    def copy_of_all() -> list[torch.Tensor]:
        states = [state for o in optimizers for state in o.state.values()]
        tensors = [value for state in states for value in state.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *tensors)]

    step(found_inf=False)
    before = copy_of_all()
    step(found_inf=True)
    after = copy_of_all()
    assert len(before) > len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(found_inf=False)
    weights = zip(before[:3], model.parameters(), strict=False)
    assert not any(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize(
    ("compute_dtype", "setting", "expected"),
    [
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.float32),
        (torch.float16, "bf16", torch.float32),
    ],
)
def test_newton_schulz_is_bf16_only_if_the_model_computes_in_bf16(
    compute_dtype: torch.dtype, setting: Any, expected: torch.dtype
) -> None:
    """On a processor without bf16 instructions, bf16 is thirty times slower than fp32."""
    config = OptimConfig(optimizer="muon", newton_schulz=setting)
    [_, muon] = build_optimizers(GPT(CONFIG, compute_dtype), config)
    assert isinstance(muon, Muon)
    assert muon.dtype == expected
