"""What a run needs before it starts: memory, time, cost and disk. All figures are estimates.

    plan = make_plan(config, find("h100"), count=8, price=2.5)
    for line in format_plan(plan):
        print(line)

| what | how it is estimated |
|---|---|
| FLOPs | counted from the matrix products, causal attention (`model.flops_per_token`) |
| weights, gradients, moments | 4 + 4 + 8 bytes a parameter; fsdp divides them over the GPUs |
| activations | 17 x width values a token and layer, 16.2 compiled (`saved_values`) |
| speed | the datasheet's peak x the share that good plain trainers reach, or measured |
| gradient exchange | 2 (n - 1) / n x 4 bytes a parameter over the link, after the backward pass |
"""

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anew.config.config import Config
from anew.errors import UserError
from anew.model.flops import count_parameters, flops_per_token
from anew.model.loss import CHUNK_KERNEL
from anew.training import run_log
from anew.utils.gpus import GPU
from anew.utils.words import short_count

FP32_BYTES = 4
LIBRARY_BYTES = 0.8e9  # CUDA's context and kernels
SHORT_STEP_SECONDS = 0.02
MEASURED = "measured here"
USABLE_SHARE = 0.95  # of the memory; the allocator needs the rest
# Bytes for each element of the matrices of one shape while Muon orthogonalises them, measured
# (docs/log.md, 13).
MUON_BYTES = 12.2


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    state: float  # weights and moments
    gradients: float
    held_at_loss: bool  # whether gradients, or buckets for them, exist during a forward pass
    copies: float  # weights in the precision of the products, and with fsdp those in transit
    activations: float
    logits: float
    update: float  # scratch memory of the optimizer, when activations and logits are freed

    @property
    def total(self) -> float:
        """The peak: at the loss, with all activations, or at the update, with all gradients."""
        at_loss = self.activations + self.logits
        if self.held_at_loss:
            at_loss += self.gradients
        at_update = self.gradients + self.update
        return self.state + self.copies + max(at_loss, at_update) + LIBRARY_BYTES


@dataclass(frozen=True)
class Plan:
    """A run on `count` GPUs."""

    config: Config
    gpu: GPU
    count: int
    precision: str
    memory: Memory
    tokens_per_second: float  # of all GPUs
    exchange_seconds: float  # of the gradients, in each step
    speed_source: str
    price: float | None  # dollars an hour and GPU

    @property
    def step_seconds(self) -> float:
        return self.config.run.batch_tokens / self.tokens_per_second

    @property
    def hours(self) -> float:
        return self.config.total_tokens / self.tokens_per_second / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.hours * self.count * self.price

    @property
    def fits(self) -> bool:
        return _fits(self.memory, self.gpu)


def memory_per_gpu(
    config: Config, micro_batch: int, ranks: int, precision: str, compiled: bool = True
) -> Memory:
    """Estimate what one GPU holds with `micro_batch` sequences in a forward pass."""
    model = config.model
    parameters = count_parameters(model)
    embedding = model.padded_vocab_size * model.n_embd
    value_bytes = 4 if precision in ("fp32", "tf32") else 2
    is_sharded = config.run.parallel == "fsdp" and ranks > 1
    accumulates = config.batch_sequences > micro_batch * ranks

    state = float(checkpoint_bytes(config))
    gradients = float(FP32_BYTES * parameters)
    copies = value_bytes * parameters if value_bytes == 2 else 0
    if is_sharded:
        state /= ranks
        # One block is whole at a time and the next one is in transit, besides the embeddings.
        block = 12 * model.n_embd**2
        copies = 2 * value_bytes * block + (FP32_BYTES + value_bytes) * embedding
        # With accumulation, gradients are summed over the ranks after the last micro-batch only.
        if not accumulates:
            gradients /= ranks

    values = saved_values(compiled)
    if model.recompute:  # only the input of each block is kept, and all values of one block
        values = 1 + values / model.n_layer
    tokens = micro_batch * config.data.seq_len
    logit_rows = min(tokens, CHUNK_KERNEL)
    logits = logit_rows * model.padded_vocab_size * value_bytes + 2 * FP32_BYTES * embedding
    update = 0.0
    if config.optim.optimizer == "muon":
        update = MUON_BYTES * model.n_layer * 4 * model.n_embd**2
    return Memory(
        state,
        gradients,
        held_at_loss=accumulates or (ranks > 1 and not is_sharded),
        copies=copies,
        activations=tokens * model.n_layer * model.n_embd * values * value_bytes,
        logits=logits,
        update=update,
    )


def saved_values(compiled: bool) -> float:
    """Return the values that a block keeps for its backward pass, in multiples of the width.

    Compiled code keeps 8 x width a token: the block's input, queries, keys, values, the
    attention's output, the sum after it and both layer norms. The feed-forward layer adds 4 before
    and 4 after the GELU, as in the code that Inductor generates for an H200, and statistics add
    0.2. Eager code also keeps the output of a projection.
    """
    return 16.2 if compiled else 17.0


