"""The command line of `anew`, with one planned error.

ANEW_FAULT=RANK:STEP:MARKER raises RuntimeError in this rank before this step, once: the file MARKER
then exists, and a restarted run does not raise again.
"""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anew.cli.main import main
from anew.training import trainer
from anew.training.step import train_step


def train_step_or_raise(loss_function: Any, state: Any, *arguments: Any, **named: Any) -> Any:
    """Raise at the planned rank and step, and call the original `train_step` otherwise."""
    rank, step, marker = os.environ["ANEW_FAULT"].split(":", 2)
    is_planned = os.environ["RANK"] == rank and state.step == int(step)
    if is_planned and not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("a planned error")
    return train_step(loss_function, state, *arguments, **named)


if __name__ == "__main__":
    with patch.object(trainer, "train_step", train_step_or_raise):
        main()
