"""Tokenizer files are written as OpenAI's and read back as the same tokenizer."""

import hashlib
import json
from pathlib import Path

import pytest

from anew import Tokenizer, UserError
from anew.tokenizer.files import contents

OWN = Tokenizer.of_words(
    [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("a", "n"), ("an", "d")]
)


def test_files_of_gpt2_are_those_of_openai() -> None:
    files = contents(Tokenizer.named("gpt2").vocabulary(), n_positions=1024)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert (
        hashes["merges.txt"] == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    )
    assert (
        hashes["vocab.json"] == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )


@pytest.mark.parametrize("tokenizer", [OWN, Tokenizer.named("bytes")], ids=["own", "bytes"])
def test_vocabulary_file_has_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert vocab["<|endoftext|>"] == tokenizer.end_of_text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_files_of_a_built_in_tokenizer_read_back_as_that_tokenizer(
    name: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.named(name)
    tokenizer.save(tmp_path)
    assert Tokenizer.of_folder(tmp_path) is tokenizer


def test_merges_written_as_pairs_read_back_as_the_same_tokenizer(tmp_path: Path) -> None:
    OWN.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = [merge.split(" ") for merge in raw["model"]["merges"]]
    path.write_text(json.dumps(raw))
    assert Tokenizer.of_folder(tmp_path).name == OWN.name


def test_folder_without_tokenizer_json_reads_back_as_the_same_tokenizer(tmp_path: Path) -> None:
    OWN.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()  # OpenAI's oldest folders have none.
    assert Tokenizer.of_folder(tmp_path).name == OWN.name


@pytest.mark.parametrize(
    "harm", ["order", "merge", "normalizer", "prefix", "special", "no json", "missing"]
)
def test_tokenizer_of_another_kind_is_refused(harm: str, tmp_path: Path) -> None:
    raw = json.loads(contents(OWN.vocabulary(), n_positions=1024)["tokenizer.json"])
    vocab = raw["model"]["vocab"]
    if harm == "order":
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    elif harm == "merge":
        raw["model"]["merges"][5] = "zzzz y"
    elif harm == "normalizer":
        raw["normalizer"] = {"type": "Lowercase"}
    elif harm == "prefix":
        raw["pre_tokenizer"]["add_prefix_space"] = True
    elif harm == "special":
        raw["added_tokens"].append({"id": OWN.n_vocab, "content": "<pad>"})
    if harm != "missing":
        content = "no json" if harm == "no json" else json.dumps(raw)
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer in"):
        Tokenizer.of_folder(tmp_path)
