"""How much memory a training step takes on a CPU, and the micro-batches that fit side by side.

    names = ("anew", "transformers")
    sides = {name: step_memory(name, compiled=True, precision="bf16") for name in names}
    fitting_micro_batches(config, sides, available=12e9)        # {"anew": 4, "transformers": 1}

The estimate is made for a CPU, where glibc keeps the memory that a step frees, so that gaps remain
between its blocks. The constants were chosen from 24 measured peaks, from which the estimate
differs by -13% to +21% (tests/unit/bench/test_memory.py). A comparison therefore uses 80% of the
memory that is available.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from anew.config.config import Config
from anew.model.flops import count_parameters
from anew.model.loss import CHUNK_COMPILED, CHUNK_EAGER

USABLE_SHARE = 0.8  # of the memory that is available
HEAP_GAPS = 1.4  # activations with the gaps between them, as a multiple of their size
FP32_BYTES = 4
# Python, torch and its kernels, and what the compiler and transformers add to them.
PROCESS_BYTES = 0.4e9
COMPILER_BYTES = 0.1e9
TRANSFORMERS_BYTES = 0.1e9


@dataclass(frozen=True)
class StepMemory:
    """What a side holds in memory during a training step."""

    process_bytes: float  # before there is a model
    value_bytes: int  # an activation
    block_values: float  # kept by each block for the backward pass, as multiples of the width
    logit_bytes: float  # a logit, with its copies, its gradient and the gaps between them
    logit_rows: int | None = None  # tokens whose logits exist at the same time; None: all
    score_tensors: int = 0  # kept by each block, of heads x T x T values for each sequence
    update_bytes: int = 0  # for each parameter: scratch memory of the optimizer


def step_memory(side: str, compiled: bool, precision: str) -> StepMemory:
    """Return what one of the sides of `anew bench train` holds. `precision` is bf16 or fp32."""
    is_bf16 = precision == "bf16"
    value_bytes = 2 if is_bf16 else FP32_BYTES
    process_bytes = PROCESS_BYTES + COMPILER_BYTES * compiled
    if side == "fp32, eager":
        return StepMemory(
            PROCESS_BYTES,
            value_bytes=4,
            block_values=18,
            logit_bytes=24,
            score_tensors=2,
            update_bytes=4,
        )
    if side == "transformers":
        # Its GELU is a formula of seven operations; uncompiled, each keeps its argument. In a bf16
        # run some of these are in fp32 and count twice.
        eager_values = 32 if is_bf16 else 20
        return StepMemory(
            process_bytes + TRANSFORMERS_BYTES,
            value_bytes,
            block_values=16 if compiled else eager_values,
            logit_bytes=7 if compiled else 12,
        )
    compiled_logit, eager_logit = (4, 16) if is_bf16 else (6, 20)
    return StepMemory(
        process_bytes,
        value_bytes,
        block_values=16.2 if compiled else 18,
        logit_bytes=compiled_logit if compiled else eager_logit,
        logit_rows=CHUNK_COMPILED if compiled else CHUNK_EAGER,
    )


def step_bytes(side: StepMemory, config: Config, micro_batch: int) -> float:
    """Estimate the peak memory in bytes of a process that trains with AdamW."""
    model = config.model
    parameters = count_parameters(model)
    tokens = micro_batch * config.data.seq_len
    score_tensors = side.score_tensors
    if model.attention == "plain":
        score_tensors = 2
    block_values = side.block_values * model.n_embd
    block_values += score_tensors * model.n_head * config.data.seq_len
    activations = HEAP_GAPS * tokens * model.n_layer * block_values * side.value_bytes
    rows = tokens if side.logit_rows is None else min(tokens, side.logit_rows)
    logits = rows * model.padded_vocab_size * side.logit_bytes
    # `wte` has two uses and a gradient from each.
    embedding_gradients = 2 * FP32_BYTES * model.padded_vocab_size * model.n_embd
    gradients = FP32_BYTES * parameters
    at_loss = activations + logits + embedding_gradients
    if config.batch_sequences > micro_batch:
        at_loss += gradients
    at_update = gradients + side.update_bytes * parameters
    weights_and_moments = 3 * FP32_BYTES * parameters
    copies = side.value_bytes * parameters if side.value_bytes == 2 else 0
    return side.process_bytes + weights_and_moments + copies + max(at_loss, at_update)


def fitting_micro_batches(
    config: Config, sides: Mapping[str, StepMemory], available: float
) -> dict[str, int]:
    """Return for each side the largest micro-batch that fits beside those of the sides before it.

    It divides the micro-batch of `config`, so that a step has the same tokens. It is 0 if not even
    one sequence fits. All sides are in memory at the same time, in `available` bytes.
    """
    largest, _ = config.micro_batches(1)
    left = USABLE_SHARE * available
    found = {}
    for name, side in sides.items():
        found[name] = 0
        for size in range(largest, 0, -1):
            needed = step_bytes(side, config, size)
            if largest % size == 0 and needed <= left:
                found[name] = size
                left -= needed
                break
    return found
