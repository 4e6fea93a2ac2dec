"""The network against transformers, against its own plain formula, and against the definition of
causality.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anew.config.schema import GPTConfig
from anew.model import loss as head
from anew.model.attention import plain_attention
from anew.model.flops import count_parameters, flops_per_token
from anew.model.gpt import GPT, gelu
from anew.model.kernels.cpu_attention import TILE, TiledBackward
from anew.model.kv_cache import Cache
from anew.utils.device import pick_compile

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)


def ids_for(config: GPTConfig, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def test_parameter_and_flop_counts() -> None:
    assert count_parameters(GPTConfig()) == 124_475_904
    assert count_parameters(SMALL) == sum(p.numel() for p in GPT(SMALL).parameters())
    assert flops_per_token(GPTConfig(), 1024) / 1e6 == pytest.approx(798, abs=0.5)
    assert flops_per_token(GPTConfig(), 1024, causal=False) / 1e6 == pytest.approx(855, abs=0.5)
    assert GPTConfig().padded_vocab_size == 50304 == 393 * 2**7


def test_initialisation_is_gpt2s() -> None:
    model = GPT(GPTConfig(n_layer=8, n_embd=256, n_head=4))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.02)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert std["transformer.wpe.weight"] == pytest.approx(0.01, rel=0.02)
    wte = model.transformer.wte.weight
    assert wte[:50257].std().item() == pytest.approx(0.02, rel=0.02)
    assert (wte[50257:] == 0).all()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_compiled_gelu_is_the_tanh_gelu() -> None:
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    rewritten = x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    assert (rewritten - F.gelu(x, approximate="tanh")).abs().max() < 1e-14
    assert (gelu(x) - F.gelu(x)).abs().max() > 4e-4  # the exact GELU is another function


def test_a_frequent_token_does_not_overflow_the_heads_gradient_in_fp16() -> None:
    """2,048 times the same target behind a large hidden state: a chunk adds 82,000 to its row, and
    fp16 ends at 65,504.
    """
    hidden = torch.full((2048, 8), 80.0, dtype=torch.float16, requires_grad=True)
    wte = torch.zeros(384, 8, requires_grad=True)
    targets = torch.full((2048,), 5)
    (
        2048 * head.HeadLoss.apply(hidden, wte, targets, 300, True)
    ).backward()  # the sum over tokens instead of their mean
    exact_wte = torch.zeros(384, 8, dtype=torch.float64, requires_grad=True)
    exact = F.cross_entropy(
        (torch.full((2048, 8), 80.0).double() @ exact_wte.t())[:, :300], targets, reduction="sum"
    )
    exact.backward()
    torch.testing.assert_close(wte.grad, exact_wte.grad.float(), rtol=2e-3, atol=1.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_gpu_forms_are_the_same_function(
    compiled: bool, dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases inside the products, and the GELU with its bias's gradient, against fp64; traced as
    for Inductor.
    """

    def gradients(model: GPT, loss_of: Any) -> tuple[float, torch.Tensor]:
        ids = ids_for(SMALL, 2, 24)
        loss = loss_of(ids, ids.roll(-1, 1))
        loss.backward()
        return loss.item(), torch.cat(
            [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        )

    exact_model, model = GPT(SMALL, torch.float64, seed=3).double(), GPT(SMALL, dtype, seed=3)
    for parameter in (*exact_model.parameters(), *model.parameters()):
        if parameter.ndim == 1:  # biases are zero and gains one in a new model
            parameter.data += 0.1 * torch.linspace(-1, 1, len(parameter), dtype=parameter.dtype)
    exact_loss, exact = gradients(exact_model, exact_model)
    monkeypatch.setattr("anew.model.gpt.is_on_gpu", lambda _: True)
    loss, found = gradients(
        model, torch.compile(model, dynamic=False, backend="aot_eager") if compiled else model
    )
    torch._dynamo.reset()
    assert loss == pytest.approx(exact_loss, rel=off / 10)
    assert ((found - exact).norm() / exact.norm()).item() < off


def test_no_token_sees_the_future() -> None:
    model = GPT(SMALL)
    seen: list[torch.Tensor] = []
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: (out.retain_grad(), seen.append(out))[1]
    )
    logits = model(ids_for(SMALL, 1, 12))
    logits[0, 5].sum().backward()
    assert seen[0].grad is not None
    by_position = seen[0].grad[0].abs().sum(dim=-1)
    assert (by_position[6:] == 0).all()
    assert (by_position[:6] > 0).all()


