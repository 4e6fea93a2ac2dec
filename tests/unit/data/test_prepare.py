"""Preparation as it happens: killed, cut off, run by many threads, out of disk, over a network that lies. Never a bad shard."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import load_file

from anew import Config, Tokenizer, UserError
from anew.data import hub_datasets as hub_data
from anew.data import prepare, readers, shards, sources
from anew.data.dataloader import Batches
from anew.data.dataset import open_data
from anew.data.shards import DataFolder, SplitWriter
from anew.data.streaming import finished
from anew.tokenizer.bpe import MOST_BYTES, PIECE_BYTES
from tests.support import shared

GPT2 = Tokenizer.named("gpt2")
BYTES = prepare.Settings("bytes", shard_tokens=20_000, block_bytes=8_000, val_tokens=6_000)
SMALL = prepare.Settings("gpt2", shard_tokens=20_000, block_bytes=8_000, val_tokens=6_000)


def content(folder: Path) -> dict[str, bytes]:
    """Everything a finished data folder holds."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 documents of uneven length: about 0.9 MB."""
    path = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    words = [
        "the",
        "king",
        "crosses",
        "a",
        "river",
        "and",
        "12",
        "ships",
        "leave",
        "while",
        "nobody",
        "sees",
        "them",
        "again",
    ]
    rng = random.Random(1)
    rows = [" ".join(rng.choices(words, k=rng.choice([3, 40, 300]))) + f" {i}" for i in range(1500)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(posts: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return prepare.prepare(
        sources.find(str(posts)), SMALL, tmp_path_factory.mktemp("whole") / "data", workers=1
    )


def test_every_document_is_there_once_and_validation_is_apart(
    posts: Path, whole: DataFolder
) -> None:
    documents = [json.loads(line)["text"] for line in posts.open()]
    found = {
        split: GPT2.decode(np.concatenate([s.tokens for s in whole.splits[split]]).tolist()).split(
            "<|endoftext|>"
        )[1:]
        for split in ("train", "val")
    }
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert found["train"] != [d for d in documents if d in set(found["train"])], (
        "documents are shuffled"
    )
    assert 6_000 <= whole.n_tokens("val") < 6_600, "validation ends with the document that fills it"
    assert [s.n_tokens for s in whole.splits["train"][:-1]] == [20_000] * (
        len(whole.splits["train"]) - 1
    )
    hashes = sorted(
        int.from_bytes(hashlib.blake2b(d.encode(), digest_size=8).digest(), "little")
        for d in found["val"]
    )
    assert hashes[-1] < 2**64 // 10


@pytest.mark.parametrize("workers", [2, 16])
def test_any_number_of_workers_writes_the_same_bytes(
    posts: Path, whole: DataFolder, workers: int, tmp_path: Path
) -> None:
    prepare.prepare(sources.find(str(posts)), SMALL, tmp_path / "data", workers=workers)
    assert content(tmp_path / "data") == content(whole.path)


def child(posts: Path, out: Path) -> None:
    prepare.prepare(sources.find(str(posts)), SMALL, out, workers=2)


def test_thirty_kills_change_no_byte(posts: Path, whole: DataFolder, tmp_path: Path) -> None:
    out, rng, kills, restarts = tmp_path / "data", random.Random(3), 0, 0
    blocks = []
    while not (out / "index.json").exists():
        process = multiprocessing.get_context("fork").Process(target=child, args=(posts, out))
        process.start()
        if kills < 30:
            before = blocks[-1] if blocks else 0
            deadline = time.monotonic() + 20
            while (
                process.is_alive() and time.monotonic() < deadline
            ):  # let it get a little further, then kill it anywhere
                with contextlib.suppress(FileNotFoundError, ValueError):
                    blocks.append(json.loads((out / "progress.json").read_text())["block"])
                if kills % 3 or (blocks and blocks[-1] > before):
                    break
            time.sleep(rng.random() * 0.01)
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                kills += 1
        process.join()
        restarts += 1
        assert restarts < 80
    assert kills == 30
    assert content(out) == content(whole.path)
    assert sorted(blocks) == blocks, "no block is done twice"


def test_a_finished_folder_is_left_alone_and_other_wishes_are_refused(
    posts: Path, whole: DataFolder, tmp_path: Path
) -> None:
    before = content(whole.path)
    assert prepare.prepare(sources.find(str(posts)), SMALL, whole.path).n_tokens(
        "train"
    ) == whole.n_tokens("train")
    assert content(whole.path) == before
    with pytest.raises(UserError, match="holds other data"):
        prepare.prepare(sources.find(str(posts)), prepare.Settings("bytes"), whole.path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already and holds notes\.txt"):
        prepare.prepare(sources.find(str(posts)), SMALL, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_settings_may_not_change_on_the_way(posts: Path, tmp_path: Path) -> None:
    def stop(_: prepare.Status) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(sources.find(str(posts)), SMALL, out, report=stop)
    assert (out / "progress.json").exists()
    with pytest.raises(UserError, match="other settings or another text"):
        prepare.prepare(sources.find(str(posts)), prepare.Settings("gpt2"), out)
    (out / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        prepare.prepare(sources.find(str(posts)), SMALL, out)


def test_a_kill_before_the_first_block_is_gone_on_with(
    posts: Path, whole: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare._Job, "_save", die)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(sources.find(str(posts)), SMALL, tmp_path / "data")
    assert finished(tmp_path / "data") == {"train": [], "val": []}
    monkeypatch.undo()
    prepare.prepare(sources.find(str(posts)), SMALL, tmp_path / "data")
    assert content(tmp_path / "data") == content(whole.path)


def test_two_writers_cannot_share_a_folder(posts: Path, tmp_path: Path) -> None:
    out, inside, leave = tmp_path / "data", threading.Event(), threading.Event()

    def pause(_: prepare.Status) -> None:
        inside.set()
        leave.wait(20)

    first = threading.Thread(
        target=prepare.prepare,
        args=(sources.find(str(posts)), SMALL, out),
        kwargs={"report": pause},
    )
    first.start()
    assert inside.wait(20)
    with pytest.raises(UserError, match="another process is preparing"):
        prepare.prepare(sources.find(str(posts)), SMALL, out)
    leave.set()
    first.join()
    assert DataFolder.open(out).n_tokens("train") > 0


def test_the_limit_is_exact(posts: Path, tmp_path: Path) -> None:
    limited = prepare.Settings(
        "gpt2", limit_tokens=50_001, shard_tokens=20_000, block_bytes=40_000, val_tokens=100
    )
    folder = prepare.prepare(sources.find(str(posts)), limited, tmp_path / "data")
    assert folder.n_tokens("train") == 50_001


def test_repeats_of_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    documents = [f"document number {i}, which is long enough to count" for i in range(400)]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents * 2))
    folder = prepare.prepare(
        sources.find(str(path)),
        prepare.Settings("gpt2", val_tokens=100, block_bytes=1000),
        tmp_path / "data",
    )
    found = {split: set(_texts(folder, split)) for split in ("train", "val")}
    assert found["val"]
    assert not found["train"] & found["val"]
    assert json.loads((folder.path / "index.json").read_text())["repeats_of_validation"] == len(
        found["val"]
    )


def _texts(folder: DataFolder, split: str) -> list[str]:
    return GPT2.decode(np.concatenate([s.tokens for s in folder.splits[split]]).tolist()).split(
        "<|endoftext|>"
    )[1:]


def test_a_full_disk_stops_in_words_and_goes_on(
    posts: Path, whole: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, written = tmp_path / "data", SplitWriter._append, 0

    def full(writer: SplitWriter, tokens: np.ndarray) -> None:
        nonlocal written
        written += len(tokens)
        if written > 70_000:
            writer.file.write(b"half a blo")
            raise OSError(28, "No space left on device")
        real(writer, tokens)

    monkeypatch.setattr(SplitWriter, "_append", full)
    with pytest.raises(UserError, match="is full; free some space and run the same command again"):
        prepare.prepare(sources.find(str(posts)), SMALL, out)
    monkeypatch.undo()
    prepare.prepare(sources.find(str(posts)), SMALL, out)
    assert content(out) == content(whole.path)


# --- documents of any kind -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "a" * 1_000_000, "word " * 200_000, "   " * 100_000, "é" * 600_000, "\U0001f600" * 300_000, "a b " * 300_000, "1 2\n" * 300_000,
], ids=["equal", "words", "spaces", "two-byte", "emoji", "letters", "lines"])  # fmt: skip
def test_long_documents_have_the_same_tokens_in_pieces(text: str) -> None:
    document = text.encode()
    assert len(document) > PIECE_BYTES
    ids = GPT2.encode_document(document)
    if len(document) <= MOST_BYTES:
        assert ids.tolist() == GPT2.encode(text)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["the ", "a", " ", "\n", "é", "12", "don't", "  x", "👍"]), max_size=400
    )
)
def test_pieces_cut_no_token(parts: list[str]) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anew.tokenizer.bpe.PIECE_BYTES", 16)
        assert GPT2.encode_document(text.encode()).tolist() == GPT2.encode(text)


