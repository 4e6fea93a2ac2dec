"""How many sequences fit into one forward and backward pass: `--micro-batch auto`.

One sequence is tried, then two; what the second needed more is what each further one will need. The largest number that divides the batch
and leaves some memory free is tried too, then the next smaller, until one does. Ranks take the smallest of their answers, so tokens a
step stay what they are, and so do the ids in them.
"""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from anew.config import UserError
from anew.sharded import after_failed_pass
from anew.state import State

# Of the memory. Compiled code and copies on the way need some too, and in a CPU's heap holes grow to a third (docs/log.md, 14).
SHARE = {"cuda": 0.9, "cpu": 0.7}
PASSES = 3  # blocks of a later pass may not fit into the holes that the one before has left
MOST = {"cuda": 64, "cpu": 16}  # sequences; more is not faster
MOST_CPU_TOKENS = 8192  # nor is this many tokens, of which a trial takes half a minute at 124M
# As PyTorch's CPU allocator says it; CUDA's runtime, NCCL and MPS; and cuBLAS.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
WEIGHT_BYTES, MOMENT_BYTES, AVERAGE_BYTES = 4, 8, 4  # a parameter


def is_out_of_memory(error: BaseException) -> bool:
    """Is this torch's or Python's way of saying that there is no memory left, on a GPU or a CPU?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


def find_micro_batch(state: State) -> tuple[int, str]:
    """(sequences a micro-batch, a line that says why); the same on every rank. Weights and optimizer are left as they are."""
    device, world = state.rt.device, state.world
    share = state.config.batch_sequences // world.size
    most = MOST.get(device.type, 16)
    if device.type == "cpu":
        most = max(1, min(most, MOST_CPU_TOKENS // state.config.data.seq_len))
    choices = [n for n in range(1, min(most, share) + 1) if share % n == 0]
    room, usable = _room(device), SHARE.get(device.type, 0.7)
    if room is None or len(choices) == 1:
        return choices[-1], f"micro-batch {choices[-1]}" + " (memory cannot be measured here)" * (room is None)
    one, two = _peak(state, 1), _peak(state, 2)
    needs = {1: one or 0}
    if one is not None and two is not None:
        needs = {n: one + (two - one) * (n - 1) for n in choices}
    fitting = [n for n in needs if needs[n] <= usable * room] or [1]
    found = min(world.gather(0 if one is None else fitting[-1]))
    if found == 0:
        none = UserError("not even one sequence fits into memory; lower --seq-len, choose a smaller model or --parallel fsdp.")
        none.everywhere = True
        raise none
    while found > 1:
        peak = _peak(state, found)
        needs[found] = peak or 0
        if all(world.gather(peak is not None and needs[found] <= usable * room)):
            break
        found = max(n for n in choices if n < found)
    return found, f"micro-batch {found}: needs about {needs[found] / 1e9:.1f} of {room / 1e9:.1f} GB"


def _peak(state: State, sequences: int) -> int | None:
    """Most bytes in use during passes over `sequences`, beside all that a step holds; None if there were not enough."""
    device = state.rt.device
    ids = torch.zeros(sequences, state.config.data.seq_len, dtype=torch.int64, device=device)
    held: list[torch.Tensor] = []
    accumulates = state.config.batch_sequences > sequences * state.world.size
    watch_peak(device)
    try:
        for i in range(PASSES):  # as in a step: sharded gradients stay whole until the last micro-batch
            state.prepare_backward(is_last=not accumulates or i == PASSES - 1, may_be_interrupted=True)
            state.model(ids, ids).backward()
            held = held or _to_come(state)
        return peak_bytes(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        after_failed_pass(state.model)
        return None
    finally:
        for p in state.params:
            p.grad = None
        if device.type == "cpu":
            del held
            _give_back()


def _to_come(state: State) -> list[torch.Tensor]:
    """As much memory as the optimizer and the average will take and, on a CPU, the copy that a checkpoint is written from."""
    average = AVERAGE_BYTES if state.config.optim.average else 0
    held = average + (0 if state.optimizers[0].state else MOMENT_BYTES)
    copied = WEIGHT_BYTES + MOMENT_BYTES + average if state.rt.device.type == "cpu" else 0
    parts = [p.to_local() if state.is_sharded else p for p in state.params]  # type: ignore[attr-defined]
    return [
        torch.zeros(size, dtype=torch.uint8, device=state.rt.device)
        for p, part in zip(state.params, parts, strict=True)
        for size in (held * part.numel(), copied * p.numel())
    ]


def _give_back() -> None:
    """Freed memory goes to Linux again, which `runtime` told glibc to keep: the next trial starts where this one did."""
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def watch_peak(device: torch.device) -> None:
    """Forget the most bytes that were in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `watch_peak`: of torch on a GPU, else of the process; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _of_process("VmHWM")
    except OSError:
        return 0


def _room(device: torch.device) -> int | None:
    """Bytes that this process can have in all; None where that, or the peak, cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or resource is None or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    except (OSError, ValueError):  # no limit, which reads "max"
        pass
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - _of_process("VmSize"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + _of_process("VmRSS")


def _of_process(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    [line] = [part for part in Path("/proc/self/status").read_text().splitlines() if part.startswith(name + ":")]
    return int(line.split()[1]) * 1024
