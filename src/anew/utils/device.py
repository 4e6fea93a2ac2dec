"""Where am I: device, precision and compiler, decided once and said in words.

    runtime = start(config.run)
    print(runtime.device, runtime.precision, runtime.why)

| device | auto precision |
|---|---|
| CUDA, compute capability 8.0 on | bf16 (its matrices and fp32's range: no loss scaling) |
| older CUDA (V100, T4) | fp16 with a GradScaler |
| XPU (Intel; torch offers it, nobody has run it here) | bf16 |
| CPU with AVX512-BF16 or AMX | bf16 |
| other CPU, Apple silicon | fp32 |
"""

import contextlib
import ctypes
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from anew.errors import UserError
from anew.utils import gpus as devices
from anew.utils.compiler import missing_for_compile

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

MATMUL = {
    "fp32": "highest",
    "tf32": "high",
    "bf16": "highest",
    "fp16": "highest",
}  # what torch does with fp32 matrices


@dataclass(frozen=True)
class Runtime:
    """Where one process computes, and how. `parallel.World` holds the number of processes."""

    device: torch.device
    precision: str
    compile: bool
    why: tuple[str, ...]  # a line for each decision, for the log

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in; weights are always kept in fp32."""
        return DTYPES[self.precision]


class DeviceSettings(Protocol):
    """The settings that decide where and how a process computes; `config.schema.RunConfig` has them."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...


