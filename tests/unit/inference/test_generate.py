import pytest
import torch

from anew import GPTConfig, UserError, generate
from anew.inference.generate import sample, stream
from anew.model.gpt import GPT

MODEL = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257), seed=2)
for parameter in (
    MODEL.transformer.h.parameters()
):  # a fresh model repeats itself; larger weights give it something to say
    parameter.data.mul_(8.0)


def sampler(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"top_k": 5, "seed": 4},
        {"top_p": 0.8, "seed": 5},
    ],
)
def test_cached_decoding_equals_reading_everything_again(rules: dict[str, float]) -> None:
    prompts = [[1, 2, 3], [7], [250, 4, 9, 9, 1]]
    cached = list(stream(MODEL, prompts, 20, **rules))
    assert cached == list(stream(MODEL, prompts, 20, use_cache=False, **rules))
    alone = [generate(MODEL, [p], 20, temperature=0.0)[0] for p in prompts]
    assert generate(MODEL, prompts, 20, temperature=0.0) == alone


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    assert set(sample(logits, 1.0, 2, 1.0, sampler()).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0, 0.6, sampler()).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, 0, 0.4, sampler()).tolist()) == {0}
    everything = sample(logits, 1.0, 0, 1.0, sampler())
    assert torch.bincount(everything) / 4000 == pytest.approx(
        torch.tensor([0.5, 0.3, 0.15, 0.05]), abs=0.04
    )
    cold = sample(logits, 0.5, 0, 1.0, sampler())
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.bincount(cold, minlength=4) / 4000 == pytest.approx(
        squared / squared.sum(), abs=0.04
    )


def test_what_a_decoder_has_found_is_what_sample_would_find() -> None:
    logits = torch.randn(3, 257, generator=sampler(1))
    one, five = logits.topk(1), logits.topk(5)
    assert torch.equal(
        sample(logits, 0.0, 0, 1.0, sampler(), (one.values, one.indices)), logits.argmax(-1)
    )
    for seed in range(20):
        rules = 0.9, 5, 0.8, sampler(seed)
        assert torch.equal(
            sample(logits, *rules),
            sample(logits, 0.9, 5, 0.8, sampler(seed), (five.values, five.indices)),
        )


def test_a_seed_is_a_text_and_nothing_else_moves() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    MODEL.train()
    a = generate(MODEL, [[1, 2]], 12, seed=1)
    assert MODEL.training
    assert torch.equal(torch.get_rng_state(), before)
    assert a == generate(MODEL, torch.tensor([[1, 2]]), 12, seed=1)
    assert a != generate(MODEL, [[1, 2]], 12, seed=2)


def test_past_the_context_it_crops_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    [row] = generate(MODEL, [[5] * 40], 50, temperature=0.0)
    assert len(row) == 50
    assert "only its last 32 tokens are read" in caplog.text
    assert caplog.text.count("cropped to its last 16 tokens") == 1
    text = [5] * 32 + row
    with torch.no_grad():  # the second token was chosen after the crop to 16
        assert MODEL(torch.tensor([text[17:33]]))[0, -1].argmax().item() == text[33]


def test_generation_ends_at_the_stop_id() -> None:
    [free] = generate(MODEL, [[1]], 12, temperature=0.0)
    [stopped] = generate(MODEL, [[1]], 12, stop=free[4], temperature=0.0)
    assert stopped == free[: free.index(free[4])]


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
    ],
)
def test_rules_that_mean_nothing_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(UserError):
        generate(MODEL, [[1]], 3, **rules)
    with pytest.raises(UserError, match="at least one token"):
        generate(MODEL, [[]], 3)
