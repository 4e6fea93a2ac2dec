"""Requests that an attacker, a broken program or a bad network might send to `anew serve`."""

import json
import random
from typing import Any

from anew.serve.schemas import CompletionRequest, InsideRequest, PageRequest

FIELDS = sorted(CompletionRequest.model_fields)
PAGE_FIELDS = sorted({*PageRequest.model_fields, *InsideRequest.model_fields} - set(FIELDS))
PATHS = ("/v1/completions", "/api/write", "/api/inside")
TRAVERSALS = (
    "/../../../../etc/passwd",
    "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/page.css/../../app.py",
    "/..%5c..%5capp.py",
    "/v1/models/../../../../etc/passwd",
    "/v1/models/%00",
    "/page.html%00.css",
    "/" + "a/" * 10_000,
    "/?" + "q=1&" * 10_000,
    "http://127.0.0.1/../app.py",
    "*",
)
NOT_HTTP = (
    b"\r\n" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # the beginning of TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no host
    b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    b"GET / HTTP/1.1\nhost: 127.0.0.1\n\n",
    b"\x00" * 1000,
    b"SSH-2.0-OpenSSH_9.6\r\n",
)
# Requests whose end is ambiguous, and requests that never end.
LENGTHS = (
    "content-length: -1",
    "content-length: 5\r\ncontent-length: 6",
    "content-length: 99999999999999999999",
    "content-length: 0x10",
    "content-length: 4\r\ntransfer-encoding: chunked",
    "transfer-encoding: chunked, chunked",
    "transfer-encoding: gzip",
    "expect: 100-continue\r\ncontent-length: 100",
)
METHODS = ("PUT", "DELETE", "TRACE", "CONNECT", "OPTIONS", "HEAD", "PATCH", "BREW", "get")
HOSTS = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::1")


def hostile_body(generator: random.Random) -> bytes:
    """Return a body that is no JSON, or JSON that is no sensible request."""
    values: list[Any] = [
        *(None, True, -1, 10**400, 1e308, -0.0, "", "\ud800", "x" * 3000, "\x00", "<script>"),
        *([], [[]], [1, "a"], [[1, 2], "b"], [2**70], [None], ["a"] * 40),
        *({}, {"a": {}}, {"$ref": "#"}),
    ]
    kind = generator.randrange(6)
    if kind == 0:
        return bytes(generator.randrange(256) for _ in range(generator.randrange(200)))
    if kind == 1:
        return (generator.choice("[{") * generator.choice([10, 1000, 100_000])).encode()
    if kind == 2:
        long = json.dumps({"prompt": "x" * generator.choice([10, 300_000])}).encode()
        return long[: generator.choice([5, 100, 400_000])]
    if kind == 3:
        return generator.choice(
            [
                *(b"NaN", b"Infinity", b'{"temperature": NaN}', b'{"n": 1e999}', b'"text"', b"[]"),
                *(b"null", b"9" * 5000, b'{"prompt": "\\ud83d"}', b"\xef\xbb\xbf{}"),
                b'{"max_tokens": 1, "max_tokens": []}',
            ]
        )
    names = sorted([*FIELDS, *PAGE_FIELDS, "__proto__", "constructor"])
    chosen = generator.sample(names, generator.randrange(1, 5))
    body = {name: generator.choice(values) for name in chosen}
    if kind == 5:
        body |= {"prompt": generator.choice(values), "max_tokens": 2, "n_tokens": 2}
    return json.dumps(body).encode()


def head(
    method: str = "POST",
    path: str = "/v1/completions",
    host: str = "127.0.0.1",
    more: str = "",
) -> bytes:
    """Return the first lines of a request, with other header lines in `more`."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
    lines += [more] * bool(more)
    return "\r\n".join([*lines, "", ""]).encode()


def post_request(body: bytes, path: str = "/v1/completions") -> bytes:
    """Return a whole request with a body."""
    return head(path=path, more=f"content-length: {len(body)}") + body
