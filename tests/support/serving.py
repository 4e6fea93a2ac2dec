"""Two small models on disk, and `anew serve` in a process of its own."""

import contextlib
import http.client
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint.huggingface import save_model

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=256, vocab_size=257)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two models that read bytes."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("models") / f"model-{seed}"
        folder.mkdir()
        model = GPT(CONFIG, seed=seed)
        with torch.no_grad():
            # Larger weights make some choices clear and end of text rare.
            model.transformer.wte.weight.mul_(8)
        save_model(folder, model, Tokenizer.named("bytes"))
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def chat_model(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in the form of those that were trained on conversations."""
    folder = tmp_path_factory.mktemp("models") / "talker"
    folder.mkdir()
    model = GPT.from_pretrained(str(models[0]))
    save_model(folder, model, Tokenizer.named("bytes"), is_chat=True)
    return folder


@contextlib.contextmanager
def served(*arguments: str, module: str = "anew") -> Iterator[str]:
    """Run `anew serve` in a process of its own, and give its address.

    Another `module` is another command line, such as one with a fault.
    """
    command = [sys.executable, "-m", module, "serve", *arguments]
    command += ["--port", "0", "--precision", "fp32", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert address.startswith("http://127.0.0.1:"), address
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (0, 130, -signal.SIGINT)


@dataclass(frozen=True)
class Answer:
    """What the server has answered to a request."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


def request(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> Answer:
    """Send a request; its content type is JSON unless `headers` has another one."""
    host = address.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Send JSON; return the status and the body of the answer."""
    answer = request(address, "POST", path, body, **headers)
    return answer.status, answer.body
