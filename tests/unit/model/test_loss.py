"""The chunked loss against torch's cross-entropy in fp64."""

from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from anew.config.schema import GPTConfig
from anew.model import loss as loss_module
from anew.model.gpt import GPT
from anew.model.loss import HeadLoss, chunk_loss, fused_chunk_loss
from tests.support.models import SMALL, gradient_of, ids_for


@pytest.mark.parametrize("rows", [7, 2 * 64 + 30])
def test_chunked_loss_and_gradients_equal_those_in_float64(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anew.model.loss.CHUNK_EAGER", 64)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=rows, vocab_size=300)
    model = GPT(config, seed=1)
    ids = ids_for(config, 1, rows)
    targets = ids_for(config, 1, rows, seed=1)
    targets[0, ::3] = -100
    loss = model(ids, targets)
    loss.backward()
    reference = GPT(config, torch.float64, seed=1).double()
    logits = reference.head(reference.hidden(ids))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        exact = gradient_of(q).float()
        torch.testing.assert_close(3 * gradient_of(p), exact, rtol=1e-3, atol=1e-6, msg=name)


def test_fused_chunk_loss_equals_chunk_loss_in_place() -> None:
    logits = 5 * torch.randn(50, 384, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(50) * 5
    targets[::7] = -100
    loss, fused = fused_chunk_loss(logits, targets, 257, training=True)
    again, in_place = chunk_loss(logits.clone(), targets, 257, training=True)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(fused, in_place)
    assert in_place is not None
    assert in_place[::7].count_nonzero() == in_place[:, 257:].count_nonzero() == 0
    assert chunk_loss(logits, targets, 257, training=False) == (again, None)


def test_gradient_of_a_scaled_loss_is_scaled() -> None:
    model = GPT(SMALL)
    ids = ids_for(SMALL, 2, 9)
    model(ids, ids).backward()
    gradients = [gradient_of(p).clone() for p in model.parameters()]
    model.zero_grad()
    (model(ids, ids) / 4).backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient / 4, p.grad)


def test_head_gradient_of_a_frequent_token_does_not_overflow_in_fp16() -> None:
    """The target of 2,048 tokens is the same, behind a large hidden state.

    A chunk adds 82,000 to the row of that target, and fp16 ends at 65,504.
    """
    hidden = torch.full((2048, 8), 80.0, dtype=torch.float16, requires_grad=True)
    wte = torch.zeros(384, 8, requires_grad=True)
    targets = torch.full((2048,), 5)
    mean_loss = HeadLoss.apply(hidden, wte, targets, 300, True)
    (2048 * mean_loss).backward()
    exact_wte = torch.zeros(384, 8, dtype=torch.float64, requires_grad=True)
    exact_logits = torch.full((2048, 8), 80.0).double() @ exact_wte.t()
    F.cross_entropy(exact_logits[:, :300], targets, reduction="sum").backward()
    exact_gradient = gradient_of(exact_wte).float()
    torch.testing.assert_close(wte.grad, exact_gradient, rtol=2e-3, atol=1.0)


def test_no_gradient_is_computed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    training_flags = []

    def recorded(
        logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        training_flags.append(training)
        return chunk_loss(logits, targets, vocab_size, training)

    monkeypatch.setattr(loss_module, "chunk_loss", recorded)
    model = GPT(SMALL)
    ids = ids_for(SMALL, 1, 8)
    with torch.no_grad():
        model(ids, ids)
    model(ids, ids)
    assert training_flags == [False, True]


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


@pytest.mark.parametrize("head", ["chunked", "plain"])
def test_loss_and_gradients_are_the_same_if_logits_are_computed_for_targets_only(
    head: Literal["chunked", "plain"],
) -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=24, vocab_size=100, head=head)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(100, (3, 24), generator=generator)
    targets = torch.randint(100, (3, 24), generator=generator)
    targets[torch.rand(3, 24, generator=generator) < 0.8] = -100
    found = []
    for few_targets in (False, True):
        model = GPT(config, seed=2)
        loss = model(ids, targets, few_targets=few_targets)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append((loss.item(), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
