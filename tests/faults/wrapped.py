"""`anew` with one planned accident: ANEW_FAULT=raise:RANK:STEP:MARKER raises once, in that rank before that step."""

import importlib
import os
from pathlib import Path
from typing import Any

from anew.cli.main import main

_, rank, at, marker = os.environ["ANEW_FAULT"].split(":", 3)
module = importlib.import_module("anew.training.trainer")
original = module.train_step


def raising(loss_of: Any, state: Any, *rest: Any) -> Any:
    if os.environ["RANK"] == rank and state.step == int(at) and not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("a planned accident")
    return original(loss_of, state, *rest)


if __name__ == "__main__":
    module.train_step = raising
    main()
