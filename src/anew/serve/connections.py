"""Connections of the web server that cannot be held open by a client that sends or reads nothing.

    uvicorn.Config(application, http=BoundedConnection)

uvicorn closes a connection that is idle after an answer, but it waits without limit for the rest of
a request. A program that opens connections and sends half a request on each could occupy all
descriptors of the process. Here a request must arrive within REQUEST_SECONDS, and when there are
MOST_CONNECTIONS, a new one takes the place of the one that has waited longest for its request.
"""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # from the first byte of a request, or the connection, to its last byte
READ_SECONDS = 60.0  # in which a client must read something of an answer that it is sent
MOST_CONNECTIONS = 200
MAX_HEADER_BYTES = 64 * 1024
# States of a client from which nothing more of a request is expected.
COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)


class BoundedConnection(H11Protocol):
    """A connection with a limited time to send a request."""

    # In the order in which they began to wait. A process has one server.
    waiting: dict["BoundedConnection", asyncio.TimerHandle] = {}  # noqa: RUF012 (shared on purpose)

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request, and make room for this connection if necessary."""
        super().connection_made(transport)
        close_if_unread(transport)
        if len(self.connections) > MOST_CONNECTIONS and self.waiting:
            next(iter(self.waiting)).close()
        self._wait()

    def handle_events(self) -> None:
        """Handle what has arrived, and wait as long as a request is not complete."""
        super().handle_events()
        if self.conn.their_state in COMPLETE:
            self._stop_waiting()
        elif self not in self.waiting:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close the connection. An application that reads the request learns that its client left.

        A connection that is closed by `abort` does not wait until the client has read an answer.
        """
        self._stop_waiting()
        self.transport.abort()

    def _wait(self) -> None:
        self.waiting[self] = self.loop.call_later(REQUEST_SECONDS, self.close)

    def _stop_waiting(self) -> None:
        timer = self.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


def close_if_unread(transport: asyncio.Transport) -> None:
    """Let the system close a connection whose client reads nothing, or is not there any more."""
    connection = transport.get_extra_info("socket")
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        milliseconds = int(1000 * READ_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
