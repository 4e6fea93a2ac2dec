"""The documentation builds without a warning: no link inside it leads nowhere, and every lesson is
in it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("myst_nb", reason="needs the docs extra")


def test_the_documentation_builds_and_its_pages_are_there(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "-q",
        "docs",
        str(tmp_path / "html"),
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {
        path.relative_to(tmp_path / "html").with_suffix("").as_posix()
        for path in (tmp_path / "html").rglob("*.html")
    }
    lessons = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert lessons | written <= pages
