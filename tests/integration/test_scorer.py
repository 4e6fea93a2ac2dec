"""The scorer against a loop over a model of transformers, one token at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anew import GPT, Tokenizer
from anew.checkpoint.huggingface import save_model
from anew.evaluate.scorer import Question, score
from tests.support.evaluation import SCORER_CONFIG, scorer_model

ids = st.lists(st.integers(0, 256), min_size=1, max_size=30)
questions = st.tuples(ids, st.lists(ids, min_size=1, max_size=4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, torch.nn.Module]:
    """The same weights as a model of anew and as one of transformers."""
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("model")
    model = scorer_model()
    save_model(folder, model, Tokenizer.named("bytes"))
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def score_token_by_token(
    model: torch.nn.Module, context: list[int], ending: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities and hits, each with as much context as the positions allow."""
    log_probs, hits = [], []
    n_positions = SCORER_CONFIG.n_positions
    for i, token in enumerate(ending):
        start = i // n_positions * n_positions  # longer endings are scored in pieces
        before = [*context, *ending[:start]]
        piece = ending[start : start + n_positions]
        before = before[-(n_positions + 1 - len(piece)) :] + ending[start:i]
        logits = model(torch.tensor([before])).logits[0, -1]
        log_probs.append(logits.log_softmax(-1)[token].item())
        hits.append(logits.argmax().item() == token)
    return np.array(log_probs), np.array(hits)


@pytest.mark.guarantee("evidence")
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(questions, min_size=1, max_size=5), st.sampled_from([8, 60, 4096]))
def test_scores_equal_a_loop_over_transformers(
    pair: tuple[GPT, torch.nn.Module],
    asked: list[tuple[list[int], list[list[int]]]],
    batch_tokens: int,
) -> None:
    ours, theirs = pair
    answers = score(ours, [Question(context, endings) for context, endings in asked], batch_tokens)
    for (context, endings), answer in zip(asked, answers, strict=True):
        for ending, scores in zip(endings, answer, strict=True):
            log_probs, hits = score_token_by_token(theirs, context, ending)
            np.testing.assert_allclose(scores.log_probs, log_probs, atol=2e-5)
            assert scores.is_top.tolist() == hits.tolist()
            assert scores.total == pytest.approx(log_probs.sum(), abs=1e-3)
