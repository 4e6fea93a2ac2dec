"""Choose the device, precision and compiler of a process, and measure the device.

    runtime = set_up_device(config.run)
    print(runtime.device, runtime.precision, runtime.reasons)

| device | auto precision |
|---|---|
| CUDA, compute capability 8.0 or newer | bf16 (fast, with fp32's range: no loss scaling) |
| older CUDA (V100, T4) | fp16 with a GradScaler |
| XPU (Intel; offered by PyTorch, not tested here) | bf16 |
| CPU with AVX512-BF16 or AMX | bf16 |
| other CPU, Apple silicon | fp32 |
"""

import contextlib
import ctypes
import functools
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
from anew.utils.compiler import missing_for_compile
from anew.utils.gpus import known

# What activations are computed in.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# The argument of torch.set_float32_matmul_precision.
MATMUL_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "highest", "fp16": "highest"}

# Options of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


@dataclass(frozen=True)
class Runtime:
    """Where and how one process computes. `distributed.world.World` has the other processes."""

    device: torch.device
    precision: str
    compile: bool
    reasons: tuple[str, ...]  # a line for each decision, for the log

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations. Weights are always kept in fp32."""
        return DTYPES[self.precision]


class DeviceSettings(Protocol):
    """The settings that `set_up_device` reads; `config.schema.RunConfig` has them."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> str: ...
    @property
    def deterministic(self) -> bool: ...


def set_up_device(run: DeviceSettings) -> Runtime:
    """Choose device, precision and compiler, and set PyTorch's process-wide modes to match.

    Raises UserError if the machine lacks what the settings ask for.
    """
    device = pick_device(run.device)
    if device.index is not None:
        # Without this call, PyTorch uses the first GPU in every process.
        torch.accelerator.set_device_index(device)
    precision, precision_reason = pick_precision(run.precision, device)
    compiles, compile_reason = pick_compile(run.compile, device)
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])
    # PyTorch recommends TF32 where fp32 was chosen; `precision` decides that.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    # cuBLAS may split a sum over many tokens and add the parts. Keep the parts in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.type == "cpu":
        _keep_freed_memory()
    # Without deterministic algorithms, compiled code adds up the gradient of `wte` with atomics, on
    # a CPU too: 55 of 400 steps differed in a bit.
    torch.use_deterministic_algorithms(run.deterministic or device.type == "cpu")
    # Filling new tensors costs time and is not needed: nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    why = (
        f"device {device.type} ({_name_of(device)})",
        f"precision {precision}: {precision_reason}",
        compile_reason,
    )
    return Runtime(device, precision, compiles, why)


def _name_of(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    if device.type == "mps":
        return "Apple GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def _keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees.

    Memory returned to Linux has to be mapped again at the next step, page by page (docs/log.md, 2).
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)


def before_process_group(run: DeviceSettings) -> None:
    """Set what NCCL reads when the process group is created.

    On NVSwitch machines, NCCL can sum inside the switch (NVLS), in an order that changes from call
    to call (NCCL issue 1497). Deterministic runs exclude that algorithm.
    """
    if run.deterministic:
        os.environ.setdefault("NCCL_ALGO", "^NVLS")


def environment(runtime: Runtime) -> dict[str, str]:
    """Return what a measurement of this process depends on, to be stored beside it."""
    return {
        "device": runtime.reasons[0].removeprefix("device "),
        "processor": processor_name(),
        "precision": runtime.precision,
        "compiled": "yes" if runtime.compile else "no",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def processor_name() -> str:
    """Return the model of the CPU and the vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # on Linux it has the name of the model
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    matrix_unit = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{matrix_unit})"


def pick_device(wanted: str) -> torch.device:
    """Return the device that "auto", "cpu", "cuda", "mps" or "xpu" means for this process.

    Under torchrun each process has a GPU of its own.
    """
    available = "cpu"
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            available = accelerator.type
    if wanted == "auto":
        problem = unusable_gpu() if available == "cpu" else ""
        if problem:
            raise UserError(f"{problem}, or use --device cpu.")
        wanted = available
    if wanted not in (available, "cpu"):
        problem = unusable_gpu() if wanted == "cuda" else ""
        if not problem:
            problem = f"this machine (or this build of torch) has no {wanted}"
        raise UserError(f"{problem}; use --device {available}.")
    if wanted in ("cuda", "xpu"):
        return torch.device(wanted, _gpu_index())
    return torch.device(wanted)


def unusable_gpu() -> str:
    """Return why PyTorch cannot use the NVIDIA GPU of this machine, and what to do.

    Return an empty string if there is no GPU or if it is hidden on purpose.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if is_hidden or not Path("/dev/nvidia0").exists():
        return ""
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build without "
            "CUDA: install one with it"
        )
    return (
        f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use: its driver is "
        f"probably older than CUDA {torch.version.cuda} needs (CUDA 13 needs driver 580); update "
        "the driver or install a build of torch for an older CUDA"
    )


