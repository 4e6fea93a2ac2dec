"""Finds the largest micro-batch that fits into the memory of a GPU: `--micro-batch auto`.

    found, reason = choose_micro_batch(state)
    found["micro_batch"]                        # sequences in one forward pass

Candidates are the divisors of a rank's share of the batch, so every candidate reads the same tokens
in each step. Forward and backward passes are run with the largest candidate first, then with the
next smaller one, until the peak memory of every rank is below its limit. On other devices the peak
cannot be measured reliably, so a fixed upper bound is used there.

A resumed run is bit-identical only at the same micro-batch, and another trial might find another
one. The result is therefore stored in run_state.json, with the conditions under which it holds.
"""

from collections.abc import Iterator
from typing import Any

import torch

from anew.distributed.fsdp import after_failed_pass, reduce_gradients
from anew.errors import UserError
from anew.training.run_log import read_run_state
from anew.training.train_state import TrainState
from anew.utils import device

USABLE_SHARE = 0.9  # of the GPU's memory: compiled code and communication need some as well
PASSES = 3  # blocks of a later pass may not fit into the gaps that an earlier pass left
MOST_SEQUENCES = {"cuda": 64}  # larger micro-batches are not faster
MOST_SEQUENCES_ELSEWHERE = 16
MOST_CPU_TOKENS = 8192  # larger micro-batches are not faster on a CPU (docs/log.md, 14)
ADAMW_STATE_BYTES = 8  # per parameter: two fp32 moments
# The messages of PyTorch's CPU allocator; of the CUDA runtime, NCCL and MPS; and of cuBLAS.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


def choose_micro_batch(state: TrainState) -> tuple[dict[str, Any], str]:
    """Return what run_state.json stores about the micro-batch, and the reason for it."""
    conditions = micro_batch_conditions(state)
    stored = state.world.gather(stored_micro_batch(state, conditions))[0]
    if stored:
        micro_batch = stored
        reason = f"micro-batch {stored}, as this run found it before"
    else:
        micro_batch, reason = find_micro_batch(state)
    return {"micro_batch": micro_batch, **conditions}, reason


def micro_batch_conditions(state: TrainState) -> dict[str, Any]:
    """Return what the memory of a step depends on, besides settings that a run cannot change."""
    config = state.config
    environment = device.environment(state.runtime)
    return {
        "device": environment["device"],
        "precision": environment["precision"],
        "ranks": state.world.size,
        "compile": environment["compiled"] + config.run.compile,
        "parallel": config.run.parallel,
        "recompute": config.model.recompute,
        "attention": config.model.attention,
    }


def stored_micro_batch(state: TrainState, conditions: dict[str, Any]) -> int:
    """Return the micro-batch that an earlier start found under the same conditions;

    0 if there is none.
    """
    stored = read_run_state(state.config.folder).get("micro_batch_found", {})
    micro_batch = int(stored.get("micro_batch", 0))
    if micro_batch == 0 or any(stored.get(name) != value for name, value in conditions.items()):
        return 0
    divides = state.config.batch_sequences % (state.world.size * micro_batch) == 0
    return micro_batch if divides else 0


def find_micro_batch(state: TrainState) -> tuple[int, str]:
    """Return the number of sequences in a micro-batch, the same on every rank, and the reason.

    Weights and optimizer state are not changed. Raises UserError if not even one sequence fits.
    """
    candidates = list(candidate_sizes(state))
    limit = usable_bytes(state.runtime.device)
    if limit is None:
        return candidates[0], f"micro-batch {candidates[0]}: memory is measured on NVIDIA GPUs only"
    for sequences in candidates:
        peak = measured_peak(state, sequences)
        fits = peak is not None and peak <= limit
        if all(state.world.gather(fits)):
            needed = (peak or 0) / 1e9
            return sequences, f"micro-batch {sequences}: uses {needed:.1f} of {limit / 1e9:.1f} GB"
    raise UserError(
        "not even one sequence fits into memory; lower --seq-len, choose a smaller model "
        "or use --parallel fsdp.",
        on_every_rank=True,
    )


def candidate_sizes(state: TrainState) -> Iterator[int]:
    """Yield the divisors of a rank's sequences per step, from the largest allowed one down to 1."""
    device_type = state.runtime.device.type
    share = state.config.batch_sequences // state.world.size
    most = MOST_SEQUENCES.get(device_type, MOST_SEQUENCES_ELSEWHERE)
    if device_type == "cpu":
        most = max(1, min(most, MOST_CPU_TOKENS // state.config.data.seq_len))
    for sequences in range(min(most, share), 0, -1):
        if share % sequences == 0:
            yield sequences


def measured_peak(state: TrainState, sequences: int) -> int | None:
    """Return the peak memory in bytes of passes over `sequences`; None if memory ran out.

    Room for the optimizer's state is held during the passes, because a step needs both.
    """
    device = state.runtime.device
    ids = torch.zeros(sequences, state.config.data.seq_len, dtype=torch.int64, device=device)
    accumulates = state.config.batch_sequences > sequences * state.world.size
    reserved: list[torch.Tensor] = []
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for i in range(PASSES):
            # As in a step: sharded gradients stay whole until the last micro-batch.
            is_last = not accumulates or i == PASSES - 1
            if state.is_sharded:
                reduce_gradients(state.model, is_last)
            state.model(ids, ids).backward()
            if not reserved:
                reserved = optimizer_state_placeholder(state)
        return torch.cuda.max_memory_allocated(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        after_failed_pass(state.model)
        return None
    finally:
        for parameter in state.parameters:
            parameter.grad = None


def optimizer_state_placeholder(state: TrainState) -> list[torch.Tensor]:
    """Allocate as many bytes as AdamW's state will need; nothing if the state exists already."""
    if state.optimizers[0].state:
        return []
    local_parts = state.parameters
    if state.is_sharded:
        sharded: list[Any] = state.parameters
        local_parts = [parameter.to_local() for parameter in sharded]
    device = state.runtime.device
    sizes = [ADAMW_STATE_BYTES * part.numel() for part in local_parts]
    return [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]


def usable_bytes(device: torch.device) -> float | None:
    """Return how much GPU memory a step may use; None on devices whose peak cannot be measured."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return USABLE_SHARE * (free + torch.cuda.memory_reserved(device))
