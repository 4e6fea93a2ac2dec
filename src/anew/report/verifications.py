"""The results of `anew verify` in a run folder: RUN/verifications.jsonl, one JSON object a line.

append(run, step=500, checks=[{"name": "manifest", "status": "PASS", "detail": "..."}])
read(run)[-1]["checks"]
"""

import datetime
import json
from pathlib import Path
from typing import Any

import anew
from anew.errors import UserError
from anew.utils.files import json_lines

FILE = "verifications.jsonl"
FORMAT = 1  # of each line


def append(run: Path, step: int, checks: list[dict[str, Any]]) -> None:
    """Add the result for the checkpoint of `step`."""
    row = {
        "format": FORMAT,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "anew": anew.__version__,
        "checks": checks,
    }
    with (run / FILE).open("a", encoding="utf-8") as file:
        # A new line first, because a killed process may have left half a line.
        file.write("\n" + json.dumps(row))


def read(run: Path) -> list[dict[str, Any]]:
    """Return the results, oldest first; an empty list for a run that was never verified.

    Raises UserError for a line of a newer format.
    """
    path = run / FILE
    rows = list(json_lines(path)) if path.is_file() else []
    for row in rows:
        if row["format"] > FORMAT:
            raise UserError(
                f"{path} has format {row['format']}, and this version of anew reads formats up to "
                f"{FORMAT}; update anew."
            )
    return rows
