"""Connections of the server: half a request is closed, a slow answer is not."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from anew.serve import connections
from anew.serve.connections import BoundedConnection

HALF_HEAD = b"POST / HTTP/1.1\r\nhost: a\r\n"
HALF_BODY = HALF_HEAD + b"content-length: 10\r\n\r\nabc"
WHOLE = HALF_BODY + b"defghij"
LIMIT_SECONDS = 1.0
BIG_ANSWER = 30_000_000  # bytes: more than the buffers of the system hold


class Application:
    """Reads the body, waits longer than a request may take, and answers."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.answer = b"ok"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        more = True
        while more:
            message = await receive()
            self.messages.append(message["type"])
            more = message.get("more_body", False)
        if self.messages[-1] == "http.disconnect":
            return
        await asyncio.sleep(2 * LIMIT_SECONDS)
        headers = [(b"content-length", str(len(self.answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.answer})


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", LIMIT_SECONDS)
    return Application()


@pytest.fixture
def port(application: Application) -> Iterator[int]:
    config = uvicorn.Config(application, http=BoundedConnection, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()
    assert not BoundedConnection.waiting


@contextlib.contextmanager
def connected(port: int, content: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(content)
        yield client


def received(client: socket.socket) -> bytes:
    """Return the answer of the application; nothing if the server closes the connection."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while not answer.endswith(b"ok"):
            part = client.recv(1_000_000)
            if not part:
                break
            answer += part
    return answer


@pytest.mark.parametrize("content", [b"", b"G", HALF_HEAD, HALF_BODY])
def test_connection_without_a_whole_request_is_closed(port: int, content: bytes) -> None:
    with connected(port, content) as client:
        assert received(client) == b""


def test_single_bytes_do_not_prolong_a_request(port: int) -> None:
    with connected(port, HALF_HEAD + b"x: ") as client, pytest.raises(OSError):  # noqa: PT011
        for _ in range(1000):
            client.sendall(b"y")
            time.sleep(0.02)


def test_application_learns_that_the_client_is_gone(port: int, application: Application) -> None:
    with connected(port, HALF_BODY) as client:
        assert received(client) == b""
    deadline = time.monotonic() + 20
    while len(application.messages) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert application.messages == ["http.request", "http.disconnect"]


def test_answer_may_take_longer_than_a_request(port: int) -> None:
    with connected(port) as client:
        for _ in range(2):  # the second one on the same connection
            client.sendall(WHOLE)
            assert received(client).startswith(b"HTTP/1.1 200")


def test_upgrade_that_is_not_offered_does_not_limit_the_answer(port: int) -> None:
    upgrade = HALF_HEAD + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n"
    with connected(port, upgrade) as client:
        assert received(client).startswith(b"HTTP/1.1 200")


def test_answer_that_is_read_slowly_is_whole(port: int, application: Application) -> None:
    application.answer = bytes(BIG_ANSWER) + b"ok"
    with connected(port, WHOLE) as client:
        client.recv(1)
        time.sleep(2 * LIMIT_SECONDS)
        assert len(received(client)) > BIG_ANSWER


def test_new_connection_replaces_the_one_that_has_waited_longest(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 20.0)
    monkeypatch.setattr(connections, "CONNECTIONS_BEFORE_REPLACEMENT", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port, HALF_HEAD)) for _ in range(3)]
        fourth = stack.enter_context(connected(port, WHOLE))
        assert received(fourth).startswith(b"HTTP/1.1 200")
        assert received(clients[0]) == b""
        clients[1].sendall(b"content-length: 0\r\n\r\n")
        assert received(clients[1]).startswith(b"HTTP/1.1 200")
