"""Checkpoint folders are complete or absent, and damage is found."""

from collections.abc import Callable
from pathlib import Path

import pytest

from anew import UserError
from anew.checkpoint.folder import (
    checkpoint_folder,
    list_checkpoints,
    newest_valid,
    prune,
    verify,
    write_checkpoint,
)
from anew.utils.files import flush_to_disk, rename


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    with write_checkpoint(run, step) as folder:
        (folder / "model").write_bytes(content)
    return checkpoint_folder(run, step)


def test_newest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (1, 20, 3):
        write(tmp_path, step)
    found, skipped = newest_valid(tmp_path)
    assert found is not None
    assert found.name == "step-00000020"
    assert skipped == []


def test_newest_of_a_run_without_checkpoints_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing") == (None, [])


@pytest.mark.guarantee("durable")
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest", "manifest gone"])
def test_damaged_checkpoint_is_named_and_skipped(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2, b"x" * 1000)
    model = folder / "model"
    if harm == "flip":
        raw = bytearray(model.read_bytes())
        raw[500] ^= 1
        model.write_bytes(raw)
    elif harm == "truncate":
        model.write_bytes(model.read_bytes()[:-1])
    elif harm == "delete":
        model.unlink()
    elif harm == "manifest":
        (folder / "manifest.json").write_text('{"files": 3}')
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"damaged: .*(model|manifest)"):
        verify(folder)
    found, skipped = newest_valid(tmp_path)
    assert found == checkpoint_folder(tmp_path, 1)
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_prune_counts_only_valid_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    (checkpoint_folder(tmp_path, 5) / "model").write_bytes(b"broken!")
    prune(tmp_path, 2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "4", "5"]
    prune(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 3


def test_prune_keeps_multiples_of_keep_every(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step)
    prune(tmp_path, 1, keep_every=3)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "6", "7"]


def test_error_while_writing_leaves_earlier_checkpoints_and_no_temporary_folder(
    tmp_path: Path,
) -> None:
    write(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), write_checkpoint(tmp_path, 2) as folder:
        (folder / "model").write_bytes(b"half")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_publish_flushes_the_files_before_the_rename_and_the_parent_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(action: str, function: Callable[..., None]) -> None:
        def recorded(path: Path, *rest: Path) -> None:
            calls.append((action, path.name))
            function(path, *rest)

        monkeypatch.setattr(f"anew.checkpoint.folder.{function.__name__}", recorded)

    record("flush", flush_to_disk)
    record("rename", rename)
    write(tmp_path, 1)
    temporary = ".step-00000001.tmp"
    assert calls == [
        ("flush", "model"),
        ("flush", "manifest.json"),
        ("flush", temporary),
        ("rename", temporary),
        ("flush", "checkpoints"),
    ]


def test_writing_a_step_again_replaces_the_damaged_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "model").write_bytes(b"broken!")
    write(tmp_path, 1, b"whole")
    verify(folder)
    assert (folder / "model").read_bytes() == b"whole"
