"""The lessons run, offline, and the notebooks that are shipped are theirs, with outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_what_it_claims_holds(lesson: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "ANEW_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(lesson)],
        cwd=ROOT / "notebooks",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_the_notebook_is_the_lesson_executed(lesson: Path) -> None:
    import jupytext

    notebook = json.loads(lesson.with_suffix(".ipynb").read_text(encoding="utf-8"))
    shipped = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert shipped == [(cell.cell_type, cell.source) for cell in jupytext.read(lesson).cells], (
        "run notebooks/execute.py again"
    )
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture"
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "/tmp/" not in text, "no paths of the machine it was made on"
    source = "".join(source for _, source in shipped)
    assert "assert" in source
    assert "Exercises" in source
