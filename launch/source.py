"""Pack the repository into one archive that a training machine can download and run."""

import io
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("src", "launch", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


def source_archive() -> bytes:
    """Return a .tar.gz of the files that training needs, as they are in the working tree.

    Files that git ignores are left out.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PATHS]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    names = listing.stdout.decode().split("\0")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            if name:  # git ends each name with a NUL byte
                tar.add(ROOT / name, arcname=name)
    return buffer.getvalue()
