"""Checkpoint folders of a run: write, verify, find the newest valid one, delete old ones.

    with write_checkpoint(run, step=500) as folder:  # creates RUN/checkpoints/step-00000500
        save_model(folder, model, tokenizer)
    folder, skipped = newest_valid(run)

`publish` makes a checkpoint durable, in this order:

1. Every file in the temporary folder is flushed to the disk (fsync).
2. `manifest.json`, with the SHA-256 and the size of every other file, is written last and flushed.
3. The temporary folder itself is flushed, so that the names of its files are on the disk.
4. The temporary folder is renamed to its final name.
5. The parent folder is flushed, so that the final name is on the disk.

A process that is killed at any moment leaves the earlier checkpoints intact and at most a
temporary folder, which `remove_leftovers` removes. A folder with a final name may still be damaged
later, so `newest_valid` verifies every file against the manifest and skips a checkpoint that
differs from it.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from anew.errors import UserError
from anew.utils.disk_errors import is_transient, with_retries
from anew.utils.files import flush_to_disk, parse_json, rename, sha256_of, temporary_name

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
STEP_PREFIX = "step-"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the checkpoint folder of a step: RUN/checkpoints/step-00000500."""
    return run / "checkpoints" / f"{STEP_PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder, read from its name."""
    return int(folder.name.removeprefix(STEP_PREFIX))


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without verifying them."""
    return sorted(
        path
        for path in (run / "checkpoints").glob(f"{STEP_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(STEP_PREFIX).isdigit()
    )


@contextlib.contextmanager
def write_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """Give a temporary folder, which becomes the checkpoint if the block ends without an error."""
    final = checkpoint_folder(run, step)
    temporary = temporary_name(final)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, final)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be written, earlier checkpoints are intact: "
            f"{error.strerror}",
            str(final),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Make a filled folder durable and give it its final name, as the module docstring says."""
    files = {}
    for path in sorted(temporary.iterdir()):
        flush_to_disk(path)
        files[path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    manifest = temporary / MANIFEST
    content = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=2) + "\n"
    manifest.write_text(content, encoding="utf-8")
    flush_to_disk(manifest)
    flush_to_disk(temporary)
    # A run that resumed before a damaged checkpoint has reached its step again, or the last flush
    # of an earlier attempt has failed.
    if final.exists():
        shutil.rmtree(final)
    rename(temporary, final)
    flush_to_disk(final.parent)


def verify(folder: Path) -> None:
    """Raise UserError, which names the file, if a file in `folder` does not match the manifest.

    Raises OSError if an error that may pass has not passed, which is no sign of damage.
    """
    with_retries(lambda: _verify(folder), folder)


def _verify(folder: Path) -> None:
    try:
        manifest = parse_json(folder / MANIFEST)
        files = {
            str(name): (entry["sha256"], entry["bytes"])
            for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise
        raise UserError(
            f"checkpoint {folder} is damaged: its {MANIFEST} cannot be read."
        ) from error
    for name, (sha256, size) in files.items():
        path = folder / Path(name).name  # A manifest cannot name files outside its folder.
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
            raise UserError(
                f"checkpoint {folder} is damaged: {name} is missing or does not match {MANIFEST}."
            )


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, and one message for each newer, damaged one."""
    skipped: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder)
        except UserError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def remove_leftovers(run: Path) -> list[str]:
    """Remove the temporary folders of killed processes and return their names."""
    leftovers = list((run / "checkpoints").glob(f".{STEP_PREFIX}*.tmp"))
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the `keep` newest valid checkpoints and those at multiples of `keep_every`.

    If `keep` is 0, nothing is deleted. A damaged checkpoint is not counted, so it never causes a
    valid one to be deleted.
    """
    if keep == 0:
        return
    n_valid = 0
    for folder in reversed(list_checkpoints(run)):
        if n_valid < keep:
            with contextlib.suppress(UserError):
                verify(folder)
                n_valid += 1
        elif keep_every == 0 or step_of(folder) % keep_every != 0:
            # Renamed first: if the process is killed while it deletes, a temporary folder is left,
            # which `remove_leftovers` removes, and not a damaged checkpoint.
            leftover = temporary_name(folder)
            with_retries(partial(rename, folder, leftover), folder)
            with_retries(partial(shutil.rmtree, leftover), leftover)
