"""Run the fault-injection programme and print its table.

python -m tests.faults.programme                  # the short programme, six to nine minutes
python -m tests.faults.programme --full --write   # the full one, into docs/reliability.md
python -m tests.faults.programme --only signals --full --write    # one row of it

The times are for two cores.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults import (
    disk_errors,
    downloads,
    files,
    network,
    runs,
    server,
    timing,
    torchrun,
    untrusted,
)
from tests.faults.common import Fault, FaultResult
from tests.support import ROOT

PAGE = ROOT / "docs" / "reliability.md"
TABLE_START = "<!-- table -->"
TABLE_END = "<!-- end of table -->"
HEADER = [
    "| Fault | Injections | Requirement | Result | Seconds |",
    "|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Row:
    """One fault of the programme. It becomes one row of the table."""

    inject: Fault
    short: int  # injections in the short programme
    full: int  # injections in the full programme
    title: str
    requirement: str


PROGRAMME = {
    "kill-during-save": Row(
        files.kill_during_save,
        200,
        1000,
        "SIGKILL while a forked process saves checkpoints",
        "no corrupt checkpoint loads and no acknowledged save is lost; "
        "as a control, at least half of the saves that overwrite files in place are broken",
    ),
    "kill-torchrun": Row(
        torchrun.kill_torchrun,
        2,
        200,
        "SIGKILL of all processes or of one rank; torchrun with 2 processes",
        "no step before the last checkpoint is lost; the repeated losses are equal in every bit",
    ),
    "chained-resumes": Row(
        runs.chained_resumes,
        5,
        50,
        "Run stopped and resumed three times: at the end of a shard or an epoch, between "
        "micro-batches, during an evaluation; finished run started again",
        "loss, learning rate, gradient norm and weights are identical",
    ),
    "world-size": Row(
        runs.change_world_size,
        1,
        10,
        "Number of ranks changed from 2 to 1, 4 and 2",
        "token ids are identical; losses agree with one rank to a relative 1e-6",
    ),
    "lost-rank": Row(
        torchrun.lose_rank,
        4,
        80,
        "Rank killed, stopped (SIGSTOP) or raising an error; torchrun agent killed",
        "all ranks end within 6 s (after a stopped rank: 44 s, the timeout and torchrun's grace "
        "period); the run continues; no process is left over",
    ),
    "crash-rank": Row(
        torchrun.crash_rank,
        3,
        40,
        "Rank with a segmentation fault, an abort, an exception raised by another thread, or the "
        "interpreter's lock held for a minute",
        "all ranks end within 6 s (after a held lock: 44 s); a crash below Python shows its stack; "
        "the run continues; no process is left over",
    ),
    "network": Row(
        network.disturb_network,
        2,
        15,
        "Network between two machines with a rank each: 3% of the frames lost and 5 ms delay; "
        "cut for 3 s; cut for 10 s, longer than the run's timeout",
        "the run continues, after a long cut from its last checkpoint; losses and weights are "
        "identical",
    ),
    "slow-rank": Row(
        timing.slow_rank,
        1,
        10,
        "Rank whose forward passes take ten times as long",
        "the log names the rank and its machine; losses and weights are identical; as a control, "
        "equally slow ranks are not named",
    ),
    "jumping-clock": Row(
        timing.jump_clock,
        1,
        20,
        "Wall clock that jumps by up to ten years, three times a second",
        "durations and saves follow the monotonic clock; losses and weights are identical",
    ),
    "signals": Row(
        runs.signals,
        6,
        100,
        "SIGTERM, SIGUSR1, SIGINT or two SIGTERM in each phase of a run",
        "the last complete step is saved and the exit code is 75 (before the first step: the "
        "process "
        "ends as usual), within 20 s",
    ),
    "full-disk": Row(
        files.full_disk,
        10,
        50,
        "Full disk (tmpfs of increasing size)",
        "the error message names the full disk; the previous checkpoint loads; "
        "with more space the run ends with identical weights",
    ),
    "transient-errors": Row(
        disk_errors.transient_errors,
        20,
        300,
        "EIO, ESTALE, ETIMEDOUT, EAGAIN or EINTR in up to four successive calls of open, read, "
        "write, fsync and rename, in each save, in logs and in a data shard",
        "the run continues, and losses and weights are identical; as controls, one attempt, an "
        "error that stays and a full quota end the run in one sentence, with the previous "
        "checkpoint intact",
    ),
    "cut-downloads": Row(
        downloads.cut_downloads,
        20,
        200,
        "Connection closed at a random byte of a download, with and without an announced length",
        "the download continues; every prepared file has the bytes of an undisturbed preparation; "
        "as a control, one attempt is not enough",
    ),
    "damaged-files": Row(
        files.damaged_files,
        200,
        1400,
        "Bytes flipped, cut off, zeroed or appended in a checkpoint or a data shard",
        "all damage is detected; the previous checkpoint is used",
    ),
    "bad-losses": Row(
        runs.bad_losses,
        3,
        50,
        "NaN or infinite loss on one rank; loss ten times too large",
        "the step changes no weight; all ranks take the same decision",
    ),
    "malicious-files": Row(
        untrusted.malicious_files,
        15,
        15,
        "Malicious pickles and archives (`.pt`, DCP metadata, `.npy`, paths that lead outside, "
        "decompression bombs)",
        "every file is refused; nothing is executed or written outside",
    ),
    "hostile-requests": Row(
        server.hostile_requests,
        500,
        10_000,
        "Hostile requests to `anew serve`: random bodies, half a request, a byte at a time, "
        "headers of 10 MB, other hosts and paths, clients that leave or do not read",
        "no server error; the page can be used meanwhile; connections and threads are released, "
        "and memory grows by less than 20 MB from the middle to the end; as a control, uvicorn's "
        "own connections make the page unusable",
    ),
    "fuzzed-headers": Row(
        untrusted.fuzzed_headers,
        2000,
        50_000,
        "Random changes in file headers and configurations",
        "no exception other than UserError; memory grows by less than 200 MB; "
        "each file takes less than 1 s",
    ),
}


def run_fault(name: str, is_full: bool, seed: int = 1) -> FaultResult:
    """Inject one fault of the programme, in a temporary folder."""
    row = PROGRAMME[name]
    injections = row.full if is_full else row.short
    scratch = Path(tempfile.mkdtemp(prefix=f"fault-{name}-"))
    try:
        return row.inject(injections, random.Random(seed), scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table_row(row: Row, result: FaultResult, seconds: float) -> str:
    """Return one row of the table in Markdown."""
    if result.skip_reason:
        outcome = f"skipped: {result.skip_reason}"
    elif result.failures:
        outcome = f"**{len(result.failures)} failures**"
    else:
        outcome = "passed"
    for name, value in result.measurements.items():
        outcome += f"; {name}: {value}"
    cells = [row.title, f"{result.injections:,}", row.requirement, outcome, f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the programme from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the full programme: three hours")
    parser.add_argument("--only", default="", help=f"some of {','.join(PROGRAMME)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(PROGRAMME)
    rows = []
    has_failed = False
    for name in names:
        start = time.monotonic()
        result = run_fault(name, arguments.full, arguments.seed)
        rows.append(table_row(PROGRAMME[name], result, time.monotonic() - start))
        print(rows[-1], flush=True)
        for failure in result.failures[:10]:
            print(f"    {failure}", file=sys.stderr)
        has_failed = has_failed or bool(result.failures)
    if arguments.write:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    sys.exit(1 if has_failed else 0)


def with_rows(page: str, rows: list[str]) -> str:
    """Return the page with these rows in its table; rows of other faults stay as they are."""
    before, _, rest = page.partition(TABLE_START)
    table, _, after = rest.partition(TABLE_END)
    titles = {f"| {row.title} |": name for name, row in PROGRAMME.items()}
    by_name = {}
    for line in [*table.splitlines(), *rows]:
        title = line[: line.find(" |") + 2]
        if title in titles:
            by_name[titles[title]] = line
    ordered = [by_name[name] for name in PROGRAMME if name in by_name]
    return before + "\n".join([TABLE_START, *HEADER, *ordered, TABLE_END]) + after


if __name__ == "__main__":
    main()
