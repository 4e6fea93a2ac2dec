"""The repository as one archive, for machines that are to run it."""

import io
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("src", "launch", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


def archive() -> bytes:
    """The files that running needs, as they are in the working tree, as .tar.gz; what git ignores stays here."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PARTS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in filter(None, listed.split("\0")):
            tar.add(ROOT / name, arcname=name)
    return buffer.getvalue()
