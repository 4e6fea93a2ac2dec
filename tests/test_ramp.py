import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anew
from anew.config import UserError
from anew.ramp import Ramp


@given(st.lists(st.tuples(st.integers(1, 31), st.integers(1, 99)), max_size=3), st.integers(100, 500))
def test_what_came_before_is_the_sum_of_the_steps_before(pairs: list[tuple[int, int]], steps: int) -> None:
    shares, untils = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    text = ",".join(f"{a / 32}:{b / 100}" for a, b in zip(shares, untils, strict=False))
    ramp = Ramp.of(text, steps, 64)
    sizes = [ramp.sequences(step) for step in range(steps + 5)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 64
    assert [ramp.before(step) for step in range(steps + 6)] == [0, *itertools.accumulate(sizes)]


def test_stages_begin_where_they_say() -> None:
    ramp = Ramp.of("0.25:0.1,0.5:0.3", 1000, 512)
    assert [ramp.sequences(step) for step in (0, 99, 100, 299, 300, 999)] == [128, 128, 256, 256, 512, 512]


def test_no_ramp_is_the_whole_batch_always() -> None:
    assert Ramp.of("", 10, 8).before(10) == 80


@pytest.mark.parametrize(
    "text", ["0.5", "0.5:0", "2:0.5", "0.5:0.5,0.25:0.7", "0.25:0.7,0.5:0.5", "half:0.5", "0.3:0.5", "1/2:0.5", "0.5:0.0001"]
)
def test_what_is_no_ramp_is_refused_in_words(text: str) -> None:
    with pytest.raises(UserError, match="batch_ramp"):
        anew.recipe("shakespeare", batch_ramp=text)


def test_a_stage_that_ranks_cannot_share_is_refused() -> None:
    config = anew.recipe("shakespeare", batch_tokens=2048, seq_len=128, micro_batch=1, batch_ramp="0.25:0.1")  # 16 sequences, first 4
    assert config.micro_batches(4) == (1, 4)
    with pytest.raises(UserError, match="stage of 4 sequences, which 8 ranks"):
        config.micro_batches(8)


def test_tokens_of_the_run_are_those_of_its_steps() -> None:
    config = anew.recipe("shakespeare", steps=100, batch_ramp="0.25:0.5")
    assert config.total_tokens == 50 * 1024 + 50 * 4096
