"""Set-up of the documentation: pages in Markdown, notebooks as executed. `make docs` builds docs/_build, with warnings as errors."""

import shutil
from pathlib import Path

HERE = Path(__file__).parent
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, HERE / "notebooks")

project = "anew"
copyright = "the authors of anew"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # they are shipped executed, and the tests execute them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "anew"