def test_odd_documents(tmp_path: Path) -> None:
    rows = ["", "x", "\x00", "a" * 50_000, "café", "<|endoftext|>", "\ud800 alone"]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) + "\n\n")
    folder = prepare.prepare(sources.find(str(path)), prepare.Settings("gpt2"), tmp_path / "data")
    tokens = np.concatenate([s.tokens for split in ("train", "val") for s in folder.splits[split]])
    assert (tokens == GPT2.end_of_text).sum() == 6, (
        "one for each document that is not empty, and none that a document wrote itself"
    )


def test_every_format_holds_the_same_documents(tmp_path: Path) -> None:
    rows = [f"text {i} é" for i in range(1200)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    files = {
        "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.xz": lzma.compress(lines),
        "a.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
    }  # fmt: skip
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    parquet.write_table(
        pyarrow.table({"id": range(1200), "text": rows}), tmp_path / "a.parquet", row_group_size=100
    )
    expected = [row.encode() for row in rows]
    for path in sorted(tmp_path.iterdir()):
        assert list(readers.documents(path)) == expected, path.name
        assert list(readers.documents(path, skip=1100)) == expected[1100:]
        assert not sources.find(str(path)).by_position
    assert len(sources.find(str(tmp_path)).files) == 5
    with pytest.raises(UserError, match="no column 'words'; it has id, text"):
        list(readers.documents(tmp_path / "a.parquet", "words"))
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"):
        cut = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(cut[: len(cut) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            list(readers.documents(tmp_path / name))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(20, 90),
    st.integers(2, 12),
    st.sampled_from([1, 2, 3]),
)
def test_an_epoch_reads_every_window_once_on_any_number_of_ranks(
    lengths: list[int], shard_tokens: int, seq_len: int, ranks: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        writer = SplitWriter(Path(folder), "train", shard_tokens)
        stream = np.arange(sum(lengths), dtype=np.uint16)
        for part in np.split(stream, np.cumsum(lengths)[:-1]):
            writer.write(part)
        entries = writer.close()
        opened = [shards.Shard(Path(folder) / e["name"], e["tokens"], e["sha256"]) for e in entries]
        if all(s.n_tokens <= seq_len for s in opened):
            return
        batches = Batches(opened, seq_len, 7)
        share = -(-batches.epoch_sequences // ranks)
        rows = np.concatenate([batches.rows(r * share, min(share, batches.epoch_sequences - r * share)) for r in range(ranks)
                               if r * share < batches.epoch_sequences])  # fmt: skip
        seen = np.sort(rows[:, :-1].flatten())
        assert len(np.unique(seen)) == len(seen), "no token is an input twice in an epoch"
        start = 0
        for shard in opened:
            dropped = set(range(start, start + shard.n_tokens)) - set(seen.tolist())
            assert len(dropped) < seq_len + 1, (
                "fewer than T + 1 tokens are dropped at a shard's end"
            )
            start += shard.n_tokens


# --- a hub on loopback -------------------------------------------------------------------------------------------------------------------

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


class Hub(ThreadingHTTPServer):
    """One dataset of parquet files in FineWeb-Edu's schema, in the hub's protocol; `faults[path]` says what goes wrong, in order."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.gets = files, {}, []  # type: ignore[var-annotated]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        assert isinstance(server, Hub)
        path = urlsplit(self.path).path
        if re.fullmatch(
            r"/api/datasets/HuggingFaceFW/fineweb-edu/revision/(main|" + COMMIT + ")", path
        ):
            return self.json(
                {
                    "id": "HuggingFaceFW/fineweb-edu",
                    "sha": COMMIT,
                    "siblings": [],
                    "tags": [],
                    "private": False,
                    "downloads": 0,
                }
            )
        if path.startswith(f"/api/datasets/HuggingFaceFW/fineweb-edu/tree/{COMMIT}/"):
            return self.json([
                {"type": "file", "path": name, "size": len(raw), "oid": "0" * 40,
                 "lfs": {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}}
                for name, raw in server.files.items()
            ])  # fmt: skip
        name = path.removeprefix(f"/datasets/HuggingFaceFW/fineweb-edu/resolve/{COMMIT}/")
        if name == path or name not in server.files:
            return self.empty(
                404, {"X-Error-Code": "EntryNotFound" if "resolve" in path else "RepoNotFound"}
            )
        raw = server.files[name]
        fault = server.faults.get(name, []).pop(0) if body and server.faults.get(name) else ""
        if body:
            server.gets.append((name, self.headers.get("Range", "")))
        if fault.isdigit():
            return self.empty(int(fault), {"Retry-After": "0"})
        if fault == "error page":
            raw = b"<html>please sign in</html>".ljust(len(raw))
        if fault == "flipped":
            raw = raw[:500] + bytes([raw[500] ^ 1]) + raw[501:]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        digest = hashlib.sha256(server.files[name]).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(raw)),
        }
        headers |= {"Accept-Ranges": "bytes"} | (
            {} if fault == "no length" else {"Content-Length": str(len(raw) - start)}
        )
        headers |= {"Content-Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}"} if start else {}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(
                raw[start : start + (len(raw) - start) // 2]
                if fault in ("cut", "no length")
                else raw[start:]
            )
            self.close_connection = fault in ("cut", "no length")
        return None

    def json(self, content: object) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def part(number: int, documents: int = 150) -> bytes:
    """A parquet file with FineWeb-Edu's columns."""
    rng = random.Random(number)
    texts = [
        " ".join(
            rng.choices(["school", "water", "the", "plants", "of", "energy", "a", "light"], k=120)
        )
        + f" {number}.{i}"
        for i in range(documents)
    ]
    n = len(texts)
    table = pyarrow.table({
        "text": texts, "id": [f"<urn:uuid:{number}-{i}>" for i in range(n)], "dump": ["CC-MAIN-2024-10"] * n,
        "url": ["https://a.example/"] * n,
        "file_path": ["s3://x"] * n, "language": ["en"] * n, "language_score": [0.97] * n, "token_count": [150] * n, "score": [3.1] * n,
        "int_score": [3] * n,
    })  # fmt: skip
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=50)
    return out.getvalue()


@pytest.fixture(scope="module")
def parts() -> dict[str, bytes]:
    return {f"sample/10BT/{i:03d}_00000.parquet": part(i) for i in range(6)} | {
        "data/other.parquet": part(99)
    }


@pytest.fixture
def hub(parts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(dict(parts))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_data, "PAUSE_SECONDS", 0.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def edu(hub: Hub, tmp_path: Path) -> tuple[DataFolder, dict[str, bytes]]:
    folder = prepare.prepare(sources.find("fineweb-edu"), SMALL, tmp_path / "undisturbed")
    hub.gets.clear()
    return folder, content(folder.path)


def test_fineweb_edu_from_the_hub(hub: Hub, edu: tuple[DataFolder, dict[str, bytes]]) -> None:
    folder, files = edu
    index = json.loads(files["index.json"])
    assert (index["revision"], index["documents"]) == (COMMIT, 900)
    assert folder.n_tokens("train") + folder.n_tokens("val") > 900 * 100
    assert set(files) == {"index.json", *(e["name"] for e in index["shards"])}, (
        "fetched files are gone"
    )


@pytest.mark.parametrize("fault", ["cut", "no length", "error page", "flipped", "503", "429"])
def test_network_faults_change_no_byte(
    hub: Hub, edu: tuple[DataFolder, dict[str, bytes]], fault: str, tmp_path: Path
) -> None:
    hub.faults = {
        "sample/10BT/002_00000.parquet": [fault],
        "sample/10BT/003_00000.parquet": [fault],
    }
    prepare.prepare(sources.find("fineweb-edu"), SMALL, tmp_path / "data")
    assert content(tmp_path / "data") == edu[1]
    assert hub.faults == {name: [] for name in hub.faults}, "the faults happened"


def test_a_lasting_fault_is_one_sentence_and_what_was_done_stays(
    hub: Hub, edu: tuple[DataFolder, dict[str, bytes]], tmp_path: Path
) -> None:
    hub.faults = {"sample/10BT/004_00000.parquet": ["error page"] * 50}
    with pytest.raises(UserError, match=r"another sha256.*run the same command again"):
        prepare.prepare(sources.find("fineweb-edu"), SMALL, tmp_path / "data")
    hub.faults = {}
    hub.gets.clear()
    prepare.prepare(sources.find("fineweb-edu"), SMALL, tmp_path / "data")
    assert content(tmp_path / "data") == edu[1]
    assert "sample/10BT/001_00000.parquet" not in {name for name, _ in hub.gets}, (
        "files that are done are not fetched again"
    )


def test_a_file_that_changed_on_the_server_is_noticed(
    hub: Hub, edu: tuple[DataFolder, dict[str, bytes]], tmp_path: Path
) -> None:
    source = sources.find("fineweb-edu")
    hub.files["sample/10BT/005_00000.parquet"] = part(77)
    with pytest.raises(UserError, match=r"another sha256|could not be fetched"):
        prepare.prepare(source, SMALL, tmp_path / "data")


def test_twenty_files_within_a_disk_budget_of_three(hub: Hub, tmp_path: Path) -> None:
    """A reader removes shards when it is done with them, as training does; two fetched files and a few shards have to fit."""
    hub.files = {f"sample/10BT/{i:03d}_00000.parquet": part(i) for i in range(20)}
    undisturbed = prepare.prepare(sources.find("fineweb-edu"), SMALL, tmp_path / "undisturbed")
    out, most, stop = tmp_path / "data", 0, threading.Event()
    size = max(len(raw) for raw in hub.files.values())
    budget = 3 * size + prepare.OVERHEAD_BYTES + 40_000  # and one small shard
    assert budget < sum(s.path.stat().st_size for s in undisturbed.splits["train"]) / 2
    taken: list[bytes] = []

    def read() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, shards.disk_bytes(out))
            found = finished(out)["train"]
            for shard in found[len(taken) :]:
                taken.append(shard.path.read_bytes())
                shards.consume(found, len(taken))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        prepare.prepare(
            sources.find("fineweb-edu"), SMALL, out, workers=2, disk_budget=budget, consumed=True
        )
    finally:
        stop.set()
        reader.join()
    assert 0 < most <= budget
    assert taken == [s.path.read_bytes() for s in undisturbed.splits["train"]][: len(taken)]
    assert len(taken) > 10
    with pytest.raises(UserError, match=r"the disk budget of .* is full"):
        prepare.prepare(
            sources.find("fineweb-edu"), SMALL, tmp_path / "alone", disk_budget=size + 1000
        )


@pytest.fixture
def web(hub: Hub, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on fineweb-edu, whose preparation is a process of its own, with small shards and a cache of its own."""
    monkeypatch.setenv(
        "HF_HUB_OFFLINE", "0"
    )  # the process beside training has its own huggingface_hub
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("anew.data.dataset.settings_for", lambda _: BYTES)
    return tiny.override(
        data="fineweb-edu",
        n_layer=1,
        n_head=1,
        n_embd=8,
        steps=40,
        batch_tokens=1024,
        save_every=10,
    )


def test_training_on_what_is_still_being_prepared_is_training_on_what_is_there(
    hub: Hub, web: Config, tmp_path: Path
) -> None:
    from anew.training.trainer import train

    streamed = train(web.override(out=str(tmp_path / "streamed")))
    [data] = (tmp_path / "cache" / "data").iterdir()
    prepare.prepare(
        sources.find("fineweb-edu"), BYTES, data, wait=True
    )  # what was not needed for 40 steps
    again = train(web.override(out=str(tmp_path / "again")))
    a, b = (
        load_file(r.folder / "checkpoints" / "step-00000040" / "model.safetensors")
        for r in (streamed, again)
    )
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert streamed.val_loss == again.val_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # what is prepared needs no hub
        train(web.override(out=str(tmp_path / "offline"), steps=2, warmup_steps=0))


def test_a_disk_budget_holds_through_a_whole_run_and_its_resume(
    hub: Hub, web: Config, tmp_path: Path
) -> None:
    from anew.errors import Preempted
    from anew.training.trainer import train

    size = max(len(raw) for raw in hub.files.values())
    budget = 3 * size + 4 * 40_000 + 100_000
    run, most, stop, cache = tmp_path / "run", 0, threading.Event(), tmp_path / "cache"

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, shards.disk_bytes(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    streamed = web.override(out=str(run), disk_budget=str(budget), steps=90, save_every=5, keep=1)

    def interrupt(row: dict) -> None:
        if row["step"] == 30:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        train(streamed, interrupt)
    train(streamed)
    stop.set()
    watcher.join()
    [data] = (cache / "data").iterdir()
    assert 0 < most <= budget, f"{most} of {budget}"
    assert shards.consumed(data) >= 3
    assert not (data / "train-00000.bin").exists()
    prepare.prepare(sources.find("fineweb-edu"), BYTES, tmp_path / "all")
    whole = train(web.override(out=str(tmp_path / "whole"), data=str(tmp_path / "all"), steps=90))
    a, b = (
        load_file(r / "checkpoints" / "step-00000090" / "model.safetensors")
        for r in (run, whole.folder)
    )
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_what_goes_wrong_beside_training_is_said(hub: Hub, web: Config) -> None:
    from anew.training.trainer import train

    hub.faults = {"sample/10BT/000_00000.parquet": ["404"] * 50}
    with pytest.raises(UserError, match=r"hub answered 404"):
        train(web)


def test_other_datasets_and_names_that_do_not_exist(hub: Hub) -> None:
    with pytest.raises(UserError, match="somebody/nothing is no public dataset"):
        sources.find("somebody/nothing:config:train")
    with pytest.raises(UserError, match="there is no data at 'nothing at all'"):
        sources.find("nothing at all")


def test_other_projects_token_files_are_read_and_ours_are_llm_cs(
    whole: DataFolder, tiny: Config, tmp_path: Path
) -> None:
    from anew.training.trainer import train

    streams = {
        split: np.concatenate([s.tokens for s in whole.splits[split]]) for split in ("train", "val")
    }
    for name in ("llmc", "npy", "nanogpt", "odd", "wide"):
        (tmp_path / name).mkdir()
    for split, stream in streams.items():
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(stream)
        (tmp_path / "llmc" / f"edu_fineweb_{split}_000001.bin").write_bytes(
            header.tobytes() + stream.tobytes()
        )
        np.save(tmp_path / "npy" / f"edufineweb_{split}_000000.npy", np.asarray(stream))
        (tmp_path / "nanogpt" / f"{split}.bin").write_bytes(stream.tobytes())
    for name in ("llmc", "npy", "nanogpt"):
        folder = open_data(str(tmp_path / name), "gpt2")
        for split, stream in streams.items():
            assert np.array_equal(
                np.concatenate([s.tokens for s in folder.splits[split]]), stream
            ), name
        result = train(tiny.override(data=str(tmp_path / name), tokenizer="gpt2", vocab_size=50257, steps=2, warmup_steps=0,
                                     val_tokens=200, out=str(tmp_path / f"run-{name}")))  # fmt: skip
        assert result.step == 2
    (tmp_path / "odd" / "train.bin").write_bytes(b"odd")
    np.save(tmp_path / "wide" / "x_train_0.npy", np.zeros(9))
    for name, words in (("odd", "odd number of bytes"), ("wide", "holds float64")):
        with pytest.raises(UserError, match=words):
            open_data(str(tmp_path / name), "gpt2")
    ours = whole.splits["train"][0].path.read_bytes()
    magic, version, n_tokens = np.frombuffer(
        ours[:12], "<i4"
    )  # llm.c's dataloader asks for these three
    assert (magic, version, n_tokens) == (20240520, 1, 20_000)
    assert len(ours) == 1024 + 2 * n_tokens


def test_what_prepare_says_beforehand_and_afterwards(
    posts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anew.cli.main import main

    main(["prepare", str(posts), "--dry-run", "--disk-budget", "100K", "--json"])
    said = capsys.readouterr().out
    plan = json.loads(said.splitlines()[-1])
    assert plan["files"] == 1
    assert plan["bytes_to_read"] == posts.stat().st_size
    assert "the budget of 0.00 GB is less" in said
    main(
        [
            "prepare",
            str(posts),
            "--out",
            str(tmp_path / "data"),
            "--limit-tokens",
            "30000",
            "--workers",
            "1",
            "--json",
        ]
    )
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["train"] == 30_000
    assert 0.3 < plan["tokens"] / 200_000 < 3
    main(["prepare", "--show", str(tmp_path / "data"), "--json"])
    shown = capsys.readouterr().out
    facts = json.loads(shown.splitlines()[-1])
    tokens = np.concatenate([s.tokens for s in DataFolder.open(tmp_path / "data").splits["train"]])
    assert facts["train"] == {"tokens": 30_000, "shards": 1}
    assert sum(facts["lengths"].values()) == (tokens == GPT2.end_of_text).sum() - 1
    assert max(map(len, shown.splitlines()[1:-1])) <= 80


@pytest.mark.parametrize(("arguments", "words"), [
    (["x", "--disk-budget", "lots"], "is no size"), ([], "name a source"), (["{posts}"], "name the data folder"),
    (["{posts}", "--out", "d", "--workers", "-1"], "must be 0 or above"), (["--show", "nowhere"], "is not a data folder"),
])  # fmt: skip
def test_wishes_that_prepare_refuses(
    posts: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from anew.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["prepare", *(a.format(posts=posts) for a in arguments)])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_the_real_web_text_goes_through(tmp_path: Path) -> None:
    path = shared("web_text/openwebtext_1000.jsonl")
    folder = prepare.prepare(sources.find(str(path)), prepare.Settings("gpt2"), tmp_path / "data")
    documents = [json.loads(line)["text"] for line in path.open()]
    assert sorted(_texts(folder, "train") + _texts(folder, "val")) == sorted(
        d.replace("\ufffd", "\ufffd") for d in documents
    )


def test_the_first_tokens_can_be_the_validation_split(posts: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(SMALL, val_tokens=12_345, validation="first")
    folder = prepare.prepare(sources.find(str(posts)), first, tmp_path / "data", workers=2)
    stream = [
        t
        for line in posts.open()
        for t in [GPT2.end_of_text, *GPT2.encode(json.loads(line)["text"])]
    ]
    assert np.concatenate([s.tokens for s in folder.splits["val"]]).tolist() == stream[:12_345]
    rest = np.concatenate([s.tokens for s in folder.splits["train"]])
    assert sorted(rest.tolist()) == sorted(stream[12_345:])


@pytest.mark.parametrize("to", ["llm.c", "build-nanogpt", "nanogpt"])
def test_a_data_folder_in_the_files_of_other_projects(
    whole: DataFolder, to: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "anew",
        "prepare",
        str(whole.path),
        "--to",
        to,
        "--out",
        str(out),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    again = open_data(str(out), "gpt2")
    for split in ("train", "val"):
        ours, theirs = (np.concatenate([s.tokens for s in f.splits[split]]) for f in (whole, again))
        assert (ours == theirs).all()
    if to == "nanogpt":  # as its train.py reads it
        assert (
            np.memmap(out / "train.bin", dtype=np.uint16, mode="r")
            == np.concatenate([s.tokens for s in whole.splits["train"]])
        ).all()
    if to == "build-nanogpt":  # as its load_tokens does
        names = sorted(p.name for p in out.iterdir() if "train" in p.name)
        assert len(np.load(out / names[0]).astype(np.int32)) == 20_000
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).returncode == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs takes rights that this process has not")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full_is_said_and_goes_on_when_there_is_room(
    posts: Path, whole: DataFolder, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 700_000)
    code = f"from pathlib import Path; from tests.unit.data.test_prepare import child; child(Path({str(posts)!r}), Path({str(small_disk / 'data')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1  # no SIGBUS: shards are written, not mapped
    assert "UserError: the disk of" in done.stderr
    assert "is full" in done.stderr
    assert not (small_disk / "data" / "index.json").exists()
    ballast.unlink()
    child(posts, small_disk / "data")
    assert content(small_disk / "data") == content(whole.path)
