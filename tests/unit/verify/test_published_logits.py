"""The published logits that `anew verify` ships, and the comparison with them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import UserError
from anew.config.schema import GPTConfig
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.verify.published_logits import GPT2_124M, Reading, check_published, read_reference
from tests.support import shared

GPT2 = Tokenizer.named("gpt2")
READINGS = read_reference(GPT2_124M)


def test_published_figures_are_consistent() -> None:
    assert len(READINGS) == 10
    for reading in READINGS:
        assert GPT2.encode(reading.text) == reading.token_ids
        logits = [logit for _, logit in reading.top]
        assert logits == sorted(logits, reverse=True)
        assert len({token for token, _ in reading.top}) == 20
        assert all(0 <= token < 50257 for token, _ in (*reading.top, *reading.sample))
        assert all(logit <= logits[0] for _, logit in reading.sample)
    for reading in READINGS[:5]:
        assert reading.log_sum_exp is not None
        assert reading.mean_logit is not None
        largest = reading.top[0][1]
        top_only = largest + math.log(sum(math.exp(v - largest) for _, v in reading.top))
        # The sum has all terms of the top 20, and the others are each below the twentieth.
        assert top_only < reading.log_sum_exp < largest + math.log(50257)
        sample = [logit for _, logit in reading.sample]
        assert abs(sum(sample) / len(sample) - reading.mean_logit) < 5


def test_continuations_begin_with_the_likeliest_token_of_their_prompt() -> None:
    for prompt, continued in zip(READINGS[:5], READINGS[5:], strict=True):
        assert continued.token_ids == [*prompt.token_ids, prompt.top[0][0]]
    second = [GPT2.decode([reading.top[0][0]]) for reading in READINGS[5:]]
    assert second == [" and", " we", ",", ",", " of"]


def test_published_figures_are_those_of_the_source() -> None:
    path = shared("reference_runs") / "gpt2_124m_logits.json"
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    assert len(examples) == 5
    for example, reading in zip(examples, READINGS, strict=False):
        assert reading.text == example["prompt"]
        for ours, theirs in ((reading.top, "top"), (reading.sample, "every_2500th")):
            assert [token for token, _ in ours] == [token for token, _ in example[theirs]]
            assert [v for _, v in ours] == pytest.approx([v for _, v in example[theirs]], abs=6e-5)
        assert reading.log_sum_exp == pytest.approx(example["log_sum_exp"], abs=6e-5)
        assert reading.mean_logit == pytest.approx(example["mean_logit"], abs=6e-5)


@pytest.fixture(scope="module")
def model() -> GPT:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=16)
    return GPT(config, seed=3).eval()


def own_reading(model: GPT) -> Reading:
    """Return a reading of the model itself."""
    ids = GPT2.encode("Hello world")
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].double()
    top = logits.topk(20)
    return Reading(
        text="Hello world",
        token_ids=ids,
        tolerance=1e-4,
        top=list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        sample=[(0, float(logits[0])), (50000, float(logits[50000]))],
        log_sum_exp=float(logits.logsumexp(0)),
        mean_logit=float(logits.mean()),
    )


def test_each_figure_is_compared(model: GPT) -> None:
    reading = own_reading(model)
    assert check_published(model, GPT2, [reading]).status == "PASS"
    (first, value), (second, _) = reading.top[:2]
    changes: dict[str, dict[str, Any]] = {
        "the logit of token 50000": {"sample": [(50000, 1.0)]},
        f"the logit of token {first}": {"top": [(first, value + 0.1)]},
        "log-sum-exp": {"log_sum_exp": 1.0},
        "the mean logit": {"mean_logit": 1.0},
        "other token ids": {"token_ids": [1, 2]},
        "the likeliest token is": {"top": [(second, reading.top[1][1])]},
    }
    for words, change in changes.items():
        check = check_published(model, GPT2, [dataclasses.replace(reading, **change)])
        assert check.status == "FAIL"
        assert words in check.detail


def test_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "logits.json"
    path.write_text('{"format": 2, "readings": []}')
    with pytest.raises(UserError, match="update anew"):
        read_reference(path)
    path.write_text('{"format": 1, "readings": [{}]}')
    with pytest.raises(UserError, match="not a file of published logits"):
        read_reference(path)
