"""Add badges to the lessons that open them in Colab, Kaggle and Binder, for a repository on GitHub.

    python tools/badges.py OWNER/NAME         # then make notebooks, and commit
    python tools/badges.py OWNER/NAME --branch main

A badge needs the address of the repository, which this project does not state, because each fork
has its own. The badges are put under the title of each lesson. A cell that installs the package
where it is missing follows the introduction. Running this again replaces them.
"""

import argparse
import re
import sys
from pathlib import Path

LESSONS = Path(__file__).parents[1] / "notebooks"
SHIELD = "https://img.shields.io/badge/open_in-{name}-{colour}"
HOSTS = {
    "Colab": ("f9ab00", "https://colab.research.google.com/github/{repository}/blob/{path}"),
    "Kaggle": ("20beff", "https://kaggle.com/kernels/welcome?src={github}/blob/{path}"),
    "Binder": ("579aca", "https://mybinder.org/v2/gh/{repository}/{branch}?labpath={notebook}"),
}
INSTALL = """# %%
# On Colab, Kaggle and Binder, the package is installed here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("anew") is None:
    address = "git+{github}@{branch}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", address], check=True)

"""
BADGES_LINE = re.compile(r"# \[!\[open in Colab\]\(.*\n#\n")
INSTALL_CELL = re.compile(r"# %%\n# On Colab, Kaggle and Binder,(?:.*\n)*?\n(?=# %%)")


def badges(repository: str, branch: str, lesson: str) -> str:
    """Return the Markdown of the badges of one lesson."""
    notebook = f"notebooks/{lesson}.ipynb"
    links = []
    for name, (colour, address) in HOSTS.items():
        target = address.format(
            repository=repository,
            github=f"https://github.com/{repository}",
            branch=branch,
            path=f"{branch}/{notebook}",
            notebook=notebook,
        )
        links.append(f"[![open in {name}]({SHIELD.format(name=name, colour=colour)})]({target})")
    return " ".join(links)


def with_badges(source: str, repository: str, branch: str, lesson: str) -> str:
    """Return the source of a lesson with badges for `repository` and a cell that installs it."""
    source = INSTALL_CELL.sub("", BADGES_LINE.sub("", source))
    line = f"# {badges(repository, branch, lesson)}\n#\n"
    title = re.search(r"^# # .*\n#\n", source, re.MULTILINE)
    code = re.search(r"^# %%\n", source, re.MULTILINE)
    if title is None or code is None:
        sys.exit(f"{lesson} has no title or no code")
    install = INSTALL.format(github=f"https://github.com/{repository}", branch=branch)
    return (
        source[: title.end()]
        + line
        + source[title.end() : code.start()]
        + install
        + source[code.start() :]
    )


def main() -> None:
    """Write the badges into all lessons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="OWNER/NAME on GitHub")
    parser.add_argument("--branch", default="main")
    parser.add_argument("--folder", type=Path, default=LESSONS, help="the folder of the lessons")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repository):
        parser.error(f"{arguments.repository} is not OWNER/NAME")
    for path in sorted(arguments.folder.glob("[0-9]*.py")):
        source = path.read_text(encoding="utf-8")
        changed = with_badges(source, arguments.repository, arguments.branch, path.stem)
        path.write_text(changed, encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
