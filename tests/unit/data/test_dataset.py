"""Opening what `--data` names."""

import json
from pathlib import Path

import pytest

from anew import UserError
from anew.config.schema import DataConfig
from anew.data.dataset import describe, is_at_hand, open_data
from anew.data.prepare import PROGRESS
from anew.data.shards import INDEX
from anew.tokenizer.bpe import Tokenizer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"text": 3}\n', "line 1"),
        (
            '{"body": "ok", "id": 1}\n',
            r"one of its keys \(body\): --column NAME",
        ),
        ('["text"]\n', "line 1"),
    ],
)
def test_bad_file_is_refused_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        open_data(str(path), "bytes")


def test_encoding_and_column_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.csv").write_bytes("body\ncaf\xe9\n".encode("latin-1") * 500)
    data = DataConfig(str(tmp_path / "a.csv"), "bytes", column="body", encoding="latin-1")
    folder = open_data(data.data, data.tokenizer, **data.reading)
    text = Tokenizer.named("bytes").decode(folder.splits["train"][0].tokens.tolist())
    assert "caf\xe9" in text
    assert describe(data.data, data.tokenizer, "", data.reading).endswith("1 file, 5,000 bytes")
    with pytest.raises(UserError, match="it is not in utf-8; name its encoding: --encoding"):
        open_data(data.data, data.tokenizer, column="body")


def test_column_of_a_dataset_of_the_hub_is_part_of_its_name() -> None:
    with pytest.raises(UserError, match="repo:config:split:column"):
        open_data("fineweb-edu", "gpt2", column="body")


def test_data_is_prepared_once_and_found_again(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    first = open_data(str(text_file), "gpt2")
    written = (first.path / "index.json").stat().st_mtime_ns
    second = open_data(str(text_file), "gpt2")
    assert (second.path / "index.json").stat().st_mtime_ns == written
    assert open_data(str(first.path), "gpt2").n_tokens("train") == first.n_tokens("train")
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        open_data(str(first.path), "bytes")
    with pytest.raises(UserError, match="no data 'nowhere'"):
        open_data("nowhere", "gpt2")


def test_dataset_of_the_hub_is_at_hand_only_when_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    assert is_at_hand("stdlib", "bytes")
    assert not is_at_hand("fineweb-edu", "gpt2")
    folder = tmp_path / "data" / "fineweb-edu-gpt2-0123456789ab"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(json.dumps({"revision": "0" * 40}))
    assert not is_at_hand("fineweb-edu", "gpt2"), "it is only begun"
    (folder / INDEX).write_text("{}")
    assert is_at_hand("fineweb-edu", "gpt2")
