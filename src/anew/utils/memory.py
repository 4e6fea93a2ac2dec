"""The memory of this machine: all of it, and what new processes can use."""

import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def machine_memory() -> int:
    """Return the bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def available_memory() -> int:
    """Return the bytes of memory that new processes can use; 0 where the system does not tell.

    On Linux, the limits of containers and jobs (control groups, version 2) are respected. On other
    systems, this is all memory of the machine.
    """
    return max(0, min([_free_memory(), *_left_in_groups()]))


def _free_memory() -> int:
    try:
        values = _fields(Path("/proc/meminfo"))
        return values["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return machine_memory()


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group around this process has left, where it has a limit.

    Files that were read and are no longer in use count as free, as in MemAvailable.
    """
    try:
        own = OWN_GROUP.read_text()
    except OSError:
        return
    path = own.partition("0::/")[2].partition("\n")[0]
    folder = CONTROL_GROUPS / path
    groups = [group for group in (folder, *folder.parents) if group.is_relative_to(CONTROL_GROUPS)]
    for group in groups:
        try:
            limit = int((group / "memory.max").read_text())  # "max" if there is none
            used = int((group / "memory.current").read_text())
            yield limit - used + _fields(group / "memory.stat").get("inactive_file", 0)
        except (OSError, ValueError):
            continue


def _fields(path: Path) -> dict[str, int]:
    """Return the first number of each line of a file of the kernel, by the line's first word."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
