"""Preparation under faults: kills, a full disk, a disk budget, and a hub whose network fails."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from anew import Config, Tokenizer, UserError
from anew.data import hub_datasets, prepare, shards, sources
from anew.data.conversations import Conversations
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.data.shards import DataFolder
from anew.data.streaming import finished
from anew.errors import Preempted
from anew.tokenizer.bpe import MOST_BYTES, PIECE_BYTES
from anew.training.run_log import Row
from anew.training.trainer import train
from tests.support import shared
from tests.support.conversations import as_dicts, numbered
from tests.support.data_folders import (
    GPT2,
    SMALL,
    SMALL_BYTES,
    content,
    read_documents,
    texts_of,
    tokens_of,
    write_posts,
)
from tests.support.dataset_hub import COMMIT, Hub, parquet_file, sample_files

KILLS = 30


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("posts") / "posts.jsonl"
    write_posts(path)
    return path


@pytest.fixture(scope="module")
def whole(posts: Path, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """The posts, prepared without interruption."""
    out = tmp_path_factory.mktemp("whole") / "data"
    return prepare.prepare_data(sources.find(str(posts)), SMALL, out, workers=1)


def prepare_posts(posts: Path, out: Path) -> None:
    """Prepare the posts; other processes call this."""
    prepare.prepare_data(sources.find(str(posts)), SMALL, out, workers=2)


def assert_same_weights(run_a: Path, run_b: Path, step: int) -> None:
    a, b = (
        load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for run in (run_a, run_b)
    )
    assert all(np.array_equal(a[name], b[name]) for name in a)


# --- kills and full disks -------------------------------------------------------------------------


@pytest.mark.guarantee("durable")
def test_thirty_kills_change_no_byte(posts: Path, whole: DataFolder, tmp_path: Path) -> None:
    out = tmp_path / "data"
    generator = random.Random(3)
    kills = 0
    starts = 0
    blocks: list[int] = []  # the number of finished blocks, as progress.json said before each kill
    while not (out / "index.json").exists():
        process = multiprocessing.get_context("fork").Process(
            target=prepare_posts, args=(posts, out)
        )
        process.start()
        if kills < KILLS:
            before = blocks[-1] if blocks else 0
            deadline = time.monotonic() + 20
            while process.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    blocks.append(json.loads((out / "progress.json").read_text())["block"])
                # Every third process finishes a block first; the others are killed anywhere.
                if kills % 3 or (blocks and blocks[-1] > before):
                    break
            time.sleep(generator.random() * 0.01)
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                kills += 1
        process.join()
        starts += 1
        assert starts < 80
    assert kills == KILLS
    assert content(out) == content(whole.path)
    assert sorted(blocks) == blocks, "no block is done twice"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process has no right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_full_file_system_is_a_user_error_and_the_preparation_continues_with_more_room(
    posts: Path, whole: DataFolder, small_disk: Path
) -> None:
    out = small_disk / "data"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 700_000)
    code = (
        "from pathlib import Path\n"
        "from tests.integration.test_prepare import prepare_posts\n"
        f"prepare_posts(Path({str(posts)!r}), Path({str(out)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, "no SIGBUS: shards are written, not mapped"
    assert "UserError: the disk of" in done.stderr
    assert "is full" in done.stderr
    assert not (out / "index.json").exists()
    ballast.unlink()
    prepare_posts(posts, out)
    assert content(out) == content(whole.path)


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "word " * 200_000,
        "   " * 100_000,
        "é" * 600_000,
        "\U0001f600" * 300_000,
        "a b " * 300_000,
        "1 2\n" * 300_000,
    ],
    ids=["equal", "words", "spaces", "two-byte", "emoji", "letters", "lines"],
)
def test_long_document_in_pieces_has_the_tokens_of_the_whole(text: str) -> None:
    document = text.encode()
    assert len(document) > PIECE_BYTES
    ids = GPT2.encode_document(document)
    if len(document) <= MOST_BYTES:
        assert ids.tolist() == GPT2.encode(text)


def test_web_text_is_prepared_without_loss(tmp_path: Path) -> None:
    path = shared("web_text/openwebtext_1000.jsonl")
    folder = prepare.prepare_data(sources.find(str(path)), Settings("gpt2"), tmp_path / "data")
    documents = read_documents(path)
    assert sorted(texts_of(folder, "train") + texts_of(folder, "val")) == sorted(documents)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {**sample_files(6), "data/other.parquet": parquet_file(99)}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(dict(files))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_datasets, "PAUSE_SECONDS", 0.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def prepare_edu(out: Path, settings: Settings = SMALL, **options: Any) -> DataFolder:
    return prepare.prepare_data(sources.find("fineweb-edu"), settings, out, **options)


@pytest.fixture
def undisturbed(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """The files of a preparation from the hub without faults."""
    folder = prepare_edu(tmp_path / "undisturbed")
    hub.gets.clear()
    return content(folder.path)


def test_fineweb_edu_is_prepared_from_the_hub(undisturbed: dict[str, bytes]) -> None:
    index = json.loads(undisturbed["index.json"])
    assert index["revision"] == COMMIT
    assert index["documents"] == 900
    assert sum(entry["tokens"] for entry in index["shards"]) > 900 * 100
    names = {entry["name"] for entry in index["shards"]}
    assert set(undisturbed) == {"index.json", *names}, "fetched files are removed"


@pytest.mark.guarantee("durable")
@pytest.mark.parametrize("fault", ["cut", "no length", "error page", "flipped", "503", "429"])
def test_network_fault_changes_no_byte(
    hub: Hub, undisturbed: dict[str, bytes], fault: str, tmp_path: Path
) -> None:
    hub.faults = {f"sample/10BT/{i:03d}_00000.parquet": [fault] for i in (2, 3)}
    prepare_edu(tmp_path / "data")
    assert content(tmp_path / "data") == undisturbed
    assert not any(hub.faults.values()), "the faults happened"


def test_lasting_fault_is_a_user_error_and_finished_files_are_not_fetched_again(
    hub: Hub, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults = {"sample/10BT/004_00000.parquet": ["error page"] * 50}
    with pytest.raises(UserError, match=r"another sha256.*run the same command again"):
        prepare_edu(tmp_path / "data")
    hub.faults = {}
    hub.gets.clear()
    prepare_edu(tmp_path / "data")
    assert content(tmp_path / "data") == undisturbed
    assert "sample/10BT/001_00000.parquet" not in {name for name, _ in hub.gets}


def test_file_that_changed_on_the_server_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = sources.find("fineweb-edu")
    hub.files["sample/10BT/005_00000.parquet"] = parquet_file(77)
    with pytest.raises(UserError, match=r"another sha256|could not be downloaded"):
        prepare.prepare_data(source, SMALL, tmp_path / "data")


def test_hub_that_stops_answering_is_tried_again_and_then_a_user_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file, *_] = hub_datasets.listing("HuggingFaceFW/fineweb-edu", "sample/10BT/")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub cannot be reached .* run the same command again"):
        hub_datasets.fetch(file, tmp_path)
    assert pauses.count(hub_datasets.PAUSE_SECONDS) == hub_datasets.ATTEMPTS - 1


def test_conversations_of_the_hub_are_prepared(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    rows = [{"messages": as_dicts(talk)} for talk in numbered(40)]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    hub.files["chats/train/0000.parquet"] = file.getvalue()
    name = "HuggingFaceFW/fineweb-edu:chats:train"
    folder = open_data(name, "gpt2", conversations=True)
    found = 0
    for split in ("train", "val"):
        talks = Conversations(folder.splits[split], Tokenizer.named("gpt2"), 1024, seed=0)
        found += talks.epoch_sequences
    assert found == 40
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # prepared data needs no hub
    assert open_data(name, "gpt2", conversations=True).path == folder.path


def test_unknown_dataset_and_unknown_name_are_refused(hub: Hub) -> None:
    with pytest.raises(
        UserError, match="somebody/nothing is neither a local folder nor a public dataset"
    ):
        sources.find("somebody/nothing:config:train")
    with pytest.raises(UserError, match="there is no data 'nothing at all'"):
        sources.find("nothing at all")


def test_twenty_files_fit_into_a_disk_budget_of_three(hub: Hub, tmp_path: Path) -> None:
    """A reader removes the shards that it has read, as training does.

    Two fetched files and a few shards have to fit.
    """
    hub.files = sample_files(20)
    train_shards = prepare_edu(tmp_path / "undisturbed").splits["train"]
    expected = [shard.path.read_bytes() for shard in train_shards]
    out = tmp_path / "data"
    most_bytes = 0
    stop = threading.Event()
    size = max(len(raw) for raw in hub.files.values())
    one_shard = 40_000
    budget = 3 * size + prepare.OVERHEAD_BYTES + one_shard
    assert budget < sum(map(len, expected)) / 2
    taken: list[bytes] = []

    def read() -> None:
        nonlocal most_bytes
        while not stop.is_set():
            most_bytes = max(most_bytes, shards.disk_bytes(out))
            found = finished(out)["train"]
            for shard in found[len(taken) :]:
                taken.append(shard.path.read_bytes())
                shards.consume(found, len(taken))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        prepare_edu(out, workers=2, disk_budget=budget, consumed=True)
    finally:
        stop.set()
        reader.join()
    assert 0 < most_bytes <= budget
    assert taken == expected[: len(taken)]
    assert len(taken) > 10
    with pytest.raises(UserError, match=r"the disk budget of .* is full"):
        prepare_edu(tmp_path / "alone", disk_budget=size + 1000)


# --- training on a dataset of the hub -------------------------------------------------------------


@pytest.fixture
def web(hub: Hub, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on fineweb-edu with small shards; another process prepares them in an own cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for the huggingface_hub of that process
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("anew.data.dataset.settings_for", lambda _: SMALL_BYTES)
    return tiny.override(
        data="fineweb-edu",
        n_layer=1,
        n_head=1,
        n_embd=8,
        steps=40,
        batch_tokens=1024,
        save_every=10,
    )


def test_training_during_the_preparation_equals_training_after_it(
    web: Config, tmp_path: Path
) -> None:
    streamed = train(web.override(out=str(tmp_path / "streamed")))
    [data] = (tmp_path / "cache" / "data").iterdir()
    prepare_edu(data, SMALL_BYTES, wait=True)  # the rest, which 40 steps did not need
    again = train(web.override(out=str(tmp_path / "again")))
    assert_same_weights(streamed.folder, again.folder, step=40)
    assert streamed.val_loss == again.val_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # prepared data needs no hub
        train(web.override(out=str(tmp_path / "offline"), steps=2, warmup_steps=0))


def test_disk_budget_holds_through_a_whole_run_and_its_resume(
    hub: Hub, web: Config, tmp_path: Path
) -> None:
    size = max(len(raw) for raw in hub.files.values())
    budget = 3 * size + 4 * 40_000 + 100_000
    run = tmp_path / "run"
    cache = tmp_path / "cache"
    most_bytes = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal most_bytes
        while not stop.wait(0.002):
            most_bytes = max(most_bytes, shards.disk_bytes(cache))

    def interrupt(row: Row) -> None:
        if row["step"] == 30:
            signal.raise_signal(signal.SIGTERM)

    streamed = web.override(out=str(run), disk_budget=str(budget), steps=90, save_every=5, keep=1)
    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(Preempted):
        train(streamed, interrupt)
    train(streamed)
    stop.set()
    watcher.join()
    [data] = (cache / "data").iterdir()
    assert 0 < most_bytes <= budget
    assert shards.consumed(data) >= 3
    assert not (data / "train-00000.bin").exists()
    prepare_edu(tmp_path / "all", SMALL_BYTES)
    whole = train(web.override(out=str(tmp_path / "whole"), data=str(tmp_path / "all"), steps=90))
    assert_same_weights(run, whole.folder, step=90)


def test_error_of_the_preparation_process_is_raised_in_training(hub: Hub, web: Config) -> None:
    hub.faults = {"sample/10BT/000_00000.parquet": ["404"] * 50}
    with pytest.raises(UserError, match="the hub answered 404"):
        train(web)


# --- token files of other projects ----------------------------------------------------------------


def test_token_files_of_other_projects_are_read_and_trained_on(
    whole: DataFolder, tiny: Config, tmp_path: Path
) -> None:
    streams = {split: tokens_of(whole, split) for split in ("train", "val")}
    for name in ("llmc", "npy", "nanogpt"):
        (tmp_path / name).mkdir()
    for split, stream in streams.items():
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(stream)
        llmc_file = tmp_path / "llmc" / f"edu_fineweb_{split}_000001.bin"
        llmc_file.write_bytes(header.tobytes() + stream.tobytes())
        np.save(tmp_path / "npy" / f"edufineweb_{split}_000000.npy", np.asarray(stream))
        (tmp_path / "nanogpt" / f"{split}.bin").write_bytes(stream.tobytes())
    for name in ("llmc", "npy", "nanogpt"):
        folder = open_data(str(tmp_path / name), "gpt2")
        for split, stream in streams.items():
            assert np.array_equal(tokens_of(folder, split), stream), name
        config = tiny.override(
            data=str(tmp_path / name),
            tokenizer="gpt2",
            vocab_size=50257,
            steps=2,
            warmup_steps=0,
            val_tokens=200,
            out=str(tmp_path / f"run-{name}"),
        )
        assert train(config).step == 2


def test_damaged_token_files_of_other_projects_are_refused(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "train.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="odd number of bytes"):
        open_data(str(odd), "gpt2")
    wide = tmp_path / "wide"
    wide.mkdir()
    np.save(wide / "x_train_0.npy", np.zeros(9))
    with pytest.raises(UserError, match="holds float64"):
        open_data(str(wide), "gpt2")


def test_shard_has_the_header_that_llm_c_reads(whole: DataFolder) -> None:
    raw = whole.splits["train"][0].path.read_bytes()
    magic, version, n_tokens = np.frombuffer(raw[:12], "<i4")
    assert (magic, version, n_tokens) == (20240520, 1, 20_000)
    assert len(raw) == 1024 + 2 * n_tokens


@pytest.mark.parametrize("project", ["llm.c", "build-nanogpt", "nanogpt"])
def test_data_folder_is_written_as_the_files_of_another_project(
    whole: DataFolder, project: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "anew", "prepare", str(whole.path)]
    command += ["--to", project, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    written = open_data(str(out), "gpt2")
    for split in ("train", "val"):
        assert (tokens_of(written, split) == tokens_of(whole, split)).all()
    if project == "nanogpt":  # read as its train.py does
        stream = np.memmap(out / "train.bin", dtype=np.uint16, mode="r")
        assert (stream == tokens_of(whole, "train")).all()
    if project == "build-nanogpt":  # read as its load_tokens does
        first, *_ = sorted(path.name for path in out.iterdir() if "train" in path.name)
        assert len(np.load(out / first).astype(np.int32)) == 20_000
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2, "an existing folder is not overwritten"
