"""The short fault-injection programme, as tests."""

import os

import pytest

if os.name == "nt":
    pytest.skip("the programme needs POSIX signals", allow_module_level=True)

from tests.faults.programme import PROGRAMME, run_fault


@pytest.mark.guarantee("durable")
@pytest.mark.parametrize("name", PROGRAMME)
def test_fault(name: str) -> None:
    result = run_fault(name, is_full=False)
    if result.skip_reason:
        pytest.skip(result.skip_reason)
    assert not result.failures, "\n".join(result.failures[:20])
    assert result.injections > 0
