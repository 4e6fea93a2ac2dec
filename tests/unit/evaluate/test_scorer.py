"""The scorer answers what a plain loop over transformers answers, however its questions are batched, shared, cropped or cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint import huggingface as weights
from anew.evaluate.scorer import Question, score

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)
ids = st.lists(st.integers(0, 256), min_size=1, max_size=30)


def lively(seed: int = 5) -> GPT:
    """A model whose answers differ clearly from token to token, as a trained one's do."""
    model = GPT(SHAPE, seed=seed).eval()
    for p in model.transformer.parameters():
        p.data.mul_(8 if p.ndim == 2 else 1)
    model.transformer.wte.weight.data[257:] = 0
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("lively")
    model = lively()
    weights.save_model(folder, model, Tokenizer.named("bytes"))
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def by_hand(
    model: torch.nn.Module, context: list[int], ending: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods and hits, one token at a time, each behind as much of what came before as the model has positions for."""
    log_p, hits = [], []
    n = SHAPE.n_positions
    for i, token in enumerate(ending):
        start = i // n * n  # an ending longer than the positions is scored in pieces of n
        before = [*context, *ending[:start]]
        piece = ending[start : start + n]
        before = before[-(n + 1 - len(piece)) :] + ending[start:i]
        logits = model(torch.tensor([before])).logits[0, -1]
        log_p.append(logits.log_softmax(-1)[token].item())
        hits.append(logits.argmax().item() == token)
    return np.array(log_p), np.array(hits)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=5),
    st.sampled_from([8, 60, 4096]),
)
def test_equals_a_loop_over_transformers(
    pair: tuple[GPT, torch.nn.Module], asked: list, batch_tokens: int
) -> None:
    ours, theirs = pair
    answers = score(ours, [Question(context, endings) for context, endings in asked], batch_tokens)
    for (context, endings), answer in zip(asked, answers, strict=True):
        for ending, scored in zip(endings, answer, strict=True):
            log_p, hits = by_hand(theirs, context, ending)
            np.testing.assert_allclose(scored.log_p, log_p, atol=2e-5)
            assert scored.hit.tolist() == hits.tolist()
            assert scored.total == pytest.approx(log_p.sum(), abs=1e-3)
            assert (scored.best >= scored.log_p).all()
            assert (scored.best[scored.hit] == scored.log_p[scored.hit]).all()


def test_branches_do_not_see_each_other() -> None:
    model = lively()
    context, other = [1, 2, 3], [9, 9, 9, 9]
    [alone] = score(model, [Question(context, [[4, 5, 6]])])
    [first, _] = score(model, [Question(context, [[4, 5, 6], other])])[0]
    [_, second] = score(model, [Question(context, [other, [4, 5, 6]])])[0]
    np.testing.assert_allclose(first.log_p, alone[0].log_p, atol=1e-6)
    np.testing.assert_allclose(second.log_p, alone[0].log_p, atol=1e-6)


def test_among_equal_logits_the_first_is_the_hit() -> None:
    model = GPT(SHAPE).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    [[zero, one]] = score(model, [Question([1], [[0], [1]])])
    assert zero.hit.tolist() == [True]
    assert one.hit.tolist() == [False]


def test_the_model_is_left_as_it_was() -> None:
    model = GPT(SHAPE).train()
    state = torch.get_rng_state()
    score(model, [Question([1], [[2]])])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
