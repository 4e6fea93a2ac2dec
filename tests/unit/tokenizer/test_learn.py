"""A learned vocabulary gives the ids that the tokenizers library gives with its file."""

from pathlib import Path

import pytest

from anew import Tokenizer, UserError
from anew.tokenizer.learn import learn
from tests.support.reviews import prepare_reviews, write_reviews


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def data(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a vocabulary of 1,000 ids learned from the reviews."""
    out = tmp_path_factory.mktemp("own") / "data"
    prepare_reviews(reviews, out)
    return out


def test_ids_equal_those_of_the_tokenizers_library(reviews: Path, data: Path) -> None:
    from tokenizers import Tokenizer as LibraryTokenizer

    own = Tokenizer.of_folder(data)
    assert own.n_vocab == 1000
    assert own.end_of_text == 999
    text = reviews.read_text(encoding="utf-8")
    other = LibraryTokenizer.from_file(str(data / "tokenizer.json"))
    for sample in (
        text[:200_000],
        "Zwölf Boxkämpfer\n\n  jagen\tEva 日本 !!!!!!!!!!!!!!!        end",
        "a" * 1000,
        " " * 77,
    ):
        assert own.encode(sample) == other.encode(sample).ids
        assert own.decode(own.encode(sample)) == sample
    assert len(own.encode(text)) < 0.6 * len(text.encode())


def test_files_of_a_learned_tokenizer_read_back_as_the_same(data: Path, tmp_path: Path) -> None:
    own = Tokenizer.of_folder(data)
    own.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()  # OpenAI's oldest folders have none.
    assert Tokenizer.of_folder(tmp_path).name == own.name


def test_short_text_is_refused_with_the_size_that_it_is_enough_for() -> None:
    documents = [b"the king and the ship and the king"] * 3
    with pytest.raises(
        UserError, match=r"vocabulary of (\d+), not of 5,000; use train:\1"
    ) as error:
        learn(documents, 5000)
    n_vocab = int(str(error.value).rpartition(":")[2].rstrip("."))
    assert learn(documents, n_vocab).n_vocab == n_vocab
