"""How many sequences fit into one forward and backward pass: `--micro-batch auto`.

One sequence is tried, then two; what the second needed more is what each further one will need. The largest number that divides the batch
and leaves a tenth of the memory free is taken, on a GPU after it was tried. Ranks take the smallest of their answers, so tokens a
step stay what they are, and so do the ids in them.
"""

import contextlib
import os
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from anew.config import UserError
from anew.state import State

SHARE = 0.9  # of the memory: compiled code and copies on the way need some too
MOST = {"cuda": 64, "cpu": 16}  # more is not faster
MOMENT_BYTES, AVERAGE_BYTES = 8, 4  # a parameter


def is_out_of_memory(error: BaseException) -> bool:
    """Is this torch's way of saying that there is no memory left, on a GPU or a CPU?"""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def find_micro_batch(state: State) -> tuple[int, str]:
    """(sequences a micro-batch, a line that says why); the same on every rank. Weights and optimizer are left as they are."""
    device, world = state.rt.device, state.world
    share = state.config.batch_sequences // world.size
    choices = [n for n in range(1, min(MOST.get(device.type, 16), share) + 1) if share % n == 0]
    room = _room(device)
    if room is None or len(choices) == 1:
        return choices[-1], f"micro-batch {choices[-1]}" + " (memory cannot be measured here)" * (room is None)
    one, two = _peak(state, 1), _peak(state, 2)
    parts = [p.to_local() if state.is_sharded else p for p in state.params]  # type: ignore[attr-defined]
    to_come = (MOMENT_BYTES if not state.optimizers[0].state else 0) + (AVERAGE_BYTES if state.config.optim.average else 0)
    moments = sum(p.numel() for p in parts) * to_come
    needs = {1: (one or 0) + moments}
    if one is not None and two is not None:
        needs = {n: one + (two - one) * (n - 1) + moments for n in choices}
    fitting = [n for n in needs if needs[n] <= SHARE * room] or [1]
    found = min(world.gather(0 if one is None else fitting[-1]))
    if found == 0:
        none = UserError("not even one sequence fits into memory; lower --seq-len, choose a smaller model or --parallel fsdp.")
        none.everywhere = True
        raise none
    while device.type == "cuda" and not all(world.gather(_peak(state, found) is not None)) and found > 1:
        found = max(n for n in choices if n < found)
    needed = f": needs about {needs[found] / 1e9:.1f} of {room / 1e9:.1f} GB" if found in needs else ""
    return found, f"micro-batch {found}{needed}"


def _peak(state: State, sequences: int) -> int | None:
    """Most bytes in use during one forward and backward pass; None if there were not enough."""
    device = state.rt.device
    ids = torch.zeros(sequences, state.config.data.seq_len, dtype=torch.int64, device=device)
    watch_peak(device)
    try:
        state.model(ids, ids).backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        for p in state.params:
            p.grad = None
    return peak_bytes(device)


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
