import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anew.config.schema import GPTConfig, OptimConfig
from anew.model.gpt import GPT
from anew.optim.build import build_optimizers, set_learning_rates
from anew.optim.muon import Muon, orthogonalise
from anew.optim.schedule import learning_rate_factor, muon_momentum


def test_the_reference_schedule() -> None:
    o = OptimConfig()
    lr = [6e-4 * learning_rate_factor(step, 19_073, o) for step in range(19_073)]
    assert lr[0] == pytest.approx(6e-4 / 715)
    assert lr[714] == pytest.approx(6e-4)
    assert lr[715] == pytest.approx(6e-4)
    middle = 715 + (19_073 - 715) / 2
    assert lr[round(middle)] == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-3)
    assert lr[-1] == pytest.approx(6e-5, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(lr[714:]))


@given(
    st.integers(1, 30),
    st.integers(0, 40),
    st.sampled_from(["cosine", "linear"]),
    st.sampled_from([0.0, 1e-5]),
)
def test_no_rate_is_zero_or_undefined_however_short_the_run(
    steps: int, warmup: int, schedule: str, min_lr: float
) -> None:
    o = OptimConfig(warmup_steps=warmup, schedule=schedule, min_lr=min_lr)
    assert all(0 < learning_rate_factor(step, steps, o) <= 1 for step in range(steps))


def test_the_rate_is_constant_and_then_falls() -> None:
    o = OptimConfig(schedule="linear", warmup_steps=10, decay_share=0.4, min_lr=0.0)
    shares = [learning_rate_factor(step, 110, o) for step in range(110)]
    assert shares[9:70] == [1.0] * 61
    assert shares[70] == pytest.approx(1.0)
    assert shares[90] == pytest.approx(0.5)
    assert shares[109] == pytest.approx(1 / 40)


def test_muons_momentum_rises_and_stays() -> None:
    o = OptimConfig(muon_warmup=10)
    assert [round(muon_momentum(step, o), 4) for step in (0, 5, 10, 1000)] == [
        0.85,
        0.9,
        0.95,
        0.95,
    ]
    assert muon_momentum(0, OptimConfig()) == 0.95


def test_weight_decay_is_for_matrices_only() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=257))
    [adamw] = build_optimizers(model, OptimConfig())
    decayed = {
        name for g in adamw.param_groups if g["weight_decay"] > 0 for name in g["param_names"]
    }
    assert decayed == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters()))


def test_set_rate_keeps_each_groups_own_peak() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=257))
    adamw, muon = build_optimizers(model, OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02))
    set_learning_rates([adamw, muon], 0.5)
    assert adamw.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert {p.ndim for p in muon.param_groups[0]["params"]} == {2}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(kind: str) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=257))
    optimizers = build_optimizers(model, OptimConfig(optimizer=kind))
    ids = torch.arange(8)[None]

    def step(bad: bool) -> None:
        model(ids, ids).backward()
        if bad:
            model.transformer.h[0].mlp.c_fc.weight.grad[0, 0] = math.nan
        for o in optimizers:
            o.found_inf = torch.tensor(float(bad))
            o.step()
            o.zero_grad()

    step(False)
    before = [p.clone() for p in model.parameters()]
    state = [v.clone() for o in optimizers for s in o.state.values() for v in s.values()]
    step(True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            state,
            (v for o in optimizers for s in o.state.values() for v in s.values()),
            strict=True,
        )
    )
    step(False)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], model.parameters(), strict=False))


def test_muon_is_torchs_on_square_and_wide_matrices() -> None:
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 64), (64, 16)]
    ours, theirs = (
        [
            torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i)))
            for i, s in enumerate(shapes)
        ]
        for _ in range(2)
    )
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(
        theirs,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):  # bf16 inside: equal to its rounding
        assert (p - q).norm() / q.norm() < 2e-3


def test_muon_takes_query_key_and_value_as_three_matrices() -> None:
    def after(width: int, grads: list[torch.Tensor]) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(16, width))
        p.grad = torch.cat(grads, dim=1)
        Muon([p], lr=0.02).step()
        return p.detach()

    grads = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    together = after(48, grads)
    torch.testing.assert_close(
        together, torch.cat([after(16, [g]) for g in grads], dim=1), rtol=2e-2, atol=1e-4
    )


@pytest.mark.parametrize(("computes", "setting", "dtype"), [
    (torch.bfloat16, "bf16", torch.bfloat16), (torch.bfloat16, "fp32", torch.float32), (torch.float32, "bf16", torch.float32),
    (torch.float16, "bf16", torch.float32),
])  # fmt: skip
def test_newton_schulz_takes_bf16_only_where_the_run_does(
    computes: torch.dtype, setting: Any, dtype: torch.dtype
) -> None:
    """On a processor without bf16 instructions it is thirty times slower than fp32."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=8, vocab_size=64), computes)
    [_, muon] = build_optimizers(model, OptimConfig(optimizer="muon", newton_schulz=setting))
    assert isinstance(muon, Muon)
    assert muon.dtype == dtype


def test_newton_schulz_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 32, 96), dtype=torch.float32))
    assert ((values > 0.6) & (values < 1.3)).all()
