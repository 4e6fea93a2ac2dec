"""Lessons to notebooks: runs each `NN_name.py` (jupytext's percent format) and writes `NN_name.ipynb` with its outputs.

.venv/bin/python notebooks/execute.py              # all of them, about two minutes
.venv/bin/python notebooks/execute.py 03 08        # some
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent


def execute(path: Path) -> NotebookNode:
    """The notebook of one lesson, executed; what differs from run to run (times, ids) is left out."""
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    ).execute()
    for n, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{n}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell["outputs"] = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]  # progress bars
    return notebook


def main() -> None:
    os.environ["ANEW_CACHE"] = tempfile.mkdtemp()
    wanted = sys.argv[1:]
    for path in sorted(HERE.glob("[0-9]*.py")):
        if not wanted or path.name[:2] in wanted:
            start = time.monotonic()
            jupytext.write(execute(path), path.with_suffix(".ipynb"), fmt="ipynb")
            seconds = time.monotonic() - start
            print(f"{path.with_suffix('.ipynb').name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
