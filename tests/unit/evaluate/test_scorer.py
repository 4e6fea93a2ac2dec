"""Properties of the scorer. `tests/integration/test_scorer.py` compares it with transformers."""

import numpy as np
import torch

from anew import GPT
from anew.evaluate.scorer import Question, score
from tests.support.evaluation import SCORER_CONFIG, scorer_model


def test_endings_do_not_attend_to_each_other() -> None:
    model = scorer_model()
    context = [1, 2, 3]
    ending = [4, 5, 6]
    other = [9, 9, 9, 9]
    [[alone]] = score(model, [Question(context, [ending])])
    [[first, _]] = score(model, [Question(context, [ending, other])])
    [[_, second]] = score(model, [Question(context, [other, ending])])
    np.testing.assert_allclose(first.log_probs, alone.log_probs, atol=1e-6)
    np.testing.assert_allclose(second.log_probs, alone.log_probs, atol=1e-6)


def test_of_equal_logits_the_lowest_id_is_the_top_token() -> None:
    model = GPT(SCORER_CONFIG).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    [[zero, one]] = score(model, [Question([1], [[0], [1]])])
    assert zero.is_top.tolist() == [True]
    assert one.is_top.tolist() == [False]


def test_scoring_changes_neither_mode_nor_random_state_nor_gradients() -> None:
    model = GPT(SCORER_CONFIG).train()
    state = torch.get_rng_state()
    score(model, [Question([1], [[2]])])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
