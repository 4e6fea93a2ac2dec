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
LIMIT_SECONDS = 0.3


class Application:
    """Reads the body, waits longer than a request may take, and answers."""

    def __init__(self) -> None:
        self.messages: list[str] = []

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
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


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
            part = client.recv(1000)
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


def test_new_connection_replaces_the_one_that_has_waited_longest(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 20.0)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port, HALF_HEAD)) for _ in range(3)]
        fourth = stack.enter_context(connected(port, WHOLE))
        assert received(fourth).startswith(b"HTTP/1.1 200")
        assert received(clients[0]) == b""
        clients[1].sendall(b"content-length: 0\r\n\r\n")
        assert received(clients[1]).startswith(b"HTTP/1.1 200")