def test_plain_attention_is_the_fused_one() -> None:
    fused, plain = (
        GPT(SMALL, seed=3),
        GPT(GPTConfig(**{**SMALL.__dict__, "attention": "plain"}), seed=3),
    )
    ids, targets = ids_for(SMALL, 2, 24), ids_for(SMALL, 2, 24, 1)
    a, b = fused(ids, targets), plain(ids, targets)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    a.backward(), b.backward()
    for (name, p), (_, q) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiled_backward_is_the_gradient_of_the_formula(dtype: torch.dtype) -> None:
    shape, g = (2, 3, 3 * TILE, 8), torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4)]
    ours = [x.to(dtype).requires_grad_() for x in drawn[:3]]
    exact = [x.to(dtype).double().requires_grad_() for x in drawn[:3]]
    out = TiledBackward.apply(*ours)
    expected = plain_attention(*exact, causal=True, mask=None, dropout=0.0)
    out.backward(drawn[3].to(dtype))
    expected.backward(drawn[3].to(dtype).double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-2
    for a, b in [(out, expected), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]:
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_compiled_training_takes_the_same_step_as_eager() -> None:
    if not pick_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("needs a C++ compiler")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_positions=2 * TILE, vocab_size=257)
    ids = ids_for(config, 2, 2 * TILE)
    gradients = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, dynamic=False)):
        model = GPT(config, seed=8)
        wrap(model)(ids, ids.roll(-1, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(
        *gradients, strict=True
    ):  # the compiled one uses TiledBackward and GELU as a sigmoid
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 2 * 64 + 30])
def test_chunked_loss_and_gradients_are_those_of_float64(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anew.model.loss.CHUNK_EAGER", 64)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=rows, vocab_size=300)
    model = GPT(config, seed=1)
    ids, targets = ids_for(config, 1, rows), ids_for(config, 1, rows, 1)
    targets[0, ::3] = -100
    (loss := model(ids, targets)).backward()
    reference = GPT(config, torch.float64, seed=1).double()
    logits = reference.head(reference.hidden(ids))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(3 * p.grad, q.grad.float(), rtol=1e-3, atol=1e-6, msg=name)


def test_the_loss_of_a_chunk_in_place_and_in_one_pass_are_the_same() -> None:
    logits, targets = (
        5 * torch.randn(50, 384, generator=torch.Generator().manual_seed(1)),
        torch.arange(50) * 5,
    )
    targets[::7] = -100
    loss, by_one_pass = head.fused_chunk_loss(logits, targets, 257, training=True)
    again, in_place = head.chunk_loss(logits.clone(), targets, 257, training=True)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(by_one_pass, in_place)
    assert in_place[::7].count_nonzero() == in_place[:, 257:].count_nonzero() == 0
    assert head.chunk_loss(logits, targets, 257, training=False) == (again, None)


def test_gradient_of_a_scaled_loss_is_scaled() -> None:
    model, ids = GPT(SMALL), ids_for(SMALL, 2, 9)
    model(ids, ids).backward()
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(ids, ids) / 4).backward()
    for a, p in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(a / 4, p.grad)


