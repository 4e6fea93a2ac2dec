"""The fault-injection programme at CI's size."""

import os

import pytest

if os.name == "nt":
    pytest.skip("POSIX signals", allow_module_level=True)

from tests.faults.programme import PROGRAMME, run_one


@pytest.mark.parametrize("name", PROGRAMME)
def test_fault(name: str) -> None:
    tally = run_one(name, full=False)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert not tally.failures, "\n".join(tally.failures[:20])
    assert tally.runs > 0
