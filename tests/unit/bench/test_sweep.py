"""Signals and settings of experiments of many runs."""

import os
import signal
from types import SimpleNamespace

import pytest

from anew.bench.sweep import stop_after
from anew.cli import experiments
from anew.config.schema import Config
from anew.errors import UserError
from anew.utils.signals import stop_on_signals


def test_signal_at_the_end_of_a_trial_stops_the_experiment() -> None:
    with stop_after(0) as stop:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.is_set()
        assert stop.is_set()


@pytest.mark.parametrize("over", ["", "lr", "speed=1,2", "steps=ten", "lr=1 steps=2 seed=3"])
def test_invalid_sweeps_are_refused(tiny: Config, over: str) -> None:
    arguments = SimpleNamespace(over=over, minutes=0.0, picture="")
    with pytest.raises(UserError, match="over"):
        experiments.sweep(tiny.override(val_tokens=500), "cpu", arguments)
