"""Generation with the cache, its options, and the rules of sampling."""

from typing import Any

import pytest
import torch

from anew import GPTConfig, UserError, generate
from anew.inference.generate import Options, stream, until_end_of_text
from anew.inference.sampling import sample
from anew.model.gpt import GPT

MODEL = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257), seed=2)
MODEL.eval()
for parameter in MODEL.transformer.h.parameters():
    # A fresh model repeats one token; with larger weights it does not.
    parameter.data.mul_(8.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"top_k": 5, "seed": 4},
        {"top_p": 0.8, "seed": 5},
    ],
)
def test_cached_decoding_equals_reading_the_whole_text(options: Options) -> None:
    prompts = [[1, 2, 3], [7], [250, 4, 9, 9, 1]]
    cached = list(stream(MODEL, prompts, 20, **options))
    without_cache: Options = {**options, "use_cache": False}
    assert cached == list(stream(MODEL, prompts, 20, **without_cache))


def test_row_does_not_depend_on_other_rows() -> None:
    prompts = [[1, 2, 3], [7], [250, 4, 9, 9, 1]]
    alone = [generate(MODEL, [prompt], 20, temperature=0.0)[0] for prompt in prompts]
    assert generate(MODEL, prompts, 20, temperature=0.0) == alone


def test_top_k_top_p_and_temperature_change_probabilities_as_defined() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(4000, 1)
    assert set(sample(logits, 1.0, 2, 1.0, seeded()).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0, 0.6, seeded()).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0, 0.4, seeded()).tolist()) == {0}
    all_tokens = sample(logits, 1.0, 0, 1.0, seeded())
    assert torch.bincount(all_tokens) / 4000 == pytest.approx(probabilities, abs=0.04)
    half_temperature = sample(logits, 0.5, 0, 1.0, seeded())
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    found = torch.bincount(half_temperature, minlength=4) / 4000
    assert found == pytest.approx(squared / squared.sum(), abs=0.04)


def test_likeliest_tokens_of_a_decoder_give_the_same_choice() -> None:
    logits = torch.randn(3, 257, generator=seeded(1))
    greedy = sample(logits, 0.0, 0, 1.0, seeded(), logits.topk(1))
    assert torch.equal(greedy, logits.argmax(-1))
    for seed in range(20):
        expected = sample(logits, 0.9, 5, 0.8, seeded(seed))
        assert torch.equal(sample(logits, 0.9, 5, 0.8, seeded(seed), logits.topk(5)), expected)


def test_seed_decides_the_text_and_nothing_else_changes() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    MODEL.train()
    first = generate(MODEL, [[1, 2]], 12, seed=1)
    assert MODEL.training
    assert torch.equal(torch.get_rng_state(), before)
    assert first == generate(MODEL, torch.tensor([[1, 2]]), 12, seed=1)
    assert first != generate(MODEL, [[1, 2]], 12, seed=2)


def test_text_beyond_the_positions_is_cropped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    [row] = generate(MODEL, [[5] * 40], 50, temperature=0.0)
    assert len(row) == 50
    assert "only its last 32 tokens are read" in caplog.text
    assert caplog.text.count("cropped to its last 16 tokens") == 1
    text = [5] * 32 + row
    with torch.no_grad():  # the second token was chosen after the crop to 16
        assert MODEL(torch.tensor([text[17:33]]))[0, -1].argmax().item() == text[33]


def test_generation_ends_before_the_stop_id() -> None:
    [free] = generate(MODEL, [[1]], 12, temperature=0.0)
    [stopped] = generate(MODEL, [[1]], 12, stop=free[4], temperature=0.0)
    assert stopped == free[: free.index(free[4])]


def test_until_end_of_text_reads_no_further_than_the_last_end() -> None:
    steps = iter([[1, 2], [9, 3], [4, 9], [5, 5]])
    assert list(until_end_of_text(steps, 9)) == [(0, 1), (1, 2), (1, 3)]
    assert list(steps) == [[5, 5]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"temperature": "hot"},
        {"top_k": 2.5},
        {"top_k": None},
    ],
)
def test_options_without_a_meaning_are_refused(options: Any) -> None:
    with pytest.raises(UserError):
        generate(MODEL, [[1]], 3, **options)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="at least one token"):
        generate(MODEL, [[]], 3)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("text", "not text or one flat list"),
        (["text"], "not text or one flat list"),
        ([1, 2, 3], "not text or one flat list"),
        ([[1.0]], "not text or one flat list"),
        ([[1, 257]], "a token id is outside 0 to 256"),
        ([[-1]], "a token id is outside 0 to 256"),
    ],
)
def test_prompts_that_are_not_rows_of_token_ids_are_refused(prompts: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(MODEL, prompts, 1)
