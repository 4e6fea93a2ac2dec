"""A Hugging Face hub on loopback with one dataset of parquet files, and faults on request."""

import hashlib
import io
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow
from pyarrow import parquet

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
REPOSITORY = "HuggingFaceFW/fineweb-edu"
WORDS = ["school", "water", "the", "plants", "of", "energy", "a", "light"]


class Hub(ThreadingHTTPServer):
    """Serves `files` in the hub's protocol.

    `faults[path]` lists what goes wrong in the next downloads of a file: an HTTP status, "cut", "no
    length" (cut without a Content-Length), "error page" (with status 200) or "flipped" (one bit).
    "cut:0.9" sends nine tenths of what was asked for, "cut" one half.
    `gets` lists the downloads as (path, value of the Range header).
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults: dict[str, list[str]] = {}
        self.gets: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        revisions = f"main|refs%2Fconvert%2Fparquet|{COMMIT}"
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}/revision/({revisions})", path):
            self.send_json(
                {
                    "id": REPOSITORY,
                    "sha": COMMIT,
                    "siblings": [],
                    "tags": [],
                    "private": False,
                    "downloads": 0,
                }
            )
            return
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/{COMMIT}/"):
            self.send_json([entry(name, raw) for name, raw in self.server.files.items()])
            return
        name = path.removeprefix(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/")
        if name in self.server.files:
            self.send_file(name, with_body)
        else:
            code = "EntryNotFound" if "resolve" in path else "RepoNotFound"
            self.send_empty(404, {"X-Error-Code": code})

    def send_file(self, name: str, with_body: bool) -> None:
        raw = self.server.files[name]
        digest = hashlib.sha256(raw).hexdigest()
        byte_range = self.headers.get("Range", "")
        fault = ""
        if with_body:
            self.server.gets.append((name, byte_range))
            if self.server.faults.get(name):
                fault = self.server.faults[name].pop(0)
        fault, _, share = fault.partition(":")
        if fault.isdigit():
            self.send_empty(int(fault), {"Retry-After": "0"})
            return
        if fault == "error page":
            raw = b"<html>please sign in</html>".ljust(len(raw))
        if fault == "flipped":
            raw = raw[:500] + bytes([raw[500] ^ 1]) + raw[501:]
        match = re.match(r"bytes=(\d+)-", byte_range)
        start = int(match[1]) if match else 0
        is_cut = fault in ("cut", "no length")
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(raw)),
            "Accept-Ranges": "bytes",
        }
        if fault != "no length":
            headers["Content-Length"] = str(len(raw) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
        self.send_head(206 if start else 200, headers)
        if with_body:
            rest = raw[start:]
            self.wfile.write(rest[: int(float(share or 0.5) * len(rest))] if is_cut else rest)
            self.close_connection = is_cut

    def send_json(self, content: object) -> None:
        raw = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        self.send_head(200, headers)
        self.wfile.write(raw)

    def send_empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_head(status, {**headers, "Content-Length": "0"})

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def entry(name: str, raw: bytes) -> dict[str, object]:
    """Return what the hub's API says about a file."""
    sha256 = hashlib.sha256(raw).hexdigest()
    return {
        "type": "file",
        "path": name,
        "size": len(raw),
        "oid": "0" * 40,
        "lfs": {"oid": sha256, "size": len(raw), "pointerSize": 130},
    }


def parquet_file(number: int, documents: int = 150) -> bytes:
    """Return a parquet file with the columns of FineWeb-Edu."""
    generator = random.Random(number)
    texts = []
    for i in range(documents):
        texts.append(" ".join(generator.choices(WORDS, k=120)) + f" {number}.{i}")
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{number}-{i}>" for i in range(documents)],
        "dump": ["CC-MAIN-2024-10"] * documents,
        "url": ["https://a.example/"] * documents,
        "file_path": ["s3://x"] * documents,
        "language": ["en"] * documents,
        "language_score": [0.97] * documents,
        "token_count": [150] * documents,
        "score": [3.1] * documents,
        "int_score": [3] * documents,
    }
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out, row_group_size=50)
    return out.getvalue()


def sample_files(count: int) -> dict[str, bytes]:
    """Return `count` files of the 10BT sample by path."""
    return {f"sample/10BT/{i:03d}_00000.parquet": parquet_file(i) for i in range(count)}
