"""Replacing files and folders in one step, on every system."""

import os
import sys
import time
from pathlib import Path

ATTEMPTS = 10
WAIT_SECONDS = 0.05


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target` in one step, as `os.replace` does.

    Windows refuses with PermissionError while another process, such as a virus scanner or a report,
    has either of them open; those open them for moments, so the rename is tried again for a while.
    """
    for attempt in range(ATTEMPTS):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if sys.platform != "win32" or attempt == ATTEMPTS - 1:
                raise
            time.sleep(WAIT_SECONDS * 2**attempt / 4)
