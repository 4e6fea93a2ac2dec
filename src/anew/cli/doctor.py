"""`anew doctor`: what this machine can do, checked by doing it.

anew doctor
anew doctor --json
"""

import importlib.metadata
import itertools
import json
import logging
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

import anew
from anew.cli.parse import parse
from anew.config.recipes import recipe
from anew.config.schema import RunConfig
from anew.data.sources import find
from anew.training.run_log import read_metrics
from anew.training.trainer import train
from anew.utils.compiler import missing_for_compile
from anew.utils.device import pick_device, processor_name, set_up_device
from anew.utils.files import cache_folder
from anew.utils.memory import machine_memory

log = logging.getLogger("anew")

# Package: what it is needed for. All are optional.
OPTIONAL_PACKAGES = {
    "tensorboard": "curves in TensorBoard",
    "transformers": "comparisons",
    "matplotlib": "--picture",
    "fastapi": "anew serve",
    "tokenizers": "--tokenizer train:N",
    "gguf": "export --to gguf",
    "onnx": "export --to onnx",
    "lm_eval": "evaluate --task harness:NAME",
}
TEST_STEPS = 20
TEST_BYTES = 100_000


@dataclass(frozen=True)
class DoctorArgs:
    """Check what this machine can do, in half a minute. Example: anew doctor"""

    json: bool = False
    """the last line of standard output is one JSON object"""


class Finding(NamedTuple):
    """The result of one check."""

    works: bool
    text: str


def run_doctor(argv: list[str]) -> None:
    """Check the machine, the packages, and that training and resuming work here."""
    args = parse(DoctorArgs, argv, "doctor")
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "machine": _machine,
        "device": _device,
        "compile": _compile,
        "ranks": _ranks,
        "disk": _disk,
        "packages": _packages,
        "training": _training,
    }
    findings: dict[str, Finding] = {}
    for name, check in checks.items():
        findings[name] = _run_check(check)
        mark = "ok" if findings[name].works else "--"
        print(f"{mark}  {name:<9} {findings[name].text}", flush=True)
    if args.json:
        facts = {name: finding._asdict() for name, finding in findings.items()}
        print(json.dumps(facts))
    if not findings["training"].works:
        sys.exit(1)


def _run_check(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (an error is the result of the check)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return Finding(False, first_line)


def _versions() -> Finding:
    python = platform.python_version()
    text = f"anew {anew.__version__}, Python {python}, torch {torch.__version__}"
    return Finding(True, f"{text}, {platform.system()}")


def _machine() -> Finding:
    gigabytes = machine_memory() / 1e9
    return Finding(
        True, f"{processor_name()}, {torch.get_num_threads()} threads, {gigabytes:.0f} GB"
    )


def _device() -> Finding:
    runtime = set_up_device(RunConfig(compile="off"))
    device, precision, _ = runtime.reasons
    return Finding(True, f"{device.removeprefix('device ')}; {precision}")


def _compile() -> Finding:
    device = pick_device("auto")
    missing = missing_for_compile(device)
    if missing:
        return Finding(False, f"not available ({missing}); training runs eagerly")
    began = time.perf_counter()
    double = torch.compile(lambda x: 2 * x + 1)
    result = double(torch.ones(8, device=device))
    is_right = bool((result == 3).all())
    seconds = time.perf_counter() - began
    return Finding(is_right, f"works; a first small function took {seconds:.0f} s")


def _ranks() -> Finding:
    if not distributed.is_available():
        return Finding(False, "this build of torch has no torch.distributed; one process only")
    backends = {
        "nccl": distributed.is_nccl_available(),
        "gloo": distributed.is_gloo_available(),
    }
    names = [name for name, is_available in backends.items() if is_available]
    gpus = torch.cuda.device_count()
    return Finding(bool(names), f"{gpus} NVIDIA GPUs; torchrun with {' and '.join(names)}")


def _disk() -> Finding:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    here = shutil.disk_usage(Path()).free / 1e9
    there = shutil.disk_usage(cache).free / 1e9
    return Finding(here > 1 and there > 1, f"{here:.0f} GB free here, {there:.0f} GB for {cache}")


def _packages() -> Finding:
    missing = []
    for package, purpose in OPTIONAL_PACKAGES.items():
        try:
            importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{package} ({purpose})")
    if not missing:
        return Finding(True, "all optional packages are installed")
    return Finding(False, f"without {', '.join(missing)}")


def _training() -> Finding:
    """Train a tiny model, and the same one in two parts; the losses must be equal."""
    began = time.perf_counter()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as name:
            whole, resumed = _train_whole_and_in_parts(Path(name))
    finally:
        log.setLevel(level)
    seconds = time.perf_counter() - began
    has_learned = whole[-1] < whole[0] - 0.3
    is_equal = whole == resumed
    # On a GPU, kernels may add in another order unless --deterministic is set.
    must_be_equal = pick_device("auto").type == "cpu"
    comparison = "is equal bit for bit" if is_equal else "differs"
    text = (
        f"loss {whole[0]:.2f} to {whole[-1]:.2f} in {TEST_STEPS} steps; a resumed run {comparison} "
        f"({seconds:.0f} s)"
    )
    return Finding(has_learned and (is_equal or not must_be_equal), text)


def _train_whole_and_in_parts(folder: Path) -> tuple[list[float], list[float]]:
    """Return the losses of a run, and of one that was begun again from its middle checkpoint."""
    text = folder / "text.txt"
    library = itertools.islice(find("stdlib").documents(), 40)
    text.write_bytes(b"".join(library)[:TEST_BYTES])
    config = recipe(
        "demo",
        data=str(text),
        steps=TEST_STEPS,
        save_every=TEST_STEPS // 2,
        val_tokens=0,
        sample_every=0,
        out=str(folder / "run"),
    )
    train(config)
    whole = [row["train/loss"] for row in read_metrics(config.folder)]
    shutil.rmtree(config.folder / "checkpoints" / f"step-{TEST_STEPS:08d}")
    train(config)
    return whole, [row["train/loss"] for row in read_metrics(config.folder)]
