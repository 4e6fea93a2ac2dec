"""Faults of storage: processes killed while they save, full disks and damaged files."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from anew import Config, UserError
from anew.checkpoint.folder import (
    list_checkpoints,
    newest_valid,
    prune,
    remove_leftovers,
    write_checkpoint,
)
from anew.data.dataset import open_data
from anew.data.shards import DataFolder
from anew.training.trainer import train
from tests.faults.common import FaultResult, saved_step, tiny

FORK = multiprocessing.get_context("fork")
FILE_SIZES = {"model.safetensors": 300_000, "optimizer.safetensors": 600_000}


# --- SIGKILL during a save ------------------------------------------------------------------------


def kill_during_save(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Kill a process that saves checkpoints, and verify what is on the disk after each kill.

    The control writes the same files in place. It has to break at least half of the time: otherwise
    the kills come at harmless moments and the test shows nothing.
    """
    result = FaultResult()
    run = scratch / "run"
    step = 1
    for _ in range(injections):
        acknowledged = _kill_writer(_save_checkpoints, run, step, rng)
        remove_leftovers(run)
        checkpoint, skipped = newest_valid(run)
        found = saved_step(checkpoint)
        result.check(not skipped, f"corrupt: {skipped}")
        result.check(
            found >= acknowledged, f"step {acknowledged} was acknowledged, the newest is {found}"
        )
        if checkpoint:
            is_complete = _read_files(checkpoint) == _content(found)
            result.check(is_complete, f"step {found} holds other bytes")
        step = found + 1
        result.injections += 1

    folder = scratch / "control"
    folder.mkdir()
    controls = max(20, injections // 5)
    broken = 0
    for i in range(controls):
        _kill_writer(_save_in_place, folder, 1000 * i + 1, rng)
        files = _read_files(folder)
        first_bytes = {content[0] for content in files.values() if content}
        broken += not any(files == _content(byte) for byte in first_bytes)
    result.measurements["broken in-place saves (control)"] = f"{broken} of {controls}"
    result.check(
        broken >= controls / 2,
        f"only {broken} of {controls} in-place saves are broken, so the control shows nothing",
    )
    return result


def _content(step: int) -> dict[str, bytes]:
    """Return the files of a step: one byte that depends on the step, repeated."""
    byte = bytes([step % 251])
    return {name: byte * size for name, size in FILE_SIZES.items()}


def _read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILE_SIZES}


