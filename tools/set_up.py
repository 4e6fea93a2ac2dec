"""Make .venv and install the project into it, with its extras and what development needs.

    python3 tools/set_up.py                 # what `make setup` does
    python3 tools/set_up.py --without-dev   # to use the project, not to change it
    python3 tools/set_up.py sagemaker       # add another dependency group of pyproject.toml

pip compares every file with its hash in constraints.txt before it is installed or built.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOCKED = ["--constraint", "constraints.txt", "--build-constraint", "constraints.txt"]


def main() -> None:
    """Install everything, or the group that was named."""
    if not PYTHON.exists():
        make_venv()
    upgrade_pip()
    choice = "".join(sys.argv[1:])
    if choice not in ("", "--without-dev"):
        pip(*LOCKED, "--group", choice)
        return
    if not has_torch():
        install_cpu_build()
    requirements = VENV / "requirements.txt"
    requirements.write_text("\n".join(dependencies()), encoding="utf-8")
    group = "build" if choice else "dev"
    pip(*LOCKED, "--requirement", str(requirements), "--group", group)
    # Separately, because a folder has no hash. All that the build needs is installed by now.
    pip("--no-deps", "--no-build-isolation", "--editable", ".")


def make_venv() -> None:
    """Create .venv with this Python."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        sys.exit(f"anew needs Python 3.11 to 3.13, not {version}; use make PYTHON=python3.12")
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode:
        sys.exit("python's venv module is missing (Debian: apt-get install python3-venv)")


def pip(*arguments: str) -> None:
    """Run `pip install`, and end this process if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def upgrade_pip() -> None:
    """Install the pip of constraints.txt. Older ones cannot check hashes in constraints."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    [requirement] = re.findall(r"^pip==(?:.*\\\n)*.*", text, re.MULTILINE)
    file = VENV / "pip.txt"
    file.write_text(requirement, encoding="utf-8")
    pip("--require-hashes", "--requirement", str(file))


def install_cpu_build() -> None:
    """Install torch's CPU build where pip is configured to find it.

    It saves the gigabytes of NVIDIA's packages that PyPI's torch for Linux needs. pip would prefer
    PyPI's file, because only an index tells the hash of a file before it is downloaded.
    """
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    [version] = re.findall(r"^torch==([\w.]+)", text, re.MULTILINE)
    command = [str(PYTHON), "-m", "pip", "install", "--no-deps"]
    command += ["--constraint", "constraints.txt", f"torch=={version}+cpu"]
    subprocess.run(command, cwd=ROOT, capture_output=True)


def has_torch() -> bool:
    """Tell whether .venv has torch, perhaps for another CUDA version."""
    command = [str(PYTHON), "-m", "pip", "show", "torch"]
    return subprocess.run(command, capture_output=True).returncode == 0


def dependencies() -> list[str]:
    """Return the requirements of the project and of its extras."""
    import tomllib  # here, so that Python 3.10 reaches the message about its version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    found = {*project["dependencies"], *(line for extra in extras for line in extra)}
    return sorted(line for line in found if not line.startswith(f"{project['name']}["))


if __name__ == "__main__":
    main()
