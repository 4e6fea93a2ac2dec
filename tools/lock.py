"""Write constraints.txt: a version and the hashes of every package that `make setup` may install.

    python tools/lock.py                            # after a change of pyproject.toml
    python tools/lock.py --upgrade                  # newest versions; then run `make check`
    python tools/lock.py --upgrade-package numpy    # arguments are those of `uv pip compile`

uv resolves the dependencies, extras and dependency groups of pyproject.toml for Linux, macOS and
Windows and Python 3.11.5 or newer, and keeps the versions that constraints.txt has. The hashes are
those of PyPI's files. On Linux its torch is for CUDA and needs NVIDIA's packages. PyTorch's CPU
build has the same version in another file, whose hash is added where pip finds that build.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
GROUPS = ("dev", "sagemaker", "build", "lock")
RESOLVE = (
    "--universal --python-version 3.11.5 --fork-strategy fewest --all-extras "
    "--generate-hashes --no-annotate --no-header"
)
HEADER = """\
# The versions and hashes of what `make setup` installs, on any platform. They were tested together
# on Python 3.11. `make lock` writes this file (tools/lock.py).
"""


def main() -> None:
    """Resolve the dependencies, and add the hash of torch's CPU build."""
    old_version, old_hashes = locked(CONSTRAINTS.read_text(encoding="utf-8"), "torch")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *RESOLVE.split()]
    for group in GROUPS:
        command += ["--group", group]
    command += ["pyproject.toml", "--output-file", str(CONSTRAINTS), *sys.argv[1:]]
    subprocess.run(command, cwd=ROOT, check=True)
    text = CONSTRAINTS.read_text(encoding="utf-8")
    version, hashes = locked(text, "torch")
    more = cpu_build_hashes(version)
    if version == old_version:
        more |= old_hashes
    if not more:
        print(f"torch {version}+cpu is not offered here; `make setup` will install PyPI's torch")
    line = f"torch=={version} \\\n"
    added = "".join(f"    --hash=sha256:{digest} \\\n" for digest in sorted(more - hashes))
    CONSTRAINTS.write_text(HEADER + text.replace(line, line + added), encoding="utf-8")


def locked(text: str, package: str) -> tuple[str, set[str]]:
    """Return the version and the hashes of a package in the text of constraints.txt."""
    pattern = rf"^{re.escape(package)}==([\w.]+)((?:.*\\\n)*.*)$"
    [(version, lines)] = re.findall(pattern, text, re.MULTILINE)
    return version, set(re.findall(r"sha256:(\w+)", lines))


def cpu_build_hashes(version: str) -> set[str]:
    """Return the sha256 of the CPU build's wheel for this machine, where pip finds one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", folder, f"torch=={version}+cpu"]
        subprocess.run(command, capture_output=True, check=False)
        wheels = Path(folder).glob("*.whl")
        return {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}


if __name__ == "__main__":
    main()
