"""The result of one check of `anew verify`."""

from typing import NamedTuple

PASS = "PASS"
FAIL = "FAIL"
NOT_RUN = "not run"


class Check(NamedTuple):
    """What was checked, and what was found."""

    name: str
    status: str  # PASS, FAIL or NOT_RUN
    detail: str  # what was compared; why it failed; or why it could not be checked


def passed(name: str, detail: str) -> Check:
    """Return the result of a check that has found nothing wrong."""
    return Check(name, PASS, detail)


def failed(name: str, reason: object) -> Check:
    """Return the result of a check that has found something wrong."""
    return Check(name, FAIL, str(reason))


def not_run(name: str, reason: object) -> Check:
    """Return the result of a check that could not be made."""
    return Check(name, NOT_RUN, str(reason))
