"""What new processes can use of the machine's memory, with and without limits of a container."""

import os
from pathlib import Path

import pytest

from anew.utils import memory
from anew.utils.memory import available_memory


def test_available_memory_is_a_part_of_the_machines() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total / 1000 < available_memory() <= total


def test_limits_of_the_control_groups_around_the_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7\n")
    monkeypatch.setattr(memory, "OWN_GROUP", own)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    group = tmp_path / "slurm" / "job_7"
    group.mkdir(parents=True)
    free = available_memory()
    for folder, limit in ((group, "max"), (group.parent, "50000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("30000000\n")
        (folder / "memory.stat").write_text("anon 20000000\ninactive_file 9000000\n")
    assert available_memory() == 29_000_000
    (group / "memory.max").write_text("35000000\n")
    assert available_memory() == 14_000_000
    (group / "memory.current").write_text("99000000\n")
    assert available_memory() == 0
    own.write_text("1:memory:/\n")
    assert free / 2 < available_memory() < 2 * free
