"""Write docs/pictures/lessons/NN.png: one picture of each lesson, for docs/lessons.md.

python tools/lesson_pictures.py

It is the richest picture of the executed notebook (the largest file), made smaller.
"""

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).parents[1]
SIZE = (300, 170)
COLOURS = 32


def pictures_of(notebook: Path) -> list[bytes]:
    """Return the PNG files in the outputs of a notebook."""
    found = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            content = output.get("data", {}).get("image/png")
            if content:
                found.append(base64.b64decode(content))
    return found


def main() -> None:
    """Write all pictures."""
    folder = ROOT / "docs" / "pictures" / "lessons"
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        picture = Image.open(io.BytesIO(max(pictures_of(notebook), key=len))).convert("RGB")
        picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
        picture.quantize(COLOURS).save(folder / f"{notebook.name[:2]}.png", optimize=True)


if __name__ == "__main__":
    main()
