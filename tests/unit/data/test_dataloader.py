"""Shards, sources, preparation and batches: nothing is lost, nothing depends on how the work is divided."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import Tokenizer, UserError
from anew.data import prepare, sources
from anew.data.dataloader import Batches, evaluation_windows, permute, prefetch
from anew.data.dataset import open_data
from anew.data.shards import HEADER_BYTES, DataFolder, Shard, SplitWriter
from anew.utils.files import sha256_of

GPT2, BYTES = Tokenizer.named("gpt2"), Tokenizer.named("bytes")


def make_shards(folder: Path, lengths: list[int]) -> list[Shard]:
    """Shards holding 0, 1, 2 ... across all of them."""
    made, start = [], 0
    for i, n in enumerate(lengths):
        writer = SplitWriter(folder, f"part{i}")
        writer.write(np.arange(start, start + n, dtype=np.uint16))
        [entry] = writer.close()
        made.append(Shard(folder / str(entry["name"]), n, str(entry["sha256"])))
        start += n
    return made


# --- shards


def test_a_shard_is_a_file_of_llm_c(tmp_path: Path) -> None:
    [shard] = make_shards(tmp_path, [1000])
    raw = shard.path.read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 1000]
    assert np.frombuffer(raw[1024:], "<u2").tolist() == list(range(1000))
    assert shard.tokens.tolist() == list(range(1000))


def test_a_split_is_cut_where_the_shard_is_full_and_loses_nothing(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", shard_tokens=100)
    documents = [np.arange(n, dtype=np.uint16) for n in (30, 250, 0, 1, 99)]
    for document in documents:
        writer.write(document)
    entries = writer.close()
    assert not list(tmp_path.glob("*.part"))
    assert [e["tokens"] for e in entries] == [100, 100, 100, 80]
    read = np.concatenate(
        [
            Shard(tmp_path / str(e["name"]), int(str(e["tokens"])), str(e["sha256"])).tokens
            for e in entries
        ]
    )
    assert np.array_equal(read, np.concatenate(documents))


def prepared(text_file: Path, out: Path, tokenizer: Tokenizer = BYTES) -> DataFolder:
    return prepare.prepare(sources.find(str(text_file)), prepare.Settings(tokenizer.name), out)


@pytest.mark.parametrize("harm", ["flip", "truncate", "grow", "magic", "version", "missing"])
def test_a_damaged_shard_is_refused_before_its_tokens_are_used(
    text_file: Path, tmp_path: Path, harm: str
) -> None:
    folder = prepared(text_file, tmp_path / "data")
    path = folder.splits["train"][0].path
    raw = bytearray(path.read_bytes())
    if harm == "flip":
        raw[HEADER_BYTES + 777] ^= 4
    elif harm == "truncate":
        raw = raw[:-2]
    elif harm == "grow":
        raw += b"\0\0"
    elif harm == "magic":
        raw[0] ^= 1
    elif harm == "version":
        raw[4] = 9
    path.unlink() if harm == "missing" else path.write_bytes(raw)
    with pytest.raises(UserError, match="prepare the data again"):
        _ = DataFolder.open(tmp_path / "data").splits["train"][0].tokens


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["version", "dtype", "shards", "tokenizer", "source", "revision",
                     "name", "tokens", "sha256", "split"]), inner, max_size=6)))  # fmt: skip
def test_any_other_index_is_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        DataFolder.open(folder)


# --- sources and preparation


def test_split_of_a_single_file_is_by_position(text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text()
    folder = prepared(text_file, tmp_path / "data")
    train, val = (folder.splits[s][0].tokens.tolist() for s in ("train", "val"))
    assert train[0] == val[0] == BYTES.end_of_text
    assert BYTES.decode(train[1:]) == text[: len(text) * 9 // 10]
    assert BYTES.decode(val[1:]) == text[len(text) * 9 // 10 :]


def test_split_of_documents_is_by_their_own_hash(tmp_path: Path) -> None:
    documents = [f"document {i} " * (i % 5 + 1) for i in range(200)]
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    folder = prepared(path, tmp_path / "data")
    held_out = set(_documents(folder, "val"))
    assert sorted([*_documents(folder, "val"), *_documents(folder, "train")]) == sorted(documents)
    assert 5 < len(held_out) < 40
    path.write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in ["another", *reversed(documents)])
    )
    assert held_out <= set(_documents(prepared(path, tmp_path / "again"), "val"))


def _documents(folder: DataFolder, split: str) -> list[str]:
    tokens = np.concatenate([s.tokens for s in folder.splits[split]]).tolist()
    return BYTES.decode(tokens).split("<|endoftext|>")[1:]


def test_two_documents_still_give_a_validation_split(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    folder = prepared(tmp_path, tmp_path / "data")
    assert len(_documents(folder, "train")) == len(_documents(folder, "val")) == 1


def test_stdlib_is_real_text_on_every_machine() -> None:
    source = sources.find("stdlib")
    names = {p.name for p in source.files}
    assert {"argparse.py", "dataclasses.py", "json"} & names
    assert sum(map(len, source.documents())) > 5_000_000
    assert source.files == sources.find("stdlib").files


def test_folder_skips_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    (tmp_path / "invalid.txt").write_bytes(b"\xff\xfe caf\xe9")
    assert [p.name for p in sources.find(str(tmp_path)).files] == ["a.txt", "invalid.txt"]
    assert [p.name for p in sources.find(str(tmp_path / "*.txt")).files] == ["a.txt", "invalid.txt"]
    folder = prepared(tmp_path, tmp_path / "data", GPT2)
    assert folder.n_tokens("train") + folder.n_tokens("val") > 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"text": 3}\n', "line 1"),
        ('{"text": "ok"}\nnot json\n', "line 2"),
        ('["text"]\n', "line 1"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        open_data(str(path), "bytes")


def test_data_is_prepared_once_and_found_again(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    first = open_data(str(text_file), "gpt2")
    stamp = (first.path / "index.json").stat().st_mtime_ns
    second = open_data(str(text_file), "gpt2")
    assert (second.path / "index.json").stat().st_mtime_ns == stamp
    assert open_data(str(first.path), "gpt2").n_tokens("train") == first.n_tokens("train")
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        open_data(str(first.path), "bytes")
    with pytest.raises(UserError, match="no data at 'nowhere'"):
        open_data("nowhere", "gpt2")


# --- batches


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_permute_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(n), n, (seed, epoch))
    assert np.array_equal(np.sort(image), np.arange(n))
    half = permute(np.arange(n // 2, n), n, (seed, epoch))
    assert np.array_equal(half, image[n // 2 :])


def test_permute_shuffles_and_keys_differ() -> None:
    a, b = permute(np.arange(10_000), 10_000, (1, 0)), permute(np.arange(10_000), 10_000, (1, 1))
    for image in (a, b):
        assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
        assert np.mean(np.abs(np.diff(image)) == 1) < 0.01
    assert np.mean(a == b) < 0.01


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_an_epoch_reads_every_window_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], T: int, seed: int, recut: bool
) -> None:
    made = make_shards(tmp_path_factory.mktemp("shards"), lengths)
    windows = sum((n - 1) // T for n in lengths)
    if windows == 0:
        with pytest.raises(UserError, match="too short"):
            Batches(made, T, seed)
        return
    batches = Batches(made, T, seed, recut=recut)
    for epoch, shift in enumerate([0, int(0.618 * T), int(0.236 * T)] if recut else [0, 0, 0]):
        starts = [
            (s, min(w * T + shift, s.n_tokens - 1 - T))
            for s in made
            for w in range((s.n_tokens - 1) // T)
        ]
        rows = batches.rows(epoch * windows, windows).tolist()
        assert sorted(rows) == sorted(
            s.tokens[start : start + T + 1].tolist() for s, start in starts
        )
    first = batches.rows(0, windows)[:, 0]
    boundaries = np.cumsum(lengths)
    owners = np.searchsorted(boundaries, first, side="right")
    assert (np.diff(owners) >= 0).all()  # the first epoch goes through the shards in source order


def test_a_token_that_comes_again_has_another_context(tmp_path: Path) -> None:
    batches = Batches(make_shards(tmp_path, [1025, 2048]), 64, seed=3)
    places = {}  # of a token's number: where in its window it stood, in each of ten epochs
    for epoch in range(10):
        for row in batches.rows(epoch * batches.epoch_sequences, batches.epoch_sequences):
            for place, token in enumerate(row[:-1]):
                places.setdefault(int(token), []).append(place)
    inside = [stood for token, stood in places.items() if 64 <= token < 960]
    assert {len(stood) for stood in inside} == {10}, (
        "each token of a shard's inside is an input once an epoch"
    )
    assert all(len(set(stood)) == 10 for stood in inside), (
        "and never twice at the same distance from its window's start"
    )
    assert all(max(np.diff([0, *sorted(stood), 63])) <= 12 for stood in inside), (
        "its places are spread evenly"
    )


def test_batches_do_not_depend_on_how_they_are_divided(tmp_path: Path) -> None:
    batches = Batches(make_shards(tmp_path, [700, 301, 55]), 8, seed=3)
    whole = batches.rows(0, 400)
    for parts in (1, 2, 5, 8):
        pieces = [batches.rows(first, 400 // parts) for first in range(0, 400, 400 // parts)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(whole, Batches(batches.shards, 8, seed=4).rows(0, 400))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 70), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(2, 200),
)
def test_every_validation_token_is_scored_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], T: int, batch: int, limit: int
) -> None:
    made = make_shards(tmp_path_factory.mktemp("val"), lengths)
    scored: list[int] = []
    for inputs, targets in evaluation_windows(made, T, limit, batch):
        assert inputs.shape == targets.shape
        assert len(inputs) <= batch
        keep = targets != -100
        assert (targets[keep] == inputs[keep] + 1).all()
        scored += targets[keep].tolist()
    stream, expected, left = 0, [], limit
    for n in lengths:
        expected += list(range(stream + 1, stream + min(n, left)))
        stream, left = stream + n, max(0, left - n)
    assert scored == expected


def test_prefetch_keeps_order_passes_errors_and_stops_its_thread() -> None:
    assert list(prefetch(lambda step: step * step, range(20))) == [s * s for s in range(20)]

    def fails(step: int) -> int:
        if step == 3:
            raise UserError("shard is damaged")
        return step

    got = []
    with pytest.raises(UserError, match="damaged"):
        for value in prefetch(fails, range(10)):
            got.append(value)
    assert got == [0, 1, 2]
    import threading

    for value in (endless := prefetch(lambda step: step, range(10**9))):
        if value == 5:
            break
    endless.close()
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_sha256_of_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        sha256_of(tmp_path / "x")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
