"""Preparation of local text: complete, independent of its threads, and continued after a stop."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from anew import Tokenizer, UserError
from anew.data import prepare, readers, sources
from anew.data.holdout import Settings
from anew.data.prepare import PROGRESS
from anew.data.shards import DataFolder, SplitWriter
from anew.data.streaming import finished
from tests.support.data_folders import (
    GPT2,
    SMALL,
    content,
    read_documents,
    texts_of,
    tokens_of,
    write_documents,
    write_posts,
)

BYTES = Tokenizer.named("bytes")


def prepared(source: Path, out: Path, settings: Settings = SMALL, workers: int = 0) -> DataFolder:
    return prepare.prepare_data(sources.find(str(source)), settings, out, workers=workers)


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    write_posts(path)
    return path


@pytest.fixture(scope="module")
def whole(posts: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """The posts, prepared by one thread without interruption."""
    return prepared(posts, tmp_path_factory.mktemp("whole") / "data", workers=1)


# --- splits ---------------------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_split(posts: Path, whole: DataFolder) -> None:
    documents = read_documents(posts)
    train = texts_of(whole, "train")
    val = texts_of(whole, "val")
    assert sorted(train + val) == sorted(documents)
    assert train != [text for text in documents if text in set(train)], "documents are shuffled"
    assert 6_000 <= whole.n_tokens("val") < 6_600, "validation ends with the document that fills it"
    *full_shards, _ = whole.splits["train"]
    assert {shard.n_tokens for shard in full_shards} == {20_000}
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in val]
    assert max(int.from_bytes(digest, "little") for digest in digests) < 2**64 // 10


def test_single_file_is_split_by_position(text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text()
    folder = prepared(text_file, tmp_path / "data", Settings("bytes"))
    train = tokens_of(folder, "train").tolist()
    val = tokens_of(folder, "val").tolist()
    assert train[0] == val[0] == BYTES.end_of_text
    assert BYTES.decode(train[1:]) == text[: len(text) * 9 // 10]
    assert BYTES.decode(val[1:]) == text[len(text) * 9 // 10 :]
    assert json.loads((folder.path / "index.json").read_text())["documents"] == 1


@pytest.mark.parametrize("tokenizer", ["gpt2", "train:300"])
def test_nothing_is_held_out_if_no_tokens_are(
    tokenizer: str, text_file: Path, posts: Path, tmp_path: Path
) -> None:
    settings = Settings(tokenizer, val_tokens=0)
    folder = prepared(text_file, tmp_path / "text", settings)
    tokens = tokens_of(folder, "train").tolist()
    assert Tokenizer.find(folder.tokenizer, folder.path).decode(tokens[1:]) == text_file.read_text()
    assert folder.n_tokens("val") == 0
    folder = prepared(posts, tmp_path / "posts", settings)
    end_of_text = Tokenizer.find(folder.tokenizer, folder.path).end_of_text
    assert (tokens_of(folder, "train") == end_of_text).sum() == len(read_documents(posts))
    assert folder.n_tokens("val") == 0


def test_too_little_validation_text_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{number} words of some text. " * 400 for number in range(3)]
    # Of few documents, that with the smallest hash is held out.
    smallest = min(
        (f"short {i}" for i in range(2000)),
        key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1],
    )
    write_documents(tmp_path / "a.jsonl", [*rows, smallest])
    with caplog.at_level("WARNING", "anew"):
        folder = prepared(tmp_path / "a.jsonl", tmp_path / "data", Settings("gpt2"))
    assert texts_of(folder, "val") == [smallest]
    assert "tokens are held out, because whole documents are" in caplog.text
    assert "the text has 4 documents" in caplog.text
    caplog.clear()
    prepared(tmp_path / "a.jsonl", tmp_path / "none", Settings("bytes", val_tokens=0))
    assert "held out" not in caplog.text


def test_documents_are_held_out_by_their_own_hash(tmp_path: Path) -> None:
    documents = [f"document {i} " * (i % 5 + 1) for i in range(200)]
    path = tmp_path / "posts.jsonl"
    write_documents(path, documents)
    folder = prepared(path, tmp_path / "data", Settings("bytes"))
    val = texts_of(folder, "val", BYTES)
    assert sorted([*val, *texts_of(folder, "train", BYTES)]) == sorted(documents)
    assert 5 < len(set(val)) < 40
    write_documents(path, ["another", *reversed(documents)])
    again = prepared(path, tmp_path / "again", Settings("bytes"))
    assert set(val) <= set(texts_of(again, "val", BYTES))


def test_two_documents_give_a_validation_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text of a")
    (tmp_path / "b.txt").write_text("text of b")
    folder = prepared(tmp_path, tmp_path / "data", Settings("bytes"))
    assert len(texts_of(folder, "train", BYTES)) == len(texts_of(folder, "val", BYTES)) == 1


def test_repeats_of_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    documents = [f"document number {i}, which is long enough to count" for i in range(400)]
    path = tmp_path / "twice.jsonl"
    write_documents(path, documents * 2)
    folder = prepared(path, tmp_path / "data", Settings("gpt2", val_tokens=100, block_bytes=1000))
    val = set(texts_of(folder, "val"))
    assert val
    assert not val & set(texts_of(folder, "train"))
    index = json.loads((folder.path / "index.json").read_text())
    assert index["repeats_of_validation"] == len(val)


def test_first_tokens_of_the_source_can_be_the_validation_split(
    posts: Path, tmp_path: Path
) -> None:
    first = dataclasses.replace(SMALL, val_tokens=12_345, validation="first")
    folder = prepared(posts, tmp_path / "data", first, workers=2)
    stream: list[int] = []
    for document in read_documents(posts):
        stream += [GPT2.end_of_text, *GPT2.encode(document)]
    assert tokens_of(folder, "val").tolist() == stream[:12_345]
    assert sorted(tokens_of(folder, "train").tolist()) == sorted(stream[12_345:])


def test_limit_tokens_is_exact(posts: Path, tmp_path: Path) -> None:
    limited = Settings(
        "gpt2", limit_tokens=50_001, shard_tokens=20_000, block_bytes=40_000, val_tokens=100
    )
    assert prepared(posts, tmp_path / "data", limited).n_tokens("train") == 50_001


# --- independent of threads and stops -------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 16])
def test_any_number_of_workers_writes_the_same_bytes(
    posts: Path, whole: DataFolder, workers: int, tmp_path: Path
) -> None:
    prepared(posts, tmp_path / "data", workers=workers)
    assert content(tmp_path / "data") == content(whole.path)


def test_finished_folder_is_left_alone_and_another_request_is_refused(
    posts: Path, whole: DataFolder, tmp_path: Path
) -> None:
    before = content(whole.path)
    assert prepared(posts, whole.path).n_tokens("train") == whole.n_tokens("train")
    assert content(whole.path) == before
    with pytest.raises(UserError, match="holds other data"):
        prepared(posts, whole.path, Settings("bytes"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already and holds notes\.txt"):
        prepared(posts, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_interrupted_preparation_continues_only_with_its_settings(
    posts: Path, tmp_path: Path
) -> None:
    def interrupt(_: prepare.Status) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_data(sources.find(str(posts)), SMALL, out, report=interrupt)
    assert (out / "progress.json").exists()
    with pytest.raises(UserError, match="other settings or another text"):
        prepared(posts, out, Settings("gpt2"))
    (out / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        prepared(posts, out)


def test_preparation_that_stopped_before_its_first_block_is_continued(
    posts: Path, whole: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare._Job, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared(posts, tmp_path / "data")
    assert finished(tmp_path / "data") == {"train": [], "val": []}
    monkeypatch.undo()
    prepared(posts, tmp_path / "data")
    assert content(tmp_path / "data") == content(whole.path)


def test_two_preparations_cannot_share_a_folder(posts: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    has_begun = threading.Event()
    may_end = threading.Event()

    def pause(_: prepare.Status) -> None:
        has_begun.set()
        may_end.wait(20)

    source = sources.find(str(posts))
    first = threading.Thread(
        target=prepare.prepare_data, args=(source, SMALL, out), kwargs={"report": pause}
    )
    first.start()
    assert has_begun.wait(20)
    with pytest.raises(UserError, match="another process is preparing"):
        prepared(posts, out)
    may_end.set()
    first.join()
    assert DataFolder.open(out).n_tokens("train") > 0


def test_full_disk_is_a_user_error_and_the_preparation_continues_with_more_room(
    posts: Path, whole: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    append = SplitWriter._append
    written = 0

    def append_until_full(writer: SplitWriter, tokens: np.ndarray) -> None:
        nonlocal written
        written += len(tokens)
        if written > 70_000:
            writer.file.write(b"half a blo")
            raise OSError(28, "No space left on device")
        append(writer, tokens)

    monkeypatch.setattr(SplitWriter, "_append", append_until_full)
    with pytest.raises(UserError, match="is full; free some space and run the same command again"):
        prepared(posts, out)
    monkeypatch.undo()
    prepared(posts, out)
    assert content(out) == content(whole.path)


# --- documents ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["the ", "a", " ", "\n", "é", "12", "don't", "  x", "👍"]), max_size=400
    )
)
def test_tokens_of_a_document_do_not_depend_on_its_pieces(parts: list[str]) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anew.tokenizer.bpe.PIECE_BYTES", 16)
        assert GPT2.encode_document(text.encode()).tolist() == GPT2.encode(text)


def test_each_document_that_is_not_empty_has_one_end_of_text(tmp_path: Path) -> None:
    rows = ["", "x", "\x00", "a" * 50_000, "café", "<|endoftext|>", "\ud800 alone"]
    path = tmp_path / "odd.jsonl"
    write_documents(path, rows)
    with path.open("a") as file:
        file.write("\n\n")
    folder = prepared(path, tmp_path / "data", Settings("gpt2"))
    tokens = np.concatenate([tokens_of(folder, "train"), tokens_of(folder, "val")])
    assert (tokens == GPT2.end_of_text).sum() == 6, "none that a document contains as text"


def test_every_file_format_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [f"text {i} é" for i in range(1200)]
    write_documents(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    table = pyarrow.table({"id": range(1200), "text": rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    expected = [row.encode() for row in rows]
    for path in sorted(tmp_path.iterdir()):
        assert list(readers.documents(path)) == expected, path.name
        assert list(readers.documents(path, skip=1100)) == expected[1100:]
        assert not sources.find(str(path)).by_position
    assert len(sources.find(str(tmp_path)).files) == 5
    with pytest.raises(UserError, match=r"no column 'words'; .* columns \(id, text\)"):
        list(readers.documents(tmp_path / "a.parquet", "words"))
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"):
        path = tmp_path / name
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            list(readers.documents(path))


# --- the command ----------------------------------------------------------------------------------


def test_prepare_command_says_what_it_will_take_and_what_it_wrote(
    posts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anew.cli.main import main

    main(["prepare", str(posts), "--dry-run", "--disk-budget", "100K", "--json"])
    printed = capsys.readouterr().out
    plan = json.loads(printed.splitlines()[-1])
    assert plan["files"] == 1
    assert plan["bytes_to_read"] == posts.stat().st_size
    assert "the budget of 0.00 GB is less" in printed
    out = ["--out", str(tmp_path / "data")]
    main(["prepare", str(posts), *out, "--limit-tokens", "30000", "--workers", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["train"] == 30_000
    assert 0.3 < plan["tokens"] / 200_000 < 3
    main(["prepare", "--show", str(tmp_path / "data"), "--json"])
    shown = capsys.readouterr().out
    facts = json.loads(shown.splitlines()[-1])
    tokens = tokens_of(DataFolder.open(tmp_path / "data"), "train")
    assert facts["train"] == {"tokens": 30_000, "shards": 1}
    assert sum(facts["lengths"].values()) == (tokens == GPT2.end_of_text).sum() - 1
    assert max(map(len, shown.splitlines()[1:-1])) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--disk-budget", "lots"], "is no size"),
        (["x", "--disk-budget", "30"], "is 30 bytes; write it as 30GB"),
        ([], "name a source"),
        (["{posts}"], "name the data folder"),
        (["{posts}", "--out", "d", "--workers", "-1"], "must be 0 or above"),
        (["--show", "nowhere"], "is not a data folder"),
        (["--show", "{unfinished}"], "is not complete; run the same anew prepare command again"),
    ],
)
def test_prepare_command_refuses_bad_arguments(
    posts: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from anew.cli.main import main

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / PROGRESS).write_text("{}")
    filled = [argument.format(posts=posts, unfinished=unfinished) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        main(["prepare", *filled])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
