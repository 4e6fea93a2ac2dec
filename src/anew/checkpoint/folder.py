"""One step folder, whole or not at all: write, verify, find the newest good one, prune.

    with checkpoint.writing(run, step=500) as folder:       # RUN/checkpoints/step-00000500 appears when the block ends
        weights.save_model(folder, model, tokenizer)
    folder, skipped = checkpoint.newest(run)

What is written goes to a temporary folder on the same file system; each file is flushed to disk, `manifest.json` (sha256 and size of
every other file) comes last, then one rename. A kill at any moment leaves the old checkpoints and at most a leftover that
`clean` removes. Reading trusts nothing: a file whose hash differs makes the checkpoint bad, and the one before is taken.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from anew.errors import UserError
from anew.utils.files import flush_to_disk, rename, sha256_of

MANIFEST = "manifest.json"


def folder_of(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00000500."""
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[Path]:
    """The step folders of a run, oldest first, verified or not."""
    return sorted(
        p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdigit()
    )


@contextlib.contextmanager
def writing(run: Path, step: int) -> Iterator[Path]:
    """A temporary folder to fill; it becomes the checkpoint of `step` when the block ends without an error."""
    final = folder_of(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, final)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be written, earlier ones are intact: {error.strerror}",
            str(final),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Hash and flush every file, write the manifest, rename."""
    files = {}
    for path in sorted(temporary.iterdir()):
        flush_to_disk(path)
        files[path.name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    manifest = temporary / MANIFEST
    manifest.write_text(
        json.dumps({"version": 1, "files": files}, indent=2) + "\n", encoding="utf-8"
    )
    flush_to_disk(manifest)
    flush_to_disk(temporary)
    if final.exists():  # a resumed run reached the step of a broken checkpoint again
        shutil.rmtree(final)
    rename(temporary, final)
    flush_to_disk(final.parent)


def verify(folder: Path) -> None:
    """UserError names the file if anything in `folder` is not what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): (entry["sha256"], entry["bytes"])
            for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {folder} is damaged: its {MANIFEST} cannot be read; use an earlier checkpoint."
        ) from error
    for name, (sha256, size) in files.items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
            raise UserError(
                f"checkpoint {folder} is damaged: {name} is missing or not what its {MANIFEST} says; use an earlier checkpoint."
            )


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verifies, and a line for each newer one that did not."""
    skipped: list[str] = []
    for folder in reversed(steps(run)):
        try:
            verify(folder)
            return folder, skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def clean(run: Path) -> list[str]:
    """Remove what killed writers left behind; the names removed."""
    leftovers = list((run / "checkpoints").glob(".step-*.tmp"))
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Keep the `keep` newest checkpoints that verify (0: all), and each whose step is a multiple of `keep_every`.

    A damaged one does not count and is never the reason to drop a good one.
    """
    good = 0
    for folder in reversed(steps(run)) if keep else []:
        if good >= keep:
            if keep_every and int(folder.name[5:]) % keep_every == 0:
                continue
            leftover = folder.with_name(
                f".{folder.name}.tmp"
            )  # killed half-way this is for `clean`, and not a damaged checkpoint
            rename(folder, leftover)
            shutil.rmtree(leftover)
            continue
        with contextlib.suppress(UserError):
            verify(folder)
            good += 1