def _kill_writer(
    write: Callable[[Path, int, int], None], folder: Path, first_step: int, rng: random.Random
) -> int:
    """Fork a process that saves, and kill it during its second save or later.

    Return the last step that the process has acknowledged through a pipe.
    """
    reader, writer = os.pipe()
    process = FORK.Process(target=write, args=(folder, first_step, writer))
    process.start()
    os.close(writer)
    acknowledged = int.from_bytes(os.read(reader, 4), "little")
    time.sleep(rng.random() * 0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    while message := os.read(reader, 4):
        acknowledged = int.from_bytes(message, "little")
    os.close(reader)
    return acknowledged


def _save_checkpoints(run: Path, first_step: int, acknowledge: int) -> None:
    """Save one checkpoint after the other with the product's functions."""
    for step in range(first_step, first_step + 1000):
        with write_checkpoint(run, step) as folder:
            for name, content in _content(step).items():
                (folder / name).write_bytes(content)
        os.write(acknowledge, step.to_bytes(4, "little"))
        prune(run, 2)


def _save_in_place(folder: Path, first_step: int, acknowledge: int) -> None:
    """Overwrite the same files again and again, as programs without atomic saves do."""
    for step in range(first_step, first_step + 1000):
        for name, content in _content(step).items():
            with (folder / name).open("wb") as file:
                for start in range(0, len(content), 4096):
                    file.write(content[start : start + 4096])
                file.flush()
                os.fsync(file.fileno())
        os.write(acknowledge, step.to_bytes(4, "little"))


# --- a full disk ----------------------------------------------------------------------------------


def full_disk(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Train on file systems from a quarter to two and a half times the size that a run needs."""
    result = FaultResult()
    reference = tiny(scratch / "reference", steps=12, save_every=3, keep=2)
    train(reference)
    run_bytes = sum(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())
    too_small = 0
    for i in range(injections):
        size = int(run_bytes * (0.25 + 2.25 * i / max(1, injections - 1)))
        disk = scratch / "disk"
        disk.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True)
        if mounted.returncode != 0:
            result.skip_reason = "this process may not mount a tmpfs"
            return result
        copy = reference.override(out=str(scratch / "copy"))
        try:
            message = _train_on_disk(result, reference.override(out=str(disk / "run")))
            too_small += message != ""
            ignore_lock = shutil.ignore_patterns(".lock")
            shutil.copytree(disk / "run", copy.folder, ignore=ignore_lock)
            train(copy)  # where there is space, the run continues to the same end
            _check_same_checkpoint(result, copy, reference, f"after a disk of {size} bytes")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(copy.folder, ignore_errors=True)
        result.injections += 1
    result.measurements["file systems that were too small"] = str(too_small)
    result.check(
        0 < too_small < injections,
        f"{too_small} of {injections} disks were too small, so the limit is not between them",
    )
    return result


def _train_on_disk(result: FaultResult, config: Config) -> str:
    """Train on a disk that may be too small. Return the text of the error, or ""."""
    message = ""
    try:
        train(config)
    except UserError as error:
        message = str(error)
    is_clear = not message or ("the disk of" in message and "is full" in message)
    result.check(is_clear, f"another error: {message}")
    _, skipped = newest_valid(config.folder)
    result.check(not skipped, f"a damaged checkpoint was published: {skipped}")
    return message


def _check_same_checkpoint(
    result: FaultResult, config: Config, reference: Config, when: str
) -> None:
    for name in FILE_SIZES:
        path = Path("checkpoints", "step-00000012", name)
        content = (config.folder / path).read_bytes()
        expected = (reference.folder / path).read_bytes()
        result.check(content == expected, f"{name} differs {when}")


# --- damaged files --------------------------------------------------------------------------------


def damaged_files(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Damage a file of the newest checkpoint or, every fourth time, a data shard."""
    result = FaultResult()
    config = tiny(scratch / "run", steps=10, save_every=5, keep=0)
    train(config)
    data = open_data(config.data.data, "bytes")
    for i in range(injections):
        if i % 4 == 3:
            copy = scratch / "data"
            shutil.copytree(data.path, copy, dirs_exist_ok=True)
            damage = _damage(copy / "train-00000.bin", rng)
            try:
                _ = DataFolder.open(copy).splits["train"][0].tokens
                result.check(False, f"not noticed: {damage}")
            except UserError:
                pass
        else:
            _damage_checkpoint(result, config, rng, with_manifest=i % 8 == 0)
        result.injections += 1
    return result


def _damage_checkpoint(
    result: FaultResult, config: Config, rng: random.Random, with_manifest: bool
) -> None:
    """Damage one file of the newest checkpoint, and check that the earlier one is used instead."""
    earlier, latest = list_checkpoints(config.folder)
    files = [path for path in latest.iterdir() if path.name != "manifest.json" or with_manifest]
    file = rng.choice(files)
    content = file.read_bytes()
    damage = _damage(file, rng)
    checkpoint, skipped = newest_valid(config.folder)
    # A manifest stays valid if only white space or a digit of its version number has changed.
    is_harmless = file.name == "manifest.json" and checkpoint == latest
    result.check(checkpoint == earlier or is_harmless, f"not noticed: {damage}")
    result.check(len(skipped) == 1 or is_harmless, f"not reported: {damage}")
    file.write_bytes(content)


def _damage(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut the file, append zeros or overwrite a stretch. Return a description."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "truncate", "zero", "grow"])
    position = rng.randrange(len(content))
    if kind == "flip":
        content[position] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[position:]
    elif kind == "grow":
        content += b"\0" * rng.randint(1, 100)
    else:
        end = min(len(content), position + rng.randint(1, 512))
        is_zero_already = not any(content[position:end])
        byte = b"\xff" if is_zero_already else b"\0"
        content[position:end] = byte * (end - position)
    path.write_bytes(bytes(content))
    return f"{kind} of {path.name} at {position}"
