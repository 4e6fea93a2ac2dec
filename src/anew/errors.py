"""The exceptions that the package raises on purpose.

Each one ends a command with its own exit code.
"""


class UserError(ValueError):
    """Something that the user can correct; the text says in one sentence what is wrong and what to
    do.

    The command line prints it without a traceback and exits with code 2. `on_every_rank` says that
    all processes of a distributed run raise the same error, so that only rank 0 prints it.
    """

    def __init__(self, text: str, on_every_rank: bool = False) -> None:
        super().__init__(text)
        self.on_every_rank = on_every_rank


class Preempted(Exception):
    """A signal asked the process to stop, and its last complete step is saved (exit code 75)."""


class Diverged(RuntimeError):
    """Too many steps in a row could not be applied, so training cannot continue (exit code 1)."""


class LostRank(RuntimeError):
    """Another process of the run has ended or does not answer, so this one cannot continue (exit
    code 1).
    """
