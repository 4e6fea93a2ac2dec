"""Shards: the format, the writer, and damage."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from anew import UserError
from anew.data import prepare, sources
from anew.data.holdout import Settings
from anew.data.shards import HEADER_BYTES, DataFolder, SplitWriter, read_header
from tests.support.data_folders import make_shards, shard_of


def test_shard_has_the_format_of_llm_c(tmp_path: Path) -> None:
    [shard] = make_shards(tmp_path, [1000])
    raw = shard.path.read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 1000]
    assert np.frombuffer(raw[1024:], "<u2").tolist() == list(range(1000))
    assert shard.tokens.tolist() == list(range(1000))


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file of Linux that always fails")
def test_failed_read_of_a_header_is_not_taken_for_a_short_file() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read_header(Path("/proc/self/mem"))


def test_split_writer_cuts_at_full_shards_and_loses_no_token(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", shard_tokens=100)
    documents = [np.arange(length, dtype=np.uint16) for length in (30, 250, 0, 1, 99)]
    for document in documents:
        writer.write(document)
    entries = writer.close()
    assert not list(tmp_path.glob("*.part"))
    assert [entry["tokens"] for entry in entries] == [100, 100, 100, 80]
    read = np.concatenate([shard_of(tmp_path, entry).tokens for entry in entries])
    assert np.array_equal(read, np.concatenate(documents))


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "magic", "version", "missing"])
def test_damaged_shard_is_refused_before_its_tokens_are_used(
    text_file: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "data"
    folder = prepare.prepare_data(sources.find(str(text_file)), Settings("bytes"), out)
    path = folder.splits["train"][0].path
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[HEADER_BYTES + 777] ^= 4
    elif damage == "truncate":
        raw = raw[:-2]
    elif damage == "grow":
        raw += b"\0\0"
    elif damage == "magic":
        raw[0] ^= 1
    elif damage == "version":
        raw[4] = 9
    path.write_bytes(raw)
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="prepare the data again"):
        _ = DataFolder.open(out).splits["train"][0].tokens
