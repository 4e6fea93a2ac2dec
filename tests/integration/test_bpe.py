"""transformers reads the tokenizer files and gives the same ids."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from anew import Tokenizer
from tests.support import shared


def test_ids_of_real_text_equal_those_of_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.named("gpt2")
    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    text = shared("web_text/fineweb_edu_sample.txt").read_text(encoding="utf-8")[:200_000]
    ids = tokenizer.encode(text)
    assert other(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_saved_files_open_in_auto_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.named(name)
    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):\n\treturn 'é' + \"日本\"  # ok", " a  b ", "\r\n\x00"):
        ids = tokenizer.encode(text)
        assert other(text)["input_ids"] == ids
        assert other.decode(ids, clean_up_tokenization_spaces=False) == text
    assert other.eos_token_id == tokenizer.end_of_text
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert vocab["<|endoftext|>"] == tokenizer.end_of_text