def _gpu_index() -> int:
    """Return the index of this rank's GPU."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    visible = torch.accelerator.device_count()
    if visible == 1:
        # Some launchers show each process only its own GPU (srun --gpus-per-task=1).
        return 0
    if rank >= visible:
        raise UserError(
            f"rank {rank} of this machine has no GPU: {visible} are visible; start as many ranks "
            f"a machine as it has GPUs (--nproc-per-node {visible})."
        )
    return rank


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """Return the precision that "auto" or a name means on a device, and the reason."""
    if wanted == "auto":
        return _auto_precision(device)
    capability = _compute_capability(device)
    if wanted == "tf32" and capability < (8, 0):
        raise UserError(
            "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer; use --precision fp32."
        )
    if wanted == "bf16" and device.type == "cuda" and capability < (8, 0):
        raise UserError(
            f"bf16 needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}; "
            "use --precision fp16."
        )
    if wanted in ("bf16", "fp16") and device.type == "mps":
        raise UserError(f"{wanted} training is not reliable on MPS; use --precision fp32.")
    if wanted == "fp16" and device.type == "cpu":
        return wanted, "as requested (fp16 on a CPU is many times slower than bf16)"
    if wanted == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        return wanted, "as requested (this CPU has no bf16 instructions; fp32 is much faster)"
    return wanted, "as requested"


def _auto_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        major, minor = _compute_capability(device)
        if major >= 8:
            return "bf16", f"compute capability {major}.{minor}"
        return "fp16", f"compute capability {major}.{minor} has no bf16; with loss scaling"
    if device.type == "xpu":
        return "bf16", "Intel GPUs have bf16 instructions"
    if device.type == "mps":
        # In bf16, its attention attends to later positions (pytorch 195910).
        return "fp32", "MPS computes most reliably in fp32"
    if cpu_has_bf16():
        return "bf16", "the CPU has bf16 instructions"
    return "fp32", "the CPU has no bf16 instructions"


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 matrices. Others are many times slower in bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, and (0, 0) for other devices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return 0, 0


def pick_compile(wanted: str, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile the training step, and the reason."""
    missing = missing_for_compile(device)
    if wanted in ("on", "blocks") and missing:
        raise UserError(
            f"torch.compile cannot work here: {missing}; install it, or use --compile off."
        )
    if wanted == "off":
        return False, "eager (compile off)"
    if missing:
        return False, f"eager: {missing}"
    return True, "compiled (the first step takes a while)"


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply fp32 matrices in TF32 inside the block if `precision` is tf32, else in true fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_flops(runtime: Runtime) -> tuple[float, str]:
    """Return the FLOP/s that MFU is measured against, and the source of the figure.

    It is the datasheet's peak of a known GPU, and otherwise the speed of matrix products, which is
    measured once in a process for each device, precision and number of threads.
    """
    if runtime.device.type != "cuda":
        flops = _measure_product(runtime.device, runtime.precision, torch.get_num_threads())
        source = f"a {runtime.precision} matrix product timed here"
        return flops, f"{flops / 1e12:.3g} TFLOP/s, {source}"
    gpu = known(torch.cuda.get_device_name(runtime.device))
    tflops = gpu.peak(runtime.precision) if gpu is not None else None
    if gpu is not None and tflops is not None:
        return tflops * 1e12, f"{tflops} TFLOP/s, {gpu.source}"
    flops = _measure_product_on_cuda(runtime.device, runtime.precision)
    source = f"products of two matrices of 8192 x 8192 in {runtime.precision}, timed here"
    return flops, f"{flops / 1e12:.3g} TFLOP/s, {source}"


@functools.cache
def _measure_product(device: torch.device, precision: str, _n_threads: int) -> float:
    """Return the FLOP/s of the first matrix product of a feed-forward layer of GPT-2 124M.

    It depends on the number of threads in use, which is a parameter for the cache only.
    """
    a = torch.randn(2048, 768, dtype=DTYPES[precision], device=device)
    b = torch.randn(768, 3072, dtype=DTYPES[precision], device=device)
    if _seconds_of_product(a[:64], b) > 0.2:
        # fp16 on a CPU without instructions for it takes 10 s for all rows.
        a = a[:64]
    times = [_seconds_of_product(a, b)]
    while len(times) < 8 and sum(times) < 0.2:
        times.append(_seconds_of_product(a, b))
    return 2 * len(a) * 768 * 3072 / min(times)


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    begin = time.perf_counter()
    (a @ b).flatten()[:1].cpu()  # the copy waits for the device
    return time.perf_counter() - begin


@functools.cache
def _measure_product_on_cuda(
    device: torch.device, precision: str, width: int = 8192, products: int = 10
) -> float:
    """Return the FLOP/s of large matrix products in a row.

    The time of one small product would be that of its launch.
    """
    a = torch.randn(width, width, dtype=DTYPES[precision], device=device)
    b = torch.randn(width, width, dtype=DTYPES[precision], device=device)
    torch.mm(a, b)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(products):
        torch.mm(a, b)
    end.record()
    end.synchronize()
    seconds = begin.elapsed_time(end) / 1e3
    return products * 2 * width**3 / seconds


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory, which `peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On CUDA it is what PyTorch allocated, otherwise the memory of the process (Linux; 0 elsewhere).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
