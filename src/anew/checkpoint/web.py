"""Write a model as a folder that a browser runs by itself, from any server of files.

    write_web(folder, gpt, tokenizer, "int8", "demo")

| path | content |
|---|---|
| `index.html`, `page.js`, `page.css` | the page |
| `model/` | what transformers.js expects: config, tokenizer, `onnx/model.onnx` with a cache |
| `runtime/` | transformers.js and ONNX Runtime, which compute with WebGPU or WebAssembly |

The page loads nothing from elsewhere. The runtime comes from npm once, at fixed versions whose
archives are verified by their SHA-512, and is kept in the cache folder.
"""

import base64
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from anew.checkpoint.huggingface import save_for_sharing
from anew.checkpoint.onnx import MAX_BYTES_IN_GRAPH, write_decoder_onnx
from anew.errors import UserError
from anew.model.flops import count_parameters
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import atomic_folder, cache_folder

PAGE = Path(__file__).parent / "web_page"
# The name that transformers.js gives to the graph of each dtype, and its own name for the dtype.
GRAPHS = {
    "f32": ("model.onnx", "fp32"),
    "f16": ("model_fp16.onnx", "fp16"),
    "int8": ("model_quantized.onnx", "q8"),
}
NOT_NEEDED = ("model.safetensors", "README.md")  # by transformers.js


class Package(NamedTuple):
    """A package of npm, and the files of it that the page needs."""

    name: str
    version: str
    sha512: str  # of the archive, in base64, as npm states it
    files: tuple[str, ...]


RUNTIME = (
    Package(
        "@huggingface/transformers",
        "4.3.2",
        "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
        ("dist/transformers.min.js", "LICENSE"),
    ),
    Package(
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",  # the one that this version of transformers.js names
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        (
            "dist/ort-wasm-simd-threaded.asyncify.mjs",
            "dist/ort-wasm-simd-threaded.asyncify.wasm",
        ),
    ),
)


def write_web(folder: Path, gpt: GPT, tokenizer: Tokenizer, dtype: str, name: str) -> None:
    """Write the page, the runtime and the model, under `name`, into an empty folder.

    `dtype` is "f32", "f16" (half the size, for GPUs) or "int8" (dynamic quantisation, a quarter of
    the size). Raises UserError if the model is too large for one file, or if the runtime cannot
    be had.
    """
    if 4 * count_parameters(gpt.config) > MAX_BYTES_IN_GRAPH:
        raise UserError(
            "--to web is for models of up to 375M parameters, and this one has "
            f"{count_parameters(gpt.config) / 1e6:,.0f}M; use --to gguf."
        )
    runtime = fetch_runtime()
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    shutil.copytree(runtime, folder / "runtime")
    model = folder / "model"
    model.mkdir()
    save_for_sharing(model, gpt, tokenizer, readme="")
    for unneeded in NOT_NEEDED:
        (model / unneeded).unlink()
    file, dtype_there = GRAPHS[dtype]
    (model / "onnx").mkdir()
    graph = model / "onnx" / file
    write_decoder_onnx(graph, gpt, torch.float16 if dtype == "f16" else torch.float32)
    if dtype == "int8":
        _quantise(graph)
    settings = {
        "name": name,
        "dtype": dtype_there,
        "end_of_text": tokenizer.end_of_text,
        "positions": gpt.config.n_positions,
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _quantise(graph: Path) -> None:
    """Store the matrices of a graph in 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.onnx"
        shutil.move(graph, whole)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it would advise to prepare the graph first
        try:
            quantize_dynamic(whole, graph, weight_type=QuantType.QUInt8)
        finally:
            root.setLevel(level)


def fetch_runtime() -> Path:
    """Return a folder with the files of RUNTIME, fetched by npm if they are not in the cache."""
    digest = hashlib.sha256(repr(RUNTIME).encode()).hexdigest()[:12]
    folder = cache_folder() / "web-runtime" / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary, tempfile.TemporaryDirectory() as downloads:
        for package in RUNTIME:
            archive = _fetch_package(package, Path(downloads))
            with tarfile.open(archive) as content:
                for file in package.files:
                    source = content.extractfile(f"package/{file}")
                    assert source is not None
                    name = Path(file).name
                    if name == "LICENSE":
                        name = f"LICENSE-{package.name.rpartition('/')[2]}"
                    with (temporary / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
    return folder


def _fetch_package(package: Package, folder: Path) -> Path:
    """Return the archive of a package, which npm downloads. Raises UserError if it is another."""
    wanted = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "--to web needs npm, which comes with Node.js, to fetch transformers.js once; install "
            "Node.js and run the same command again."
        )
    command = [npm, "pack", "--loglevel=error", wanted]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    name = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not name:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
        raise UserError(f"npm could not fetch {wanted} ({reason}); run the same command again.")
    archive = folder / name
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise UserError(
            f"npm has sent another {wanted} than the one that is expected (sha512 {found[:12]}...)."
        )
    return archive
