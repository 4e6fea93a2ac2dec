"""Which process of a distributed run this one is, before the processes have met."""

import os


def is_rank_0() -> bool:
    """Return whether this process prints and writes for all processes of a distributed run."""
    return os.environ.get("RANK", "0") == "0"
