"""Real film reviews and a data folder with a vocabulary learned from them."""

import lzma
from itertools import islice
from pathlib import Path

from anew.data import prepare, sources
from anew.data.holdout import Settings
from tests.support import shared


def write_reviews(folder: Path) -> Path:
    """Write 400 film reviews, about half a megabyte, as a .jsonl file."""
    path = folder / "reviews.jsonl"
    with lzma.open(shared("corpus/imdb_reviews.jsonl.xz"), "rt", encoding="utf-8") as file:
        path.write_text("".join(islice(file, 400)), encoding="utf-8")
    return path


def prepare_reviews(reviews: Path, out: Path, workers: int = 1) -> None:
    """Prepare the reviews with a learned vocabulary of 1,000 ids."""
    settings = Settings("train:1000", val_tokens=5000)
    prepare.prepare_data(sources.find(str(reviews)), settings, out, workers=workers)
