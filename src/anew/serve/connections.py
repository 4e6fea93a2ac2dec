"""Connections of the web server that a client cannot occupy without sending a whole request.

    uvicorn.Config(application, http=BoundedConnection)

uvicorn closes a connection that is idle after an answer, but it waits without limit for the rest of
a request. A program that opens connections and sends half a request on each could occupy all file
descriptors of the process. Here a request must arrive within REQUEST_SECONDS. If there are more
than CONNECTIONS_BEFORE_REPLACEMENT, a new connection replaces the one that has waited longest for
its request.

On Linux, the system also closes a connection whose client reads nothing for READ_SECONDS.
"""

import asyncio
import contextlib
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # for a whole request, from the connection or its first byte on
READ_SECONDS = 60.0
CONNECTIONS_BEFORE_REPLACEMENT = 200
MAX_HEADER_BYTES = 64 * 1024
# States of a client that has sent a part of a request, or nothing.
INCOMPLETE = (h11.IDLE, h11.SEND_BODY)


class BoundedConnection(H11Protocol):
    """A connection with a limited time to send a request."""

    # In the order in which they began to wait. A process has one server.
    waiting: dict["BoundedConnection", asyncio.TimerHandle] = {}  # noqa: RUF012 (shared on purpose)

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request, and make room for this connection if necessary."""
        super().connection_made(transport)
        limit_unread_time(transport)
        if len(self.connections) > CONNECTIONS_BEFORE_REPLACEMENT and self.waiting:
            next(iter(self.waiting)).close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Handle what has arrived, and wait as long as the request is not complete."""
        super().data_received(data)
        if self.conn.their_state not in INCOMPLETE:
            self._stop_waiting()
        elif self not in self.waiting:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close the connection. An application that waits for the body receives a disconnect."""
        self._stop_waiting()
        self.transport.close()

    def _wait(self) -> None:
        self.waiting[self] = self.loop.call_later(REQUEST_SECONDS, self.close)

    def _stop_waiting(self) -> None:
        timer = self.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


def limit_unread_time(transport: asyncio.Transport) -> None:
    """Let Linux close the connection if its client reads nothing for READ_SECONDS."""
    connection = transport.get_extra_info("socket")
    if connection is None or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    with contextlib.suppress(OSError):  # the client may be gone
        milliseconds = int(1000 * READ_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
