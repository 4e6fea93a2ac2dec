"""Run the fault-injection programme and print its table.

python -m tests.faults.programme                    # at CI's size, about four minutes on two cores
python -m tests.faults.programme --full --write     # the full one, into docs/reliability.md
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import files, runs
from tests.faults.common import Tally

ROOT = Path(__file__).parent.parent.parent
DOC = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

# The fault, how often in CI and in full, and what must hold.
PROGRAMME: dict[str, tuple[Callable[[int, random.Random, Path], Tally], int, int, str]] = {
    "kill-save": (
        files.kill_while_saving,
        200,
        1000,
        "0 corrupt loads, 0 acknowledged saves lost; the in-place control arm breaks half",
    ),
    "kill-torchrun": (
        runs.kill_torchrun,
        5,
        60,
        "0 steps lost beyond the last checkpoint; 0 differing bits in replayed losses",
    ),
    "chain": (runs.chain, 10, 50, "loss, rate, gradient norm, weights identical"),
    "world": (runs.change_world, 1, 10, "token ids identical; loss within 1e-6 relative"),
    "rank": (
        runs.lose_a_rank,
        4,
        80,
        "noticed within 5 s (stopped: timeout + grace), resumed, 0 orphans",
    ),
    "signals": (
        runs.signals,
        12,
        100,
        "last whole step saved every time, exit code 75, in less than 20 s",
    ),
    "disk": (files.full_disk, 10, 50, "previous checkpoint loads; named error"),
    "damage": (files.damage, 200, 1400, "100% detected, falls back"),
    "numbers": (runs.bad_numbers, 10, 50, "weights unchanged; ranks agree"),
    "malice": (files.malice, 15, 15, "nothing executed, nothing written outside"),
    "fuzz": (files.fuzz, 2000, 50_000, "only our error, < 200 MB, < 1 s"),
}


def run_one(name: str, full: bool, seed: int = 1) -> Tally:
    """One fault of the programme, in a folder of its own."""
    fault, small, large, _ = PROGRAMME[name]
    place = Path(tempfile.mkdtemp(prefix=f"fault-{name}-"))
    try:
        return fault(large if full else small, random.Random(seed), place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long run: up to 90 minutes")
    parser.add_argument("--only", default="", help=f"some of {', '.join(PROGRAMME)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOC.name}")
    a = parser.parse_args()
    lines = ["| fault | injected | must hold | held | seconds |", "|---|---|---|---|---|"]
    failed = False
    for name in filter(None, a.only.split(",")) if a.only else PROGRAMME:
        began = time.monotonic()
        tally = run_one(name, a.full, a.seed)
        title = (PROGRAMME[name][0].__doc__ or name).strip()
        held = tally.skipped or (f"**no**: {len(tally.failures)}" if tally.failures else "yes")
        facts = "".join(f"; {key} {value}" for key, value in tally.facts.items())
        lines.append(
            f"| {title} | {tally.runs:,} | {PROGRAMME[name][3]} | {held}{facts} | {time.monotonic() - began:.0f} |"
        )
        print(lines[-1], flush=True)
        for failure in tally.failures[:10]:
            print(f"    {failure}", file=sys.stderr)
        failed = failed or bool(tally.failures)
    if a.write:
        before, _, rest = DOC.read_text(encoding="utf-8").partition(BEGIN)
        DOC.write_text(
            before + "\n".join([BEGIN, *lines, END]) + rest.partition(END)[2], encoding="utf-8"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
