"""Sources of text, and downloads from a server on loopback with the faults that real ones have."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from anew import UserError
from anew.data import sources
from anew.data.prepare import PROGRESS
from anew.data.sources import download
from anew.utils.files import sha256_of

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 500
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each request with the next fault of `plan`, and then always with its last one."""

    plan: list[str]
    requests: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        plan = self.server.plan
        fault = plan[min(self.server.requests, len(plan) - 1)]
        self.server.requests += 1
        if fault.isdigit():
            self.send_error(int(fault))
            return
        self.send_response(200)
        body = b"<html>sign in</html>" if fault == "error page" else BODY
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("cut", "no length"):
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "faults",
    [["ok"], ["503", "429", "ok"], ["cut", "ok"], ["no length", "cut", "error page", "ok"]],
)
def test_download_is_tried_again_after_temporary_faults(
    server: Server, tmp_path: Path, faults: list[str]
) -> None:
    server.plan = faults
    path = tmp_path / "a" / "input.txt"
    download(server.url, path, SHA256, pause_seconds=0)
    assert path.read_bytes() == BODY
    assert server.requests == len(faults)


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        ("404", "answered 404", 1),
        ("503", "answered 503", 4),
        ("error page", "another sha256", 4),
        ("cut", "Incomplete", 4),
        ("no length", "another sha256", 4),
    ],
)
def test_download_with_a_lasting_fault_leaves_no_file_and_says_what_to_do(
    server: Server, tmp_path: Path, fault: str, words: str, requests: int
) -> None:
    server.plan = [fault]
    with pytest.raises(UserError, match=f"{words}.*pass the file with --data"):
        download(server.url, tmp_path / "input.txt", SHA256, pause_seconds=0)
    assert list(tmp_path.iterdir()) == []
    assert server.requests == requests


def test_download_without_a_server_is_refused(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/input.txt"
    with pytest.raises(UserError, match="could not be downloaded"):
        download(url, tmp_path / "x", SHA256, attempts=2, pause_seconds=0)


def test_folder_source_skips_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    (tmp_path / "half.txt").write_bytes(b"\xff\xfe caf\xe9")  # half a character of UTF-16
    for source in (sources.find(str(tmp_path)), sources.find(str(tmp_path / "*.txt"))):
        assert source.files == (tmp_path / "a.txt",)
        assert "half.txt" in {path.name for path, _ in source.skipped}


def test_glob_that_matches_only_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="there is no data"):
        sources.find(str(tmp_path / "*"))


def test_sha256_of_abc_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "x") == published


def test_folder_whose_preparation_has_not_ended_is_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / PROGRESS).write_text('{"documents": 3}')
    with pytest.raises(UserError, match=r"the preparation of .* is not complete"):
        sources.find(str(tmp_path))
