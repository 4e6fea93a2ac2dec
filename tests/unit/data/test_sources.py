"""Downloads against a real HTTP server on loopback that misbehaves in the ways real ones do."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from anew import UserError
from anew.data.sources import download

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 500
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    plan: list[str]
    requests: int = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        fault = server.plan[min(server.requests, len(server.plan) - 1)]
        server.requests += 1
        if fault.isdigit():
            self.send_error(int(fault))
            return
        self.send_response(200)
        body = b"<html>sign in</html>" if fault == "error page" else BODY
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(
            body[: len(body) // 2] if fault.startswith("cut") or fault == "no length" else body
        )

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "faults",
    [["ok"], ["503", "429", "ok"], ["cut", "ok"], ["no length", "cut", "error page", "ok"]],
)
def test_passing_faults_are_outlasted(server: Server, tmp_path: Path, faults: list[str]) -> None:
    server.plan = faults
    download(
        f"http://127.0.0.1:{server.server_port}/input.txt",
        tmp_path / "a" / "input.txt",
        SHA256,
        pause_seconds=0,
    )
    assert (tmp_path / "a" / "input.txt").read_bytes() == BODY
    assert server.requests == len(faults)


@pytest.mark.parametrize(("fault", "words", "requests"), [
    ("404", "answered 404", 1), ("503", "answered 503", 4), ("error page", "another sha256", 4), ("cut", "Incomplete", 4),
    ("no length", "another sha256", 4),
])  # fmt: skip
def test_lasting_faults_leave_no_file_and_say_what_to_do(
    server: Server, tmp_path: Path, fault: str, words: str, requests: int
) -> None:
    server.plan = [fault]
    with pytest.raises(UserError, match=f"{words}.*pass the file with --data"):
        download(
            f"http://127.0.0.1:{server.server_port}/input.txt",
            tmp_path / "input.txt",
            SHA256,
            pause_seconds=0,
        )
    assert list(tmp_path.iterdir()) == []
    assert server.requests == requests


def test_nobody_listening(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded"):
        download(
            "http://127.0.0.1:9/input.txt", tmp_path / "x", SHA256, attempts=2, pause_seconds=0
        )
