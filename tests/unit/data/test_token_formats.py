"""Token files of other projects keep the tokenizer with which they were made."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from anew import Tokenizer, UserError
from anew.data import prepare, sources
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.data.shards import DataFolder
from anew.data.token_formats import FORMATS, open_others, write_others
from tests.support.data_folders import tokens_of

LEARNT = "train:300"


@pytest.fixture(scope="module")
def folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A text in tokens of a vocabulary that was learnt from it."""
    out = tmp_path_factory.mktemp("learnt") / "data"
    return prepare.prepare_data(sources.find(str(text_file)), Settings(LEARNT), out)


@pytest.mark.parametrize("to", FORMATS)
def test_own_vocabulary_goes_with_the_tokens(folder: DataFolder, to: str, tmp_path: Path) -> None:
    write_others(folder, to, tmp_path / "other")
    other = open_others(tmp_path / "other")
    assert other is not None
    assert other.tokenizer == folder.tokenizer != "gpt2"
    assert np.array_equal(tokens_of(other, "train"), tokens_of(folder, "train"))
    assert open_data(str(tmp_path / "other"), LEARNT).tokenizer == folder.tokenizer
    with pytest.raises(UserError, match="this run uses gpt2; add --tokenizer"):
        open_data(str(tmp_path / "other"), "gpt2")


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_built_in_tokenizers_are_known_again(
    tokenizer: str, text_file: Path, tmp_path: Path
) -> None:
    source = sources.find(str(text_file))
    folder = prepare.prepare_data(source, Settings(tokenizer), tmp_path / "data")
    write_others(folder, "nanogpt", tmp_path / "other")
    assert open_data(str(tmp_path / "other"), tokenizer).tokenizer == tokenizer


def test_vocabulary_of_nanogpt_is_not_taken_for_gpt2s(tmp_path: Path) -> None:
    np.arange(65, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65}))
    with pytest.raises(UserError, match=r"has a vocabulary of nanoGPT \(meta\.pkl\)"):
        open_data(str(tmp_path), "gpt2")


def test_text_with_other_tokens_than_the_model_is_to_be_prepared_again(folder: DataFolder) -> None:
    with pytest.raises(UserError, match=r"MODEL has bytes; .* --tokenizer bytes --out NEW"):
        open_data(str(folder.path), "bytes", model="MODEL")
    learnt = Tokenizer.of_folder(folder.path)
    with pytest.raises(UserError, match=r"'my model' --out NEW"):
        open_data(str(folder.path), Tokenizer.of_words([("h", "e")]), model="my model")
    assert open_data(str(folder.path), learnt, model="my model").tokenizer == learnt.name
