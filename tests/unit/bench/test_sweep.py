"""Signals and settings of experiments of many runs."""

import os
import signal
from types import SimpleNamespace

import pytest

from anew.bench.sweep import stop_after
from anew.cli import experiments
from anew.config.config import Config
from anew.errors import UserError
from anew.utils.signals import stop_on_signals


def test_signal_at_the_end_of_a_trial_stops_the_experiment() -> None:
    with stop_after(0) as stop:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.is_set()
        assert stop.is_set()


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("", "over one setting or two"),
        ("lr", "is not a setting with values"),
        ("lrr=1,2", "no setting 'lrr'; did you mean lr"),
        ("steps=ten", "steps takes values of type int"),
        ("lr=1 steps=2 seed=3", "over one setting or two"),
    ],
)
def test_invalid_sweeps_are_refused(tiny: Config, over: str, words: str) -> None:
    arguments = SimpleNamespace(over=over, minutes=0.0, jobs=1, picture="")
    with pytest.raises(UserError, match=words):
        experiments.sweep(tiny.override(val_tokens=500), "cpu", arguments)
