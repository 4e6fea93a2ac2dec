"""Which errors of a disk lead to further attempts, and when."""

import errno
import logging
import os
import time
from pathlib import Path

import pytest

from anew.utils.disk_errors import out_of_space, with_retries

PATH = Path("/net/run")


class Disk:
    """An operation that fails with each of the given error numbers in turn, and then succeeds."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return "done"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the pauses that were asked for; none of them is waited for."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def test_errors_that_pass_are_met_by_attempts_with_growing_pauses(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
    with caplog.at_level(logging.WARNING, "anew"):
        assert with_retries(disk, PATH) == "done"
    assert disk.calls == 5
    assert pauses == sorted(set(pauses))
    assert 30 < sum(pauses) < 60
    first = f"{PATH}: Input/output error (attempt 1 of 5); the next attempt follows in 2 s"
    assert caplog.messages[0] == first.replace("Input/output error", os.strerror(errno.EIO))
    assert len(caplog.messages) == 4


def test_error_that_stays_is_raised_after_five_attempts_and_names_the_path(
    pauses: list[float],
) -> None:
    disk = Disk(*[errno.ESTALE] * 9)
    with pytest.raises(OSError, match=str(PATH)) as caught:
        with_retries(disk, PATH)
    assert caught.value.errno == errno.ESTALE
    assert (disk.calls, len(pauses)) == (5, 4)


@pytest.mark.parametrize(
    "number",
    [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS, errno.ENOSPC, errno.EDQUOT],
    ids=errno.errorcode.get,
)
def test_error_that_does_not_pass_is_raised_at_once(pauses: list[float], number: int) -> None:
    disk = Disk(number)
    with pytest.raises(OSError, match=str(PATH)):
        with_retries(disk, PATH)
    assert (disk.calls, pauses) == (1, [])


def test_only_a_full_disk_or_quota_is_called_full() -> None:
    assert out_of_space(OSError(errno.ENOSPC, ""), PATH) == "the disk of /net/run is full"
    assert "quota" in out_of_space(OSError(errno.EDQUOT, ""), PATH)
    assert out_of_space(OSError(errno.EIO, ""), PATH) == ""
