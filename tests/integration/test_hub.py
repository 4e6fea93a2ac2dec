"""Downloads from the hub and uploads to it, with the real huggingface_hub in its own process.

A small server on the loopback interface acts as the hub and can fail in several ways.
"""

import base64
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
from anew.checkpoint.hub import OPENAI_MODELS
from anew.checkpoint.huggingface import save_model
from tests.support import ROOT

COMMIT = OPENAI_MODELS["gpt2"][1]
REPOSITORY = "somebody/small-gpt2"
REPOSITORIES = {REPOSITORY, *(repository for repository, _ in OPENAI_MODELS.values())}


# Prints a hash of the weights, or the error as the command line does.
PROGRAM = """
import hashlib, sys
import anew
try:
    gpt = anew.GPT.from_pretrained(sys.argv[1])
except anew.UserError as error:
    print(error)
    sys.exit(2)
content = b"".join(parameter.detach().numpy().tobytes() for parameter in gpt.parameters())
print(hashlib.sha256(content).hexdigest())
"""


class Hub(ThreadingHTTPServer):
    """Serves `files` as each of REPOSITORIES at COMMIT, in the protocol of huggingface_hub.

    `faults` lists what goes wrong in the next downloads of weights: "cut", "wrong body" or an HTTP
    status. `seen` lists the method, the file and the byte range of every request. Files arrive in
    `objects` by their SHA-256 and become `files` with a commit. Uploads are answered with
    `refusal`, an HTTP status, if it is not 0.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults: list[str] = []
        self.seen: list[tuple[str, str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.refusal = 0


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
        if not match:  # huggingface_hub asks for other things too, but does not need them.
            return self.fail(404, "")
        repository, revision, name = match.groups()
        server.seen.append((self.command, name, self.headers.get("Range", "")))
        if revision not in (COMMIT, "main"):
            return self.fail(404, "RevisionNotFound")
        if repository not in REPOSITORIES:
            return self.fail(404, "RepoNotFound")
        if name not in server.files:
            return self.fail(404, "EntryNotFound")
        is_download_of_weights = body and name.endswith(".safetensors")
        fault = server.faults.pop(0) if server.faults and is_download_of_weights else ""
        if fault.isdigit():
            return self.fail(int(fault), "")
        content = server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        if fault == "wrong body":
            content = bytes(len(content))
        byte_range = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(byte_range[1]) if byte_range else 0
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

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Hub)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{server.server_port}"
        server.seen.append(("POST", self.path, ""))
        if server.refusal:
            return self.fail(server.refusal, "")
        if self.path == "/api/repos/create":
            return self.send_json({"url": f"{here}/{REPOSITORY}"})
        if self.path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.send_json({"files": [upload_mode(name) for name in names]})
        if self.path.endswith("/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                if wanted["oid"] not in server.objects:
                    href = f"{here}/objects/{wanted['oid']}"
                    wanted["actions"] = {"upload": {"href": href}}
                objects.append(wanted)
            return self.send_json({"transfer": "basic", "objects": objects})
        assert self.path.endswith("/commit/main")
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                server.files[value["path"]] = server.objects[value["oid"]]
        url = f"{here}/{REPOSITORY}/commit/{COMMIT}"
        return self.send_json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_PUT(self) -> None:
        server = self.server
        assert isinstance(server, Hub)
        server.seen.append(("PUT", self.path, ""))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == digest
        server.objects[digest] = content
        self.fail(200, "")

    def send_json(self, content: object) -> None:
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

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


def upload_mode(name: str) -> dict[str, object]:
    """Return how the hub wants to receive a file: large ones apart from the commit."""
    mode = "lfs" if name.endswith(".safetensors") else "regular"
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32)
    save_model(out, GPT(config, seed=4), Tokenizer.named("gpt2"))
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
    """Run PROGRAM to load `model` from `server`; without one, the hub cannot be reached."""
    return run([sys.executable, "-c", PROGRAM, model], server, cache, **environment)


def export(server: Hub | None, cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `anew export ... --to hub` with a token of the hub."""
    command = [sys.executable, "-m", "anew", "export", *flags, "--to", "hub"]
    return run(command, server, cache, HF_TOKEN="hf_test", HF_HUB_OFFLINE="0")


