"""What a process and its children use, read from /proc."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What a process and its children use at one moment."""

    memory_mb: float  # anonymous: without files, whose pages other processes may share
    descriptors: float
    threads: float


def usage_of(pid: int) -> Usage:
    """Return what a process and its children use. Raises OSError if the process has ended."""
    usages = [_usage_without_children(pid)]
    for child in children_of(pid):
        with contextlib.suppress(OSError):  # it may have ended
            usages.append(_usage_without_children(child))
    return Usage(
        memory_mb=sum(usage.memory_mb for usage in usages),
        descriptors=sum(usage.descriptors for usage in usages),
        threads=sum(usage.threads for usage in usages),
    )


def _usage_without_children(pid: int) -> Usage:
    folder = Path(f"/proc/{pid}")
    lines = (folder / "smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Anonymous:")]
    if not kilobytes:
        raise ProcessLookupError(f"process {pid} has ended")
    return Usage(
        memory_mb=kilobytes[0] / 1024,
        descriptors=len(list((folder / "fd").iterdir())),
        threads=len(list((folder / "task").iterdir())),
    )


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children_of(int(child))]
    return found


def server_process() -> int:
    """Return the process id of the `anew serve` that this process has started."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(os.getpid())}
    [pid] = [pid for pid, command in commands.items() if b"\0serve\0" in command]
    return pid