def checkpoint_bytes(config: Config) -> float:
    """Return the bytes of one checkpoint in fp32: weights, and two moments or Muon's single one."""
    values = 3 * count_parameters(config.model)
    if config.optim.optimizer == "muon":
        values -= 12 * config.model.n_layer * config.model.n_embd**2
    return FP32_BYTES * values


def make_plan(
    config: Config,
    gpu: GPU,
    count: int = 1,
    price: float | None = None,
    measured: float | None = None,
) -> Plan:
    """Return the plan of `config` on `count` GPUs.

    `measured` is the tokens a second of one GPU and replaces the estimate from the datasheet.
    Raises UserError where the GPU lacks the precision or the batch cannot be divided.
    """
    if count < 1:
        raise UserError(f"{count} GPUs cannot train; --count must be at least 1.")
    precision = gpu.precision if config.run.precision == "auto" else config.run.precision
    if config.run.micro_batch == "auto":
        largest = largest_micro_batch(config, gpu, count, precision)
        config = config.override(micro_batch=largest or 1)
    micro_batch, _ = config.micro_batches(count)
    speed_source = MEASURED
    if measured is None:
        measured, speed_source = _datasheet_speed(config, gpu, precision)
    exchange_seconds = 0.0
    if count > 1 and gpu.link_gb_s:
        gradient_bytes = FP32_BYTES * count_parameters(config.model)
        exchange_seconds = 2 * (count - 1) / count * gradient_bytes / (gpu.link_gb_s * 1e9)
    batch_tokens = config.run.batch_tokens
    step_seconds = batch_tokens / (measured * count) + exchange_seconds
    return Plan(
        config,
        gpu,
        count,
        precision,
        memory_per_gpu(config, micro_batch, count, precision),
        batch_tokens / step_seconds,
        exchange_seconds,
        speed_source,
        price,
    )


def _datasheet_speed(config: Config, gpu: GPU, precision: str) -> tuple[float, str]:
    """Return the estimated tokens a second of one GPU, and what the estimate is based on."""
    peak = gpu.peak(precision)
    if peak is None:
        raise UserError(f"{gpu.name} has no {precision}; use --precision {gpu.precision}.")
    speed = peak * 1e12 * gpu.mfu / flops_per_token(config.model, config.data.seq_len)
    share = f"{100 * gpu.mfu:.0f}% ({gpu.mfu_source})"
    return speed, f"{share} of {peak:g} TFLOP/s ({gpu.source})"


def largest_micro_batch(config: Config, gpu: GPU, count: int, precision: str) -> int:
    """Return the largest micro-batch that fits and divides a GPU's share; 0 if none fits."""
    config.micro_batches(count)  # raises UserError if the batch cannot be divided
    share = config.batch_sequences // count
    for size in range(min(64, share), 0, -1):
        if share % size == 0 and _fits(memory_per_gpu(config, size, count, precision), gpu):
            return size
    return 0


def _fits(memory: Memory, gpu: GPU) -> bool:
    return memory.total <= USABLE_SHARE * gpu.memory_gb * 1e9


def format_plan(plan: Plan) -> Iterator[str]:
    """Yield the plan as text, at most 80 columns wide."""
    config, gpu = plan.config, plan.gpu
    flops = flops_per_token(config.model, config.data.seq_len)
    tokens = config.total_tokens
    yield f"{config.recipe} on {plan.count} x {gpu.name} in {plan.precision}"
    yield ""
    parameters = count_parameters(config.model)
    yield f"model    {parameters:,} parameters, {flops / 1e6:,.0f} MFLOP a token (causal)"
    batches = f"{config.run.steps:,} steps x {config.run.batch_tokens:,}"
    yield f"work     {batches} = {short_count(tokens)} tokens, {tokens * flops:.3g} FLOP"
    yield f"memory   of {gpu.memory_gb:g} GB on each GPU, in GB (* is the setting):"
    yield from _memory_table(plan)
    if not plan.fits:
        yield from _indented(f"the setting does not fit: use {_what_fits(plan)}")
    milliseconds = 1e3 * plan.step_seconds
    yield f"speed    {plan.tokens_per_second:,.0f} tokens/s, {milliseconds:,.0f} ms a step"
    yield from _indented(plan.speed_source)
    if plan.step_seconds < SHORT_STEP_SECONDS and plan.speed_source != MEASURED:
        yield from _indented(
            "Steps this short are limited by the start of each kernel, which the estimate leaves "
            "out: they take longer. --measure times a few steps."
        )
    if plan.exchange_seconds:
        exchange = f"{1e3 * plan.exchange_seconds:.1f} ms to share gradients"
        yield f"         of which {exchange} at {gpu.link_gb_s:g} GB/s"
    price = "" if plan.price is None else f" at ${plan.price:g} a GPU and hour"
    yield f"time     {_hours(plan.hours)}{_dollars(plan)}{price}"
    gigabytes = 2 * tokens / 1e9
    yield f"disk     {gigabytes:,.1f} GB of tokens if all are kept (--disk-budget limits them)"
    kept = config.run.keep
    gigabytes = checkpoint_bytes(config) * (kept or 1) / 1e9
    checkpoints = "each checkpoint" if kept == 0 else f"{kept} checkpoint{'s' * (kept > 1)}"
    yield f"         {gigabytes:,.1f} GB for {checkpoints}"
    if plan.count % 2 == 0 and plan.speed_source != MEASURED:
        yield _half(plan)


