"""Configuration of the documentation, whose pages are in Markdown.

`make docs` writes it to docs/_build and treats warnings as errors. The notebooks are shown with the
outputs that they are stored with.
"""

import shutil
from pathlib import Path

HERE = Path(__file__).parent
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, HERE / "notebooks")

project = "anew"
copyright = "the authors of anew"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # the notebooks are stored with outputs, and tests execute them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "anew"
