"""Files from strangers: malicious pickles and archives, and random changes in headers."""

import gzip
import json
import os
import pickle
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import DEFAULT_PROTOCOL

from anew import GPT, Config, GPTConfig, Tokenizer, UserError
from anew.checkpoint.huggingface import load_model, read_config, save_model
from anew.data.dataset import open_data
from anew.data.shards import DataFolder
from tests.faults.common import FaultResult, tiny

Attacks = dict[str, Callable[[], Any]]  # by name, a function that opens the malicious file


def _save_tiny_model(folder: Path) -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=257)
    folder.mkdir(parents=True)
    save_model(folder, GPT(config, seed=1), Tokenizer.named("bytes"))


# --- malicious files ------------------------------------------------------------------------------


class TouchFile:
    """An object whose pickle creates the file `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def malicious_files(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Open each malicious file once: all are refused and none has an effect."""
    result = FaultResult()
    touched = scratch / "touched"
    _save_tiny_model(scratch / "good")
    attacks = _pickle_attacks(scratch, touched)
    attacks |= _archive_attacks(scratch)
    attacks |= _model_attacks(scratch)
    attacks |= _data_attacks(scratch, touched)
    for name, attack in attacks.items():
        try:
            attack()
            result.check(False, f"{name}: accepted")
        except UserError:
            pass
        except BaseException as error:  # noqa: BLE001 (any other error is a failure to report)
            result.check(False, f"{name}: {type(error).__name__} {error}")
        result.injections += 1
    has_effect = touched.exists() or (scratch.parent / "touched").exists()
    result.check(not has_effect, "something was executed or written outside")
    return result


def _copy_of_model(scratch: Path, name: str, with_weights: bool = True) -> Path:
    folder = scratch / name
    shutil.copytree(scratch / "good", folder)
    if not with_weights:
        (folder / "model.safetensors").unlink()
    return folder


