"""Hub downloads end to end: the real huggingface_hub in a process of its own, against a small hub on loopback that can misbehave."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint import hub
from anew.checkpoint import huggingface as weights
from tests.support import ROOT

COMMIT = hub.NAMES["gpt2"][1]


class Hub(ThreadingHTTPServer):
    """Serves `files` of any repository at COMMIT, in the protocol that huggingface_hub speaks; `faults` says what goes wrong, in order."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.seen = files, [], []  # type: ignore[var-annotated]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        assert isinstance(server, Hub)
        match = re.fullmatch(r"/([\w./-]+)/resolve/([^/]+)/(.+)", self.path)
        if not match:  # huggingface_hub asks for other things too, and lives without them
            return self.fail(404, "")
        repository, revision, name = match.groups()
        server.seen.append((self.command, name, self.headers.get("Range", "")))
        if revision not in (COMMIT, "main"):
            return self.fail(404, "RevisionNotFound")
        if repository not in {*(r for r, _ in hub.NAMES.values()), "somebody/small-gpt2"}:
            return self.fail(404, "RepoNotFound")
        if name not in server.files:
            return self.fail(404, "EntryNotFound")
        fault = (
            server.faults.pop(0) if server.faults and body and name.endswith(".safetensors") else ""
        )
        if fault.isdigit():
            return self.fail(int(fault), "")
        content = server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        if fault == "wrong body":
            content = bytes(len(content))
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            part = content[start:]
            self.wfile.write(part[:-100_000] if fault == "cut" else part)
            if fault == "cut":
                self.close_connection = True
        return None

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    weights.save_model(
        out,
        GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32), seed=4),
        Tokenizer.named("gpt2"),
    )
    return out


@pytest.fixture
def server(folder: Path) -> Iterator[Hub]:
    server = Hub(
        {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load(
    server: Hub | None, cache: Path, model: str = "gpt2", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`GPT.from_pretrained(model)` as a user's program runs it; prints a hash of the weights, or leaves as the command line would."""
    program = (
        "import sys, hashlib, anew\n"
        "try: gpt = anew.GPT.from_pretrained(sys.argv[1])\n"
        "except anew.UserError as error: print(error); sys.exit(2)\n"
        "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in gpt.parameters())).hexdigest())\n"
    )
    env = {
        **os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port if server else 9}",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    } | environment  # fmt: skip
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", program, model],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def fingerprint(folder: Path) -> str:
    parameters = GPT.from_pretrained(str(folder)).parameters()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest()


def test_download_then_cache_then_offline(server: Hub, folder: Path, tmp_path: Path) -> None:
    first = load(server, tmp_path)
    assert first.stdout.strip() == fingerprint(folder), first.stderr
    assert {name for _, name, _ in server.seen} == {"config.json", "model.safetensors"}
    asked = len(server.seen)
    assert load(server, tmp_path).stdout == first.stdout
    assert len(server.seen) == asked, "a pinned revision in the cache needs no request"
    assert load(None, tmp_path, HF_HUB_OFFLINE="1").stdout == first.stdout


@pytest.mark.parametrize(
    "name", ["gpt2-xl", "somebody/small-gpt2", "somebody/small-gpt2@" + COMMIT]
)
def test_other_names(server: Hub, folder: Path, tmp_path: Path, name: str) -> None:
    if name == "gpt2-xl":  # pinned to a commit that this hub does not have
        outcome = load(server, tmp_path, name)
        assert outcome.returncode == 2
        assert "no revision" in outcome.stdout
    else:
        assert load(server, tmp_path, name).stdout.strip() == fingerprint(folder)


def test_weights_in_several_files(server: Hub, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    del server.files["model.safetensors"]
    server.files |= {
        file: save({name: tensors[name] for name in part}) for file, part in files.items()
    }
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert load(server, tmp_path).stdout.strip() == fingerprint(folder)


def test_a_cut_download_goes_on_where_it_was(server: Hub, folder: Path, tmp_path: Path) -> None:
    server.faults = ["cut"]
    outcome = load(server, tmp_path)
    if outcome.returncode == 2:  # a version of huggingface_hub that does not try again by itself
        assert "goes on where it was" in outcome.stdout
        outcome = load(server, tmp_path)
    assert outcome.stdout.strip() == fingerprint(folder), outcome.stdout + outcome.stderr
    assert any(byte_range for _, _, byte_range in server.seen), (
        "the second request asks only for the rest"
    )


def test_a_wrong_body_is_refused_and_removed(server: Hub, folder: Path, tmp_path: Path) -> None:
    server.faults = ["wrong body"]
    outcome = load(server, tmp_path)
    assert outcome.returncode == 2
    assert "another sha256" in outcome.stdout
    assert load(server, tmp_path).stdout.strip() == fingerprint(folder)


@pytest.mark.parametrize(
    ("status", "words"), [("404", "404"), ("429", "429"), ("503", "503"), ("403", "403")]
)
def test_a_server_that_refuses(server: Hub, tmp_path: Path, status: str, words: str) -> None:
    server.faults = [status] * 20
    outcome = load(server, tmp_path)
    assert outcome.returncode == 2, outcome.stdout + outcome.stderr
    assert words in outcome.stdout
    assert "Traceback" not in outcome.stderr


def test_what_is_not_there(server: Hub, tmp_path: Path) -> None:
    assert "no public model on the hub" in load(server, tmp_path, "somebody/else").stdout
    del server.files["model.safetensors"]
    assert "only safetensors" in load(server, tmp_path).stdout
    assert "hub's cache" in load(None, tmp_path / "empty", HF_HUB_OFFLINE="1").stdout
