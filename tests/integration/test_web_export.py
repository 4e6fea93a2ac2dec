"""`anew export --to web`: the folder writes in a real browser what `anew sample` writes.

Skipped without Debian's chromium, or where npm cannot fetch the runtime.
"""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer, UserError, generate
from anew.checkpoint import web
from anew.checkpoint.huggingface import load_model, save_model
from anew.checkpoint.onnx import write_decoder_onnx
from tests.integration.test_browser import browser, fill, look, wait_for
from tests.support.commands import run
from tests.support.serving import models

__all__ = ["browser", "models"]  # fixtures
PROMPT = "The tower of it's 2 caf\u00e9s"
N_TOKENS = 24


def past_of(session: Any) -> dict[str, np.ndarray]:
    """Return an empty cache for one text."""
    names = [entry.name for entry in session.get_inputs() if entry.name.startswith("past")]
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    return {name: np.zeros((1, shapes[name][1], 0, shapes[name][3]), np.float32) for name in names}


def greedy_with_onnx(graph: Path, ids: list[int], n_tokens: int) -> list[int]:
    """Return the likeliest tokens, written with the cache that the graph returns."""
    session = onnxruntime.InferenceSession(graph)
    past, new, written = past_of(session), list(ids), 0
    found: list[int] = []
    for _ in range(n_tokens):
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, written + len(new)), np.int64),
            "position_ids": np.arange(written, written + len(new))[None],
        }
        logits, *present = session.run(None, {**feeds, **past})
        written += len(new)
        past = dict(zip(past, present, strict=True))
        new = [int(logits[0, -1].argmax())]
        found += new
    return found


def test_graph_with_a_cache_writes_the_same(models: list[Path], tmp_path: Path) -> None:
    model = load_model(models[0])
    write_decoder_onnx(tmp_path / "model.onnx", model)
    ids = Tokenizer.named("bytes").encode(PROMPT)
    expected = generate(model, [ids], N_TOKENS, temperature=0)[0]
    assert greedy_with_onnx(tmp_path / "model.onnx", ids, N_TOKENS) == expected


def test_graph_in_fp16_is_half_as_large_and_computes_nearly_the_same(
    models: list[Path], tmp_path: Path
) -> None:
    model = load_model(models[0])
    ids = np.array([Tokenizer.named("bytes").encode(PROMPT)])
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.size)[None],
    }
    logits = {}
    for dtype in (torch.float32, torch.float16):
        path = tmp_path / f"{dtype}.onnx"
        write_decoder_onnx(path, model, dtype)
        session = onnxruntime.InferenceSession(path)
        logits[dtype] = session.run(["logits"], {**feeds, **past_of(session)})[0]
    sizes = [(tmp_path / f"{dtype}.onnx").stat().st_size for dtype in logits]
    assert sizes[1] < 0.7 * sizes[0], "the graph itself has the same size in both"
    differences = np.abs(logits[torch.float16] - logits[torch.float32])
    assert 0 < differences.max() < 0.05 * np.abs(logits[torch.float32]).max()
    assert model.compute_dtype == torch.float32, "the model is unchanged"


def test_graph_hides_padding(models: list[Path], tmp_path: Path) -> None:
    model = load_model(models[0])
    write_decoder_onnx(tmp_path / "model.onnx", model)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ids = Tokenizer.named("bytes").encode(PROMPT)
    padded = {
        "input_ids": np.array([[0, 0, *ids]]),
        "attention_mask": np.array([[0, 0, *[1] * len(ids)]]),
        "position_ids": np.array([[0, 0, *range(len(ids))]]),
    }
    plain = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    found, expected = (
        session.run(["logits"], {**feeds, **past_of(session)})[0] for feeds in (padded, plain)
    )
    np.testing.assert_allclose(found[0, 2:], expected[0], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def runtime() -> Path:
    """The runtime, fetched by npm or found in the cache."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    try:
        return web.fetch_runtime()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [("f32", "bytes"), ("f16", "bytes"), ("int8", "bytes"), ("f32", "gpt2")],
)
def test_page_writes_in_a_browser_what_sample_writes(
    dtype: str,
    vocabulary: str,
    runtime: Path,
    browser: Any,
    models: list[Path],
    tmp_path: Path,
    served: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from selenium.webdriver.common.by import By

    tokenizer = Tokenizer.named(vocabulary)
    source = models[0]
    if vocabulary == "gpt2":
        source = tmp_path / "model"
        source.mkdir()
        shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64)
        gpt = GPT(shape, seed=4)
        with torch.no_grad():
            gpt.transformer.wte.weight.mul_(8)  # so that no two logits are nearly equal
        save_model(source, gpt, tokenizer)
    command = ["export", source, "--to", "web", "--dtype", dtype, "--out", tmp_path / "page"]
    done = run(capsys, *command)
    assert done.code == 0, done.stderr
    assert "python -m http.server" in done.stdout
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        *("index.html", "page.js", "page.css", "settings.json", "model", "runtime"),
    }
    assert len(list((tmp_path / "page" / "runtime").iterdir())) == len(list(runtime.iterdir()))
    browser.get(f"{served}/page/?device=wasm")
    wait_for(browser, "document.getElementById('write').disabled == false", 60)
    assert browser.execute_script("return document.title") == source.name
    fill(browser, prompt=PROMPT, n_tokens=str(N_TOKENS), temperature="0")
    browser.find_element(By.ID, "write").click()
    wait_for(browser, "document.getElementById('text').dataset.ids", 60)
    found = browser.execute_script("return document.getElementById('text').dataset.ids")
    ids = tokenizer.encode(PROMPT)
    end = tokenizer.end_of_text
    if dtype == "f32":
        [expected] = generate(load_model(source), [ids], N_TOKENS, end, temperature=0)
    else:
        [graph] = (tmp_path / "page" / "model" / "onnx").iterdir()
        expected = greedy_with_onnx(graph, ids, N_TOKENS)
    written = [int(token) for token in found.split() if int(token) != end]
    assert written == expected[: len(written)]
    assert len(written) == N_TOKENS or written == expected
    shown = browser.execute_script("return document.getElementById('text').textContent")
    assert shown == PROMPT + tokenizer.decode(written)
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert fetched
    assert all(name.startswith((served, "data:", "blob:")) for name in fetched), fetched
    look(browser, f"web-{dtype}-{vocabulary}-375", 375, dark=True)


def test_model_that_is_too_large_for_a_browser_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        large = GPT(GPTConfig(n_layer=36, n_head=20, n_embd=1280), seed=None)
    with pytest.raises(UserError, match="up to 375M parameters, and this one has 774M"):
        web.write_web(tmp_path, large, Tokenizer.named("gpt2"), "f32", "large")


def test_another_archive_from_npm_is_refused(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del runtime  # npm works here
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    changed = web.RUNTIME[0]._replace(sha512="A" * 88)
    monkeypatch.setattr(web, "RUNTIME", (changed,))
    with pytest.raises(UserError, match="npm has sent another @huggingface/transformers@4"):
        web.fetch_runtime()
    assert not any((tmp_path / "web-runtime").iterdir())


def test_without_npm_the_export_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs npm, which comes with Node"):
        web.fetch_runtime()
