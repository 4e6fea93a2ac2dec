"""The exceptions that the package raises on purpose. Each ends a command with its own exit code."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input. The text says in one sentence what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2. `on_every_rank` says that
    all processes of a distributed run raise the same error, so that only rank 0 prints it.
    """

    def __init__(self, text: str, on_every_rank: bool = False) -> None:
        super().__init__(text)
        self.on_every_rank = on_every_rank


def unknown_name(kind: str, name: str, known: Iterable[str], advice: str = "") -> UserError:
    """Return the error for a name that is not among `known`.

    It suggests the known names that begin with `name`, or else the most similar one. If there is
    none, it gives the `advice`, or else lists all known names. Leading dashes are not compared.
    """
    names = {other.lower().lstrip("-"): other for other in known}
    key_of_name = name.lower().lstrip("-")
    longer = [other for key, other in names.items() if key.startswith(key_of_name)]
    if key_of_name and longer:
        *others, last = longer[:4]
        choice = f"{', '.join(others)} or {last}" if others else last
        return UserError(f"there is no {kind} '{name}'; did you mean {choice}?")
    similar = difflib.get_close_matches(key_of_name, names, n=1)
    if similar:
        advice = f"did you mean {names[similar[0]]}?"
    elif not advice:
        advice = f"choose one of {', '.join(names.values())}."
    return UserError(f"there is no {kind} '{name[:200]}'; {advice}")


def missing_packages(purpose: str, *packages: str) -> UserError:
    """Return the error for `purpose` where its optional packages are not installed.

    It names the packages and not an extra, so that it is right for a wheel and for a clone.
    """
    return UserError(
        f"{purpose} needs {' and '.join(packages)}; run: pip install {' '.join(packages)}"
    )


class Preempted(Exception):
    """A signal asked the process to stop, and its last complete step is saved (exit code 75)."""


class Diverged(RuntimeError):
    """Training stopped, because too many steps in a row could not be applied (exit code 1)."""


class ComputedWrongly(RuntimeError):
    """Training stopped, because equal computations gave different bits (exit code 1).

    `step` is the number of the step that was computed.
    """

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


class LostRank(RuntimeError):
    """Training stopped, because another process ended or does not answer (exit code 1)."""