def _memory_table(plan: Plan) -> Iterator[str]:
    """Yield the memory for micro-batches of 1 to 64 sequences that divide a GPU's share."""
    config = plan.config
    chosen, _ = config.micro_batches(plan.count)
    share = config.batch_sequences // plan.count
    yield "       micro-batch accumulated   state  copies activations  logits     all"
    for size in (1, 2, 4, 8, 16, 32, 64):
        if share % size:
            continue
        memory = memory_per_gpu(config, size, plan.count, plan.precision)
        state = memory.state + memory.gradients
        mark = "*" if size == chosen else " "
        end = "" if _fits(memory, plan.gpu) else "  no"
        yield (
            f"      {mark}{size:>11} {share // size:>11} {state / 1e9:>7.2f}"
            f" {memory.copies / 1e9:>7.2f} {memory.activations / 1e9:>11.2f}"
            f" {memory.logits / 1e9:>7.2f} {memory.total / 1e9:>7.2f}{end}"
        )


def _what_fits(plan: Plan) -> str:
    """Return the setting or the device with which the run would fit."""
    best = largest_micro_batch(plan.config, plan.gpu, plan.count, plan.precision)
    if best:
        return f"--micro-batch {best}"
    if plan.count == 1:
        return "more GPUs with --parallel fsdp, or a GPU with more memory"
    if plan.config.run.parallel == "ddp":
        return "--parallel fsdp, or a GPU with more memory"
    return "a GPU with more memory"


def _half(plan: Plan) -> str:
    """Return the line about the same run on half the GPUs."""
    count = plan.count // 2
    half = make_plan(plan.config, plan.gpu, count, plan.price)
    _, accumulated = plan.config.micro_batches(count)
    fits = "" if half.fits else "; the micro-batch no longer fits"
    return (
        f"half     of the GPUs, {count} x {plan.gpu.name}: {accumulated} accumulated, "
        f"{_hours(half.hours)}{_dollars(half)}{fits}"
    )


def from_run(run: Path, config: Config) -> Iterator[str]:
    """Yield what the measured speed of a run says about `config` on the same device."""
    source = Config.of_run(run)
    rows = [row for row in run_log.read_metrics(run) if "speed/tokens_per_second" in row]
    if len(rows) < 4:
        raise UserError(
            f"{run} has {len(rows)} timed steps; train a few more before planning from it."
        )
    later_rows = rows[len(rows) // 2 :]  # the first steps include compilation
    speed = statistics.median(row["speed/tokens_per_second"] for row in later_rows)
    run_flops = flops_per_token(source.model, source.data.seq_len)
    flops = flops_per_token(config.model, config.data.seq_len)
    rate = speed * run_flops / flops
    steps = f"median of the last {len(later_rows)} steps"
    yield f"{run}: {source.recipe}, {speed:,.0f} tokens/s ({steps})"
    tflops = speed * run_flops / 1e12
    yield f"         x {run_flops / 1e6:.4g} MFLOP a token = {tflops:.3g} TFLOP/s"
    yield (
        f"{config.recipe}: {flops / 1e6:.4g} MFLOP a token, "
        f"so {rate:,.0f} tokens/s at the same TFLOP/s"
    )
    tokens = config.total_tokens
    yield f"         {short_count(tokens)} tokens in {_hours(tokens / rate / 3600)}"
    if flops > 4 * run_flops:
        yield (
            "         (larger matrices run faster, so it may take less: "
            "time a few real steps with --measure)"
        )


def _indented(text: str) -> list[str]:
    """Return the lines of a text that continues an entry of the plan."""
    return textwrap.wrap(text, 79, initial_indent=" " * 9, subsequent_indent=" " * 9)


def _dollars(plan: Plan) -> str:
    return "" if plan.dollars is None else f", ${plan.dollars:,.2f}"


def _hours(hours: float) -> str:
    """Return a time in seconds, minutes, hours, days or years."""
    if hours < 1 / 30:
        return f"{3600 * hours:.2g} seconds"
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    if hours < 96:
        return f"{hours:,.1f} hours"
    if hours < 24 * 800:
        return f"{hours / 24:,.0f} days"
    return f"{hours / 24 / 365:,.1f} years"
