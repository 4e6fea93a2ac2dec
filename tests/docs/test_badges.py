"""The badges that open a lesson in Colab, Kaggle and Binder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.fixture
def lessons(tmp_path: Path) -> Path:
    for lesson in LESSONS:
        shutil.copy(lesson, tmp_path)
    return tmp_path


def add_badges(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/badges.py", *arguments, "--folder", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_lesson_gets_badges_and_a_cell_that_installs_the_package(lessons: Path) -> None:
    import jupytext

    done = add_badges(lessons, "someone/anew")
    assert done.returncode == 0, done.stderr
    for path in sorted(lessons.glob("*.py")):
        cells = jupytext.read(path).cells
        before = jupytext.read(ROOT / "notebooks" / path.name).cells
        assert len(cells) == len(before) + 1
        links = re.findall(r"\]\((https://[^)]*)\)", cells[0].source)
        assert f"/github/someone/anew/blob/main/notebooks/{path.stem}.ipynb" in links[1]
        assert sum(path.stem in link for link in links) == 3
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        assert "git+https://github.com/someone/anew@main" in code[0]
        exec(compile(code[0], path.name, "exec"), {})  # the package is here, so nothing happens


def test_adding_badges_again_replaces_them(lessons: Path) -> None:
    add_badges(lessons, "someone/anew")
    first = {path.name: path.read_text() for path in lessons.glob("*.py")}
    add_badges(lessons, "another/fork", "--branch", "dev")
    add_badges(lessons, "someone/anew")
    assert {path.name: path.read_text() for path in lessons.glob("*.py")} == first


def test_an_address_is_not_a_repository(lessons: Path) -> None:
    done = add_badges(lessons, "https://github.com/someone/anew")
    assert done.returncode == 2
    assert "is not OWNER/NAME" in done.stderr