def environment(rt: Runtime) -> dict[str, str]:
    """What a figure of this process depends on, for whoever reads it later."""
    return {
        "device": rt.why[0].removeprefix("device "),
        "precision": rt.precision,
        "compiled": "yes" if rt.compile else "no",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def start(run: DeviceSettings) -> Runtime:
    """Choose device, precision and compiler, refuse what the machine lacks, and set torch's process-wide modes to match."""
    device = pick_device(run.device)
    if device.index is not None:
        torch.accelerator.set_device_index(
            device
        )  # what torch picks by itself is the first, also for the second rank
    precision, reason = pick_precision(run.precision, device)
    compiles, compile_reason = pick_compile(run.compile, device)
    torch.set_float32_matmul_precision(MATMUL[precision])
    warnings.filterwarnings(
        "ignore", message="TensorFloat32 tensor cores"
    )  # which are not used on purpose: `precision` says so
    # cuBLAS may split a long sum over tokens and add the parts; these keep the parts in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.type == "cpu":
        _keep_freed_memory()
    _be_deterministic(run.deterministic or device.type == "cpu")
    why = (
        f"device {device.type} ({_name_of(device)})",
        f"precision {precision}: {reason}",
        compile_reason,
    )
    return Runtime(device, precision, compiles, why)


def _name_of(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    if device.type == "mps":
        return "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def before_process_group(run: DeviceSettings) -> None:
    """Settings that NCCL reads when the process group is made.

    NVSwitch machines can sum inside the switch (NVLS), in another order from call to call (NCCL issue 1497).
    """
    if run.deterministic:
        os.environ.setdefault("NCCL_ALGO", "^NVLS")


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees: given back to Linux, it has to be faulted in again, page by page (docs/log.md, 2)."""
    if sys.platform != "linux":
        return
    mmap_max, trim_threshold, top_pad = (
        -4,
        -1,
        -2,
    )  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20)):
            libc.mallopt(option, value)


def _be_deterministic(wanted: bool) -> None:
    """Without this, compiled code adds up the gradient of `wte` with atomics, on a CPU too: 55 of 400 steps differed in a bit."""
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time: nothing here reads what it has not written


def pick_device(wanted: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "mps" or "xpu" means here; under torchrun each process has a GPU of its own."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    here = accelerator.type if accelerator is not None else "cpu"
    if wanted == "auto":
        if here == "cpu" and (problem := unusable_gpu()):
            raise UserError(f"{problem}, or use --device cpu.")
        wanted = here
    if wanted not in (here, "cpu"):
        problem = unusable_gpu() if wanted == "cuda" else ""
        raise UserError(
            f"{problem or f'this machine (or this build of torch) has no {wanted}'}; use --device {here}."
        )
    return torch.device(wanted, _gpu_index()) if wanted in ("cuda", "xpu") else torch.device(wanted)


def unusable_gpu() -> str:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; empty if there is none, or if it is hidden on purpose."""
    if not Path("/dev/nvidia0").exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in (
        "",
        "-1",
    ):
        return ""
    if torch.version.cuda is None:
        return f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA: install one with it"
    return (
        f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use: its driver is probably older than CUDA "
        f"{torch.version.cuda} needs (CUDA 13 needs driver 580); update the driver or install a build of torch for an older CUDA"
    )


def _gpu_index() -> int:
    """This rank's GPU. Some launchers show each process a single one, which is then number 0 (srun --gpus-per-task=1)."""
    rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if visible == 1:
        return 0
    if rank >= visible:
        raise UserError(
            f"rank {rank} of this machine has no GPU: {visible} are visible; start as many ranks a machine as it has GPUs "
            f"(--nproc-per-node {visible})."
        )
    return rank


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, why)."""
    sm = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if wanted == "tf32" and sm < (8, 0):
        raise UserError(
            "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer; use --precision fp32."
        )
    if wanted == "bf16" and device.type == "cuda" and sm < (8, 0):
        raise UserError(
            f"bf16 needs compute capability 8.0, and this GPU has {sm[0]}.{sm[1]}; use --precision fp16."
        )
    if wanted in ("bf16", "fp16") and device.type == "mps":
        raise UserError(f"{wanted} training is not reliable on MPS; use --precision fp32.")
    if wanted != "auto":
        slow = wanted == "fp16" and device.type == "cpu"
        return wanted, "as asked" + (
            " (fp16 on a CPU is many times slower than bf16)" if slow else ""
        )
    if device.type == "cuda":
        return (
            ("bf16", f"compute capability {sm[0]}.{sm[1]}")
            if sm >= (8, 0)
            else ("fp16", f"compute capability {sm[0]}.{sm[1]} has no bf16; with loss scaling")
        )
    if device.type == "xpu":
        return "bf16", "Intel GPUs have bf16 instructions"
    if device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return "bf16", "the CPU has bf16 instructions"
    return (
        "fp32",
        "MPS computes most reliably in fp32"
        if device.type == "mps"
        else "the CPU has no bf16 instructions",
    )


def pick_compile(wanted: str, device: torch.device) -> tuple[bool, str]:
    """(compile the training step?, why)."""
    missing = missing_for_compile(device)
    if wanted in ("on", "blocks") and missing:
        raise UserError(
            f"torch.compile cannot work here: {missing}; install it, or use --compile off."
        )
    if wanted == "off":
        return False, "eager, as asked"
    return (
        (False, f"eager: {missing}")
        if missing
        else (True, "compiled (the first step takes a while)")
    )


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply fp32 matrices as `precision` says inside the block: true fp32 unless it is tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_flops(runtime: Runtime) -> tuple[float, str]:
    """Floating-point operations a second that MFU is measured against, and where the figure comes from."""
    gpu = (
        devices.known(torch.cuda.get_device_name(runtime.device))
        if runtime.device.type == "cuda"
        else None
    )
    if gpu is not None and (tflops := gpu.peak(runtime.precision)):
        return tflops * 1e12, f"{tflops} TFLOP/s, {gpu.source}"
    if runtime.device.type == "cuda":
        flops = _product_flops_on_gpu(runtime)
        return (
            flops,
            f"{flops / 1e12:.3g} TFLOP/s, products of two matrices of 8192 x 8192 in {runtime.precision}, timed here",
        )
    a, b = (
        torch.randn(shape, dtype=runtime.dtype, device=runtime.device)
        for shape in ((2048, 768), (768, 3072))
    )
    if _seconds(a[:64], b) > 0.2:  # fp16 on a CPU without it: 10 s for all rows
        a = a[:64]
    times = [_seconds(a, b)]
    while len(times) < 8 and sum(times) < 0.2:
        times.append(_seconds(a, b))
    best = min(times)
    flops = 2 * len(a) * 768 * 3072 / best
    return flops, f"{flops / 1e12:.3g} TFLOP/s, a {runtime.precision} matrix product timed here"


def _product_flops_on_gpu(runtime: Runtime, width: int = 8192, products: int = 10) -> float:
    """Operations a second of large matrix products in a row: one small product would measure its launch."""
    a, b = (torch.randn(width, width, dtype=runtime.dtype, device=runtime.device) for _ in range(2))
    torch.mm(a, b)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(products):
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return products * 2 * width**3 / (begin.elapsed_time(end) / 1e3)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    begin = time.perf_counter()
    (a @ b).flatten()[:1].cpu()  # the copy waits for the device
    return time.perf_counter() - begin


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory, which `peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of torch on a GPU, otherwise of the process (Linux only; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
