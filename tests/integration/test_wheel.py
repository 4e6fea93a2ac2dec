"""The wheel works in a folder that is not a clone of the repository."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from importlib.metadata import distributions as metadata_of
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from anew import __version__
from tests.support import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("*.whl")
    return path


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "anew").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert expected <= set(names)
    assert "Requires-Dist: torch" in metadata
    assert "Author: The anew authors" in metadata


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_wheel_and_its_dependencies_alone_train_and_sample_in_an_empty_folder(
    wheel: Path, tmp_path: Path
) -> None:
    """A package that pyproject.toml does not declare cannot be imported in this environment."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    [site] = (venv / "lib").glob("python*/site-packages")
    link_dependencies(site)
    here = tmp_path / "here"
    here.mkdir()
    environment = os.environ | {"ANEW_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    anew = venv / "bin" / "anew"
    assert run(anew, "--version") == f"anew {__version__}\n"
    assert run(python, "-c", "import anew; print(anew.__file__)").startswith(str(site))
    assert "validation loss" in run(anew, "train", "demo", "--steps", "4")
    assert "import os" in run(
        anew, "sample", "runs/demo", "--prompt", "import os", "--tokens", "20"
    )
    assert (here / "runs" / "demo" / "report.html").is_file()
    missing = subprocess.run(
        [anew, "serve", "runs/demo"], cwd=here, env=environment, capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert "pip install fastapi uvicorn" in missing.stderr


def link_dependencies(site: Path) -> None:
    """Link the packages that the wheel in `site` requires, directly or not, from this Python."""
    [metadata] = metadata_of(path=[str(site)])
    waiting = [Requirement(text) for text in metadata.requires or []]
    linked = set()
    while waiting:
        requirement = waiting.pop()
        extras = ["", *requirement.extras]
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(requirement.name)
        if name in linked:
            continue
        linked.add(name)
        package = distribution(name)
        waiting += [Requirement(text) for text in package.requires or []]
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(package.locate_file(top)))