def run(
    command: list[str], server: Hub | None, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that talks to `server`; without one, the hub cannot be reached."""
    port = server.server_port if server else 9
    env = {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        **environment,
    }
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
        command,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def fingerprint(folder: Path) -> str:
    """Return the hash that PROGRAM prints for the model in `folder`."""
    parameters = GPT.from_pretrained(str(folder)).parameters()
    content = b"".join(parameter.detach().numpy().tobytes() for parameter in parameters)
    return hashlib.sha256(content).hexdigest()


def test_second_load_and_offline_load_use_the_cache(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    first = load(server, tmp_path)
    assert first.stdout.strip() == fingerprint(folder), first.stderr
    assert {name for _, name, _ in server.seen} == {"config.json", "model.safetensors"}
    n_requests = len(server.seen)
    assert load(server, tmp_path).stdout == first.stdout
    assert len(server.seen) == n_requests, "a pinned revision in the cache needs no request"
    assert load(None, tmp_path, HF_HUB_OFFLINE="1").stdout == first.stdout


@pytest.mark.parametrize("name", ["somebody/small-gpt2", "somebody/small-gpt2@" + COMMIT])
def test_models_of_other_owners_are_downloaded(
    server: Hub, folder: Path, tmp_path: Path, name: str
) -> None:
    assert load(server, tmp_path, name).stdout.strip() == fingerprint(folder)


def test_machine_without_a_network_is_told_at_once(tmp_path: Path) -> None:
    outcome = load(None, tmp_path, HF_ENDPOINT="http://hub.invalid")
    assert outcome.returncode == 2
    assert "its address is not known here" in outcome.stdout
    assert "Retry" not in outcome.stderr


def test_unknown_revision_is_refused(server: Hub, tmp_path: Path) -> None:
    # gpt2-xl is pinned to a commit that this hub does not have.
    outcome = load(server, tmp_path, "gpt2-xl")
    assert outcome.returncode == 2
    assert "no revision" in outcome.stdout


def test_weights_in_several_files_are_downloaded(server: Hub, folder: Path, tmp_path: Path) -> None:
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


def test_interrupted_download_resumes_where_it_stopped(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    server.faults = ["cut"]
    outcome = load(server, tmp_path)
    if outcome.returncode == 2:  # Some versions of huggingface_hub do not try again by themselves.
        assert "continues where it stopped" in outcome.stdout
        outcome = load(server, tmp_path)
    assert outcome.stdout.strip() == fingerprint(folder), outcome.stdout + outcome.stderr
    assert any(byte_range for _, _, byte_range in server.seen), (
        "the second request asks only for the rest"
    )


def test_weights_with_a_wrong_sha256_are_refused_and_removed(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    server.faults = ["wrong body"]
    outcome = load(server, tmp_path)
    assert outcome.returncode == 2
    assert "SHA-256 is not the one" in outcome.stdout
    assert load(server, tmp_path).stdout.strip() == fingerprint(folder)


@pytest.mark.parametrize("status", ["404", "429", "503", "403"])
def test_http_errors_are_reported_with_their_status(
    server: Hub, tmp_path: Path, status: str
) -> None:
    server.faults = [status] * 20
    outcome = load(server, tmp_path)
    assert outcome.returncode == 2, outcome.stdout + outcome.stderr
    assert status in outcome.stdout
    assert "Traceback" not in outcome.stderr


def test_missing_models_and_files_are_reported(server: Hub, tmp_path: Path) -> None:
    assert "nor a public model on the hub" in load(server, tmp_path, "somebody/else").stdout
    del server.files["model.safetensors"]
    assert "only safetensors" in load(server, tmp_path).stdout
    assert "hub's cache" in load(None, tmp_path / "empty", HF_HUB_OFFLINE="1").stdout


def test_export_to_the_hub_uploads_nothing_unless_asked(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    outcome = export(server, tmp_path, str(folder), "--repo", REPOSITORY, "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert "nothing was uploaded; add --push" in outcome.stdout
    facts = json.loads(outcome.stdout.splitlines()[-1])
    assert facts["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert server.seen == []


def test_uploaded_model_is_downloaded_again(server: Hub, folder: Path, tmp_path: Path) -> None:
    server.files = {}
    flags = [str(folder), "--repo", REPOSITORY, "--push", "--private"]
    outcome = export(server, tmp_path, *flags)
    assert outcome.returncode == 0, outcome.stderr
    assert f"is now http://127.0.0.1:{server.server_port}/{REPOSITORY}" in outcome.stdout
    assert f'from_pretrained("{REPOSITORY}")' in server.files["README.md"].decode()
    again = load(server, tmp_path, REPOSITORY)
    assert again.stdout.strip() == fingerprint(folder), again.stderr
    server.seen = []
    assert export(server, tmp_path, *flags).returncode == 0
    assert not [path for method, path, _ in server.seen if method == "PUT"], "it has the weights"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [(401, "hf auth login"), (403, "hf auth login"), (500, "answered 500")],
)
def test_refused_upload_is_explained(
    server: Hub, folder: Path, tmp_path: Path, refusal: int, words: str
) -> None:
    server.refusal = refusal
    outcome = export(server, tmp_path, str(folder), "--repo", REPOSITORY, "--push")
    assert outcome.returncode == 2, outcome.stderr
    assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_upload_without_an_owner_is_refused(folder: Path, tmp_path: Path) -> None:
    outcome = export(None, tmp_path, str(folder), "--repo", "mine")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert "OWNER/NAME" in outcome.stderr