def _pickle_attacks(scratch: Path, touched: Path) -> Attacks:
    """Return attacks with pickles that execute a command, as model files of several formats."""
    bomb = TouchFile(touched)
    attacks: Attacks = {}
    some_weights = {"transformer.wte.weight": torch.zeros(2, 2)}
    pt_files: dict[str, dict[str, Any]] = {
        "pt": {"model": bomb, "model_args": {}},
        "pt-config": {"model": {}, "config": bomb},
        "pt-optimizer": {"model": some_weights, "optimizer": bomb, "model_args": {}},
    }
    for name, content in pt_files.items():
        path = scratch / f"{name}.pt"
        torch.save(content, path)
        attacks[name] = partial(load_model, str(path))
    bare_pickle = scratch / "raw.pt"
    bare_pickle.write_bytes(pickle.dumps(bomb))
    attacks["bare pickle"] = partial(load_model, str(bare_pickle))

    folder = _copy_of_model(scratch, "bin", with_weights=False)
    torch.save({"wte.weight": bomb}, folder / "pytorch_model.bin")
    attacks["pytorch_model.bin"] = partial(load_model, str(folder))
    folder = _copy_of_model(scratch, "legacy", with_weights=False)
    in_torchs_protocol = pickle.dumps({"wte.weight": bomb}, DEFAULT_PROTOCOL)
    (folder / "pytorch_model.bin").write_bytes(in_torchs_protocol)
    attacks["legacy .bin"] = partial(load_model, str(folder))
    folder = _copy_of_model(scratch, "dcp", with_weights=False)
    (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    attacks["DCP metadata"] = partial(load_model, str(folder))
    return attacks


def _archive_attacks(scratch: Path) -> Attacks:
    """Return attacks with a path that leads out of an archive, and with a decompression bomb."""
    zip_file = scratch / "zip.pt"
    with zipfile.ZipFile(zip_file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        archive.writestr("../../touched", b"out")
        archive.writestr("archive/data/0", b"\0" * 50_000_000)
    gzip_file = scratch / "bomb.jsonl.gz"
    with gzip.open(gzip_file, "wb", compresslevel=9) as file:
        for _ in range(300):
            file.write(b"0" * 1_000_000)
    return {
        "zip with a path that leads outside": partial(load_model, str(zip_file)),
        "one line of 300 MB in 300 kB": partial(
            _with_limited_memory, open_data, str(gzip_file), "bytes"
        ),
    }


def _model_attacks(scratch: Path) -> Attacks:
    """Return attacks with model folders that lead outside or claim enormous sizes."""
    traversal = _copy_of_model(scratch, "traversal", with_weights=False)
    shutil.copy(scratch / "good" / "model.safetensors", scratch / "outside.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (traversal / "model.safetensors.index.json").write_text(json.dumps(index))

    header = _copy_of_model(scratch, "header")
    header_length = (2**62).to_bytes(8, "little")
    (header / "model.safetensors").write_bytes(header_length + b"{}")

    tensor = _copy_of_model(scratch, "tensor")
    entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    encoded = json.dumps({"wte.weight": entry}).encode()
    header_length = len(encoded).to_bytes(8, "little")
    (tensor / "model.safetensors").write_bytes(header_length + encoded)

    layers = _copy_of_model(scratch, "layers")
    config = json.loads((layers / "config.json").read_text())
    config["n_layer"] = 10**9
    (layers / "config.json").write_text(json.dumps(config))
    return {
        "index that leads outside": partial(load_model, str(traversal)),
        "header of 2^62 bytes": partial(load_model, str(header)),
        "tensor of 2^62 bytes": partial(load_model, str(tensor)),
        "a billion layers": partial(_with_limited_memory, load_model, str(layers)),
    }


def _data_attacks(scratch: Path, touched: Path) -> Attacks:
    """Return attacks with data folders: pickled objects and a shard outside the folder."""
    npy = scratch / "npy"
    npy.mkdir()
    objects = np.array([TouchFile(touched)], dtype=object)
    np.save(npy / "x_train_000000.npy", objects, allow_pickle=True)

    outside = scratch / "data-outside"
    data = open_data(tiny(scratch / "run").data.data, "bytes")
    shutil.copytree(data.path, outside)
    index = json.loads((outside / "index.json").read_text())
    index["shards"][0]["name"] = "../../etc/passwd"
    (outside / "index.json").write_text(json.dumps(index))
    return {
        ".npy of objects": partial(open_data, str(npy), "gpt2"),
        "shard name that leads outside": partial(DataFolder.open, outside),
    }


def _with_limited_memory(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function with a limit of 4 GB on the additional address space.

    An attack that works then ends with an error instead of using up the machine's memory.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        return function(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- random changes -------------------------------------------------------------------------------

NUMBERS = [b"-1", b"0", b"1e308", b"NaN", b"null", b"[]", b"{}", b'"x"', b"9" * 30, b"true", b"3.5"]


def fuzzed_headers(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Change headers and configuration files at random, and open each of them."""
    result = FaultResult()
    good = scratch / "good"
    _save_tiny_model(good)
    config = tiny(scratch / "run")
    data = scratch / "data"
    shutil.copytree(open_data(config.data.data, "bytes").path, data)
    config.folder.mkdir()
    run_config = config.folder / "config.json"
    run_config.write_text(config.to_json())

    def open_shard() -> None:
        _ = DataFolder.open(data).splits["train"][0].tokens[:1]

    # The file, the length of the part that is changed, and the function that opens the file.
    targets: list[tuple[Path, int, Callable[[], Any]]] = [
        (good / "model.safetensors", 2000, lambda: load_model(good)),
        (good / "config.json", 10**6, lambda: read_config(good)),
        (good / "tokenizer.json", 3000, lambda: Tokenizer.of_folder(good)),
        (data / "index.json", 10**6, open_shard),
        (run_config, 10**6, lambda: Config.read(run_config).check()),
    ]
    slowest = 0.0
    memory_before = _peak_megabytes()
    for i in range(injections):
        path, length, open_file = targets[i % len(targets)]
        original = path.read_bytes()
        path.write_bytes(_mutate(original, length, rng))
        start = time.perf_counter()
        try:
            open_file()
        except UserError:
            pass
        except BaseException as error:  # noqa: BLE001 (any other error is a failure to report)
            result.check(False, f"{path.name}: {type(error).__name__} {error}"[:300])
        slowest = max(slowest, time.perf_counter() - start)
        path.write_bytes(original)
        result.injections += 1
    growth = _peak_megabytes() - memory_before
    result.check(growth < 200, f"memory grew by {growth:.0f} MB")
    result.check(slowest < 1, f"one file took {slowest:.2f} s")
    result.measurements["slowest file"] = f"{1000 * slowest:.0f} ms"
    result.measurements["memory growth"] = f"{growth:.0f} MB"
    return result


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _mutate(content: bytes, length: int, rng: random.Random) -> bytes:
    """Flip bits, remove or repeat bytes, or replace numbers within the first `length` bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        position = rng.randrange(min(length, max(1, len(changed))))
        kind = rng.randrange(5)
        if kind == 0:
            changed[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            end = position + rng.randint(1, 20)
            del changed[position:end]
        elif kind == 2:
            end = position + rng.randint(1, 20)
            changed[position:position] = changed[position:end]
        elif kind == 3:
            byte = bytes([rng.randrange(256)])
            changed[position : position + 1] = byte
        else:
            _replace_number(changed, position, rng)
    return bytes(changed)


def _replace_number(content: bytearray, position: int, rng: random.Random) -> None:
    """Replace the whole number at `position`, if there is one."""
    start = end = position
    while end < len(content) and chr(content[end]).isdigit():
        end += 1
    if end == position:
        return
    while start > 0 and chr(content[start - 1]).isdigit():
        start -= 1
    content[start:end] = rng.choice(NUMBERS)
