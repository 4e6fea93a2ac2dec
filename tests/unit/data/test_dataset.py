"""Opening what `--data` names."""

import json
from pathlib import Path

import pytest

from anew import UserError
from anew.data.dataset import is_at_hand, open_data
from anew.data.prepare import PROGRESS
from anew.data.shards import INDEX


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"text": 3}\n', "line 1"),
        (
            '{"body": "ok", "id": 1}\n',
            r"one of its keys \(body\): anew prepare TEXT --column",
        ),
        ('["text"]\n', "line 1"),
    ],
)
def test_bad_file_is_refused_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        open_data(str(path), "bytes")


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