def test_fp16_gradients_are_neither_lost_nor_infinite() -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=512)
    ids = ids_for(config, 4, 512)
    scale, gradients = 65536.0, []
    for dtype in (torch.float16, torch.float32):
        model = GPT(config, dtype, seed=3)
        (model(ids, ids.roll(-1, 1)) * scale).backward()
        gradients.append(model.transformer.wte.weight.grad / scale)
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 5e-3
    rare = (
        gradients[1].abs() < 1e-9
    )  # rows of tokens that no target names: pushed down by tiny probabilities
    assert gradients[0][:50257][~rare[:50257]].count_nonzero() > 0.99 * (~rare[:50257]).sum()


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = head.chunk_loss
    monkeypatch.setattr(head, "chunk_loss", lambda *a: (asked.append(a[-1]), original(*a))[1])
    model, ids = GPT(SMALL), ids_for(SMALL, 1, 8)
    with torch.no_grad():
        model(ids, ids)
    model(ids, ids)
    assert asked == [False, True]


def test_padding_rows_take_no_part_and_stay_zero() -> None:
    model = GPT(SMALL)
    ids = ids_for(SMALL, 4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.transformer.wte.weight[257:] == 0).all()
    assert model(ids).shape == (4, 24, 257)


@pytest.mark.parametrize("lengths", [[9, 9], [4, 9, 1]])
def test_cache_has_three_cases_and_none_changes_a_logit(lengths: list[int]) -> None:
    model = GPT(SMALL, seed=5).eval()
    rows = [ids_for(SMALL, 1, n + 8, seed=n + i)[0] for i, n in enumerate(lengths)]
    cache = Cache.empty(model, len(rows), 24)
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, :n] = rows[i][:n]
    with torch.no_grad():
        got = [model(padded, cache=cache)]  # prefill from empty
        cache.truncate(lengths)
        steps = [
            torch.stack([r[n : n + 1] for r, n in zip(rows, lengths, strict=True)])
        ]  # one token
        steps += [
            torch.stack([r[n + 1 : n + 6] for r, n in zip(rows, lengths, strict=True)])
        ]  # many tokens onto a filled cache
        steps += [torch.stack([r[n + 6 : n + 8] for r, n in zip(rows, lengths, strict=True)])]
        got += [model(step, cache=cache) for step in steps]
        for i, n in enumerate(lengths):
            expected = model(rows[i][None])[0]
            torch.testing.assert_close(got[0][i, :n], expected[:n], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                torch.cat([g[i] for g in got[1:]]), expected[n : n + 8], rtol=1e-4, atol=1e-5
            )


def test_bf16_follows_the_compute_dtype_and_keeps_fp32_weights() -> None:
    model = GPT(SMALL, torch.bfloat16)
    ids = ids_for(SMALL, 2, 12)
    assert model(ids).dtype == torch.bfloat16
    loss = model(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(
        p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert loss.item() == pytest.approx(GPT(SMALL)(ids, ids).item(), rel=5e-3)


def test_dropout_drops_in_training_only() -> None:
    model = GPT(GPTConfig(**{**SMALL.__dict__, "dropout": 0.5}))
    ids = ids_for(SMALL, 2, 12)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_give_the_same_gradients(compiled: bool) -> None:
    """With dropout too: the second time draws the same numbers."""
    if compiled and not pick_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("there is no compiler here")
    ids = ids_for(SMALL, 2, 16)
    gradients = []
    for recompute in (False, True):
        config = dataclasses.replace(SMALL, dropout=0.0 if compiled else 0.2, recompute=recompute)
        model = GPT(config, seed=8)
        run = torch.compile(model, dynamic=False) if compiled else model
        torch.manual_seed(5)
        run(ids, ids.roll(-1, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if compiled else 0, atol=1e-7 if compiled else 0)


def test_recomputed_blocks_keep_less() -> None:
    kept = []
    for recompute in (False, True):
        config = dataclasses.replace(SMALL, recompute=recompute)
        saved: dict[int, torch.Tensor] = {}
        kept.append(saved)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(id(t), t), lambda t: t
        ):
            GPT(config)(ids_for(SMALL, 2, 16), ids_for(SMALL, 2, 16))
    before, after = (sum(t.numel() for t in saved.values()) for saved in kept)
    assert after < 0.5 * before
