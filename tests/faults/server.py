"""Thousands of hostile requests to `anew serve`, while another client uses the page."""

import contextlib
import json
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint.huggingface import save_model
from tests.faults.common import FaultResult
from tests.support import hostile
from tests.support.serving import request, served
from tests.support.usage import Usage, server_process, usage_of

HALF_OPEN = 450  # connections at once: more than the server keeps
ANSWER_SECONDS = 60.0
BIG_HEADERS = b"x-filler: " + b"y" * 1000 + b"\r\n"
MOST_MB = 20.0  # by which memory may grow, because the allocators of all threads keep some
AT_REST = 30  # descriptors; the client that uses the page has a few of them
MOST_THREADS = 60  # the pools of asyncio and of anyio, which have up to 40


def hostile_requests(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Send hostile requests of all kinds; compare what the server uses half-way and at the end.

    The control is a server with uvicorn's own connections and the same bound on their number. Its
    page cannot be loaded while that many clients have sent half a request.
    """
    result = FaultResult()
    model = _model(scratch / "model")
    with served(str(model), module="tests.faults.plain_server") as address:
        attack = Attack(address, rng)
        for _ in range(HALF_OPEN):
            attack.send_half()
        is_blocked = not _page_can_be_loaded(address)
        result.check(is_blocked, "the control server can be used: the protection is not needed")
        attack.close()
    with served(str(model)) as address:
        server = server_process()
        attack = Attack(address, rng)
        for _ in range(HALF_OPEN):
            attack.send_half()
        kinds: list[Callable[[], None]] = [attack.send_body] * 8
        kinds += [attack.send_half, attack.send_one_byte_more, attack.leave, attack.never_read]
        kinds += [attack.send_big_headers, attack.send_other]
        usages = []
        with Reader(address) as reader:
            for _ in range(2):
                for kind in rng.choices(kinds, k=injections // 2):
                    kind()
                    result.injections += 1
                usages.append(_usage_at_rest(attack, server))
        before, after = usages
    for problem in [*attack.problems, *reader.problems]:
        result.check(False, problem)
    result.check(reader.n_loaded > 0, "the page was never loaded during the attack")
    is_released = after.descriptors < AT_REST and after.threads <= MOST_THREADS
    result.check(is_released, f"descriptors or threads are left over: {before}, {after}")
    growth = after.memory_mb - before.memory_mb
    result.check(growth < MOST_MB, f"memory has grown: {before}, {after}")
    statuses = sorted(attack.statuses.items())
    result.measurements["answers"] = ", ".join(f"{n:,} x {status}" for status, n in statuses)
    result.measurements["memory growth in the second half"] = f"{growth:.0f} MB"
    result.measurements["page loads and texts meanwhile"] = f"{reader.n_loaded:,}"
    return result


def _model(folder: Path) -> Path:
    folder.mkdir()
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=256, vocab_size=257)
    save_model(folder, GPT(config, seed=1), Tokenizer.named("bytes"))
    return folder


def _page_can_be_loaded(address: str) -> bool:
    try:
        return request(address, "GET", "/").status == 200
    except OSError:
        return False


def _usage_at_rest(attack: "Attack", server: int) -> Usage:
    """Close all connections; return what the server uses when it has noticed."""
    attack.close()
    usage = usage_of(server)
    for _ in range(40):
        time.sleep(0.5)
        previous, usage = usage, usage_of(server)
        if usage.descriptors == previous.descriptors < AT_REST:
            break
    return usage


@dataclass
class Attack:
    """Hostile clients, with the connections that they keep open."""

    address: str
    rng: random.Random
    statuses: dict[str, int] = field(default_factory=dict)  # "closed": without an answer
    problems: list[str] = field(default_factory=list)
    half_open: deque[socket.socket] = field(default_factory=deque)

    def _connect(self) -> socket.socket:
        host, port = self.address.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS)

    def _keep(self, connection: socket.socket) -> None:
        """Keep a connection open, as long as there are not too many."""
        self.half_open.append(connection)
        if len(self.half_open) > HALF_OPEN:
            self.half_open.popleft().close()

    def _exchange(self, content: bytes, is_last: bool = False) -> None:
        """Send bytes and count the status of the answer. `is_last`: nothing more will be sent."""
        with contextlib.closing(self._connect()) as connection:
            answer = b""
            try:
                connection.sendall(content)
                if is_last:
                    connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            except TimeoutError:
                self.problems.append(f"no answer in {ANSWER_SECONDS} s to {content[:200]!r}")
            except OSError:
                pass  # the server has closed the connection
        words = answer.split(b" ", 2)
        status = words[1].decode() if len(words) > 1 else "closed"
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status.startswith("5") and status != "503":
            self.problems.append(f"{answer[:500]!r} to {content[:300]!r}")

    def send_body(self) -> None:
        """Send a body that is no sensible request."""
        body = hostile.hostile_body(self.rng)
        self._exchange(hostile.post_request(body, self.rng.choice(hostile.PATHS)))

    def send_half(self) -> None:
        """Send the first part of a request, and keep the connection open."""
        connection = self._connect()
        content = hostile.post_request(b'{"prompt": "It was", "max_tokens": 2}')
        with contextlib.suppress(OSError):
            connection.sendall(content[: self.rng.randrange(len(content))])
        self._keep(connection)

    def send_one_byte_more(self) -> None:
        """Continue half a request by one byte, as a slow client does."""
        for _ in range(min(50, len(self.half_open))):
            connection = self.half_open.popleft()
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
            self.half_open.append(connection)

    def leave(self) -> None:
        """Ask for a long text, and leave at its beginning."""
        body = json.dumps({"prompt": "It was", "n_tokens": 200}).encode()
        with contextlib.closing(self._connect()) as connection, contextlib.suppress(OSError):
            connection.sendall(hostile.post_request(body, "/api/write"))
            connection.recv(self.rng.choice([1, 500]))

    def never_read(self) -> None:
        """Ask for long texts, and read nothing of the answers."""
        connection = self._connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        body = json.dumps({"prompt": "It was", "n_tokens": 200}).encode()
        with contextlib.suppress(OSError):
            connection.sendall(hostile.post_request(body, "/api/write"))
        self._keep(connection)

    def send_big_headers(self) -> None:
        """Send headers of 10 MB."""
        self._exchange(hostile.head()[:-2] + BIG_HEADERS * 10_000)

    def send_other(self) -> None:
        """Send a strange path, host, method or length, or something that is not HTTP."""
        head = hostile.head
        pick = self.rng.choice
        content = pick(
            [
                head("GET", pick(hostile.TRAVERSALS)),
                head("GET", "/", host=pick(hostile.HOSTS)),
                head(pick(hostile.METHODS), pick(["/", *hostile.PATHS])),
                head(more=pick(hostile.LENGTHS)) + b"zz\r\n{}",
                head("GET", "/", more="connection: upgrade\r\nupgrade: websocket"),
                pick(hostile.NOT_HTTP),
            ]
        )
        self._exchange(content, is_last=True)

    def close(self) -> None:
        """Close the connections that are still open."""
        while self.half_open:
            self.half_open.popleft().close()


class Reader:
    """A client that loads the page and asks for texts during the attack, in a thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stop = threading.Event()
        self.n_loaded = 0
        self.problems: list[str] = []
        self.thread = threading.Thread(target=self._use)

    def __enter__(self) -> "Reader":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _use(self) -> None:
        body = json.dumps({"prompt": "It", "max_tokens": 2}).encode()
        while not self.stop.wait(0.3):
            try:
                page = request(self.address, "GET", "/")
                text = request(self.address, "POST", "/v1/completions", body)
            except OSError as error:
                self.problems.append(f"the page could not be used: {error!r}")
                continue
            # 429 asks to try again, because the hostile clients wait for texts too.
            if page.status != 200 or text.status not in (200, 429):
                self.problems.append(f"the page got {page.status}, a text {text.status}")
            self.n_loaded += 1
