"""The slowest rank is found from the times of all ranks, and named once."""

import logging

import pytest
import torch

from anew.training import slow_ranks
from anew.training.slow_ranks import RankTimer, SlowRanks, slowest

NAMES = ["cpu of a", "cpu of a", "cpu of b"]
EVEN = (0.10, 0.11, 0.10)
UNEVEN = (0.10, 0.11, 1.05)


def warnings_after(ranks: SlowRanks, steps: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "anew"):
        for _ in range(steps):
            ranks.add(UNEVEN)
    return caplog.messages


def test_slowest_rank_is_compared_with_the_others() -> None:
    assert slowest((0.25, 0.75)) == (1, 3.0)
    assert slowest((1.0, 0.125, 0.375, 0.25)) == (0, 4.0)


def test_slow_rank_is_named_once_with_its_machine(caplog: pytest.LogCaptureFixture) -> None:
    ranks = SlowRanks(NAMES)
    assert warnings_after(ranks, slow_ranks.STEPS_PER_COMPARISON - 1, caplog) == []
    [message] = warnings_after(ranks, 1, caplog)
    assert message.startswith("slowest rank: 2 (cpu of b) computes for 1,050 ms in each step")
    assert "10.0 times as long as the other ranks" in message
    assert warnings_after(ranks, 5 * slow_ranks.STEPS_PER_COMPARISON, caplog) == []


def test_slow_rank_is_named_again_after_some_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_ranks, "SECONDS_BETWEEN_WARNINGS", -1.0)
    assert len(warnings_after(SlowRanks(NAMES), 3 * slow_ranks.STEPS_PER_COMPARISON, caplog)) == 3


def test_even_ranks_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    ranks = SlowRanks(NAMES)
    rows = [ranks.add(EVEN) for _ in range(3 * slow_ranks.STEPS_PER_COMPARISON)]
    assert caplog.messages == []
    assert rows[0] == {"speed/slowest_rank": 1, "speed/slowest_rank_ratio": 1.1}


def test_one_rank_and_unknown_times_have_no_columns() -> None:
    assert SlowRanks(NAMES[:1]).add(()) == {}
    assert SlowRanks(NAMES).add((0.1, 0.0, 0.1)) == {}


def test_timer_keeps_the_time_of_the_last_complete_step(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.5, 20.0, 30.0, 30.25, 40.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    timer = RankTimer(torch.device("cpu"))
    timer.start()
    timer.stop()
    assert timer.seconds == 0.0
    timer.start()
    assert timer.seconds == 1.5
    timer.start()  # after a validation: nothing new is known
    assert timer.seconds == 1.5
    timer.stop()
    timer.start()
    assert timer.seconds == 0.25
