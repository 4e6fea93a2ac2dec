"""Counts of parameters and operations against the model itself and against published figures."""

import pytest

from anew.config.schema import GPTConfig
from anew.model.flops import count_parameters, flops_per_token
from anew.model.gpt import GPT
from tests.support.models import SMALL


def test_parameter_count_is_that_of_the_model() -> None:
    assert count_parameters(GPTConfig()) == 124_475_904
    assert count_parameters(SMALL) == sum(p.numel() for p in GPT(SMALL).parameters())
    assert GPTConfig().padded_vocab_size == 50304 == 393 * 2**7


def test_flops_per_token_of_124m() -> None:
    assert flops_per_token(GPTConfig(), 1024) / 1e6 == pytest.approx(798, abs=0.5)
    assert flops_per_token(GPTConfig(), 1024, causal=False) / 1e6 == pytest.approx(855, abs=0.5)
