"""What a run will need before it is started: memory, time, dollars, disk. Estimates, each with the figure it rests on.

    plan = make(config, devices.find("h100"), count=8, price=2.5)
    for line in lines(plan): print(line)

| what | how |
|---|---|
| FLOPs | counted from the matrix products, causal attention (`model.flops_per_token`) |
| weights, gradients, moments | 4 + 4 + 8 bytes a parameter; with fsdp, weights and moments divided over the GPUs |
| activations | 17 x the width a token and layer, 16.2 compiled, 2 bytes each in bf16 (below: `saved_values`) |
| speed | the datasheet's peak times the share that good plain trainers reach with GPT-2 (`devices.GPU.mfu`), or measured |
| gradients | 2 (n - 1) / n x 4 bytes a parameter over the link, after the backward pass |
"""

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anew.config.schema import Config
from anew.errors import UserError
from anew.model.flops import count_parameters, flops_per_token
from anew.model.loss import CHUNK_KERNEL
from anew.training import run_log as metrics
from anew.utils.gpus import GPU

LIBRARY_BYTES = 0.8e9  # CUDA's context and kernels
SHARE = 0.95  # of the memory: the allocator needs some room
MUON_BYTES = 12.2  # an element of the matrices of one shape while they are orthogonalised, measured (docs/log.md, 13)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    state: float  # weights and moments
    gradients: float
    held_at_loss: bool  # gradients of earlier micro-batches, or the buckets for them, are there during a forward pass
    copies: float  # weights in the precision of the products, and gradients under way between GPUs
    activations: float
    logits: float
    update: float  # scratch of the optimizer's step, when activations and logits are gone

    @property
    def total(self) -> float:
        """The larger of two moments: the loss, when all activations are there, and the update, when all gradients are."""
        at_loss = self.activations + self.logits + (self.gradients if self.held_at_loss else 0.0)
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
    tokens_per_second: float
    exchange_seconds: float  # of a step
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


def memory_of(
    config: Config, micro_batch: int, ranks: int, precision: str, compiled: bool = True
) -> Memory:
    """What one GPU holds with `micro_batch` sequences in a pass."""
    m, N, size = (
        config.model,
        count_parameters(config.model),
        4 if precision in ("fp32", "tf32") else 2,
    )
    cut = ranks if config.run.parallel == "fsdp" else 1
    tokens = micro_batch * config.data.seq_len
    values = saved_values(compiled)
    if m.recompute:  # each block's input, and all of one block
        values = 1 + values / m.n_layer
    copies = N * size if size == 2 else 0
    accumulates = config.batch_sequences > micro_batch * ranks
    gradients = 4.0 * N
    if cut > 1:  # one block whole at a time, and the next on its way, beside the embeddings
        copies = 2 * size * (12 * m.n_embd**2) + (4 + size) * m.padded_vocab_size * m.n_embd
        if (
            not accumulates
        ):  # otherwise they are summed over the ranks only after the last micro-batch
            gradients /= cut
    logits = (
        min(tokens, CHUNK_KERNEL) * m.padded_vocab_size * size
        + 2 * 4 * m.padded_vocab_size * m.n_embd
    )
    held_at_loss = accumulates or (ranks > 1 and cut == 1)
    update = MUON_BYTES * m.n_layer * 4 * m.n_embd**2 if config.optim.optimizer == "muon" else 0.0
    activations = tokens * m.n_layer * m.n_embd * values * size
    return Memory(
        checkpoint_bytes(config) / cut, gradients, held_at_loss, copies, activations, logits, update
    )


def saved_values(compiled: bool) -> float:
    """What a block keeps for its backward pass, in multiples of the width a token.

    Compiled: its input, q, k and v, the attention's output, the sum behind it, both layer norms (8), and 4 each before and behind
    the GELU, as in the code that Inductor generates for an H200; 0.2 are statistics. Eager code also keeps a projection's output.
    """
    return 16.2 if compiled else 17.0


def checkpoint_bytes(config: Config) -> float:
    """What one checkpoint holds, all in fp32: weights, AdamW's two moments or Muon's one."""
    N, blocks = count_parameters(config.model), 12 * config.model.n_layer * config.model.n_embd**2
    return 4 * (3 * N - (blocks if config.optim.optimizer == "muon" else 0))


def make(
    config: Config,
    gpu: GPU,
    count: int = 1,
    price: float | None = None,
    measured: float | None = None,
) -> Plan:
    """The plan of `config` on `count` of `gpu`; `measured` tokens a second of one of them replace the datasheet's."""
    if count < 1:
        raise UserError(f"{count} GPUs cannot train; --count must be at least 1.")
    precision = gpu.precision if config.run.precision == "auto" else config.run.precision
    if config.run.micro_batch == "auto":
        config = config.override(
            micro_batch=largest_micro_batch(config, gpu, count, precision) or 1
        )
    micro, _ = config.micro_batches(count)
    flops = flops_per_token(config.model, config.data.seq_len)
    if measured is None:
        peak = gpu.peak(precision)
        if peak is None:
            raise UserError(f"{gpu.name} has no {precision}; use --precision {gpu.precision}.")
        measured, source = (
            peak * 1e12 * gpu.mfu / flops,
            f"{100 * gpu.mfu:.0f}% ({gpu.mfu_source}) of {peak:g} TFLOP/s ({gpu.source})",
        )
    else:
        source = "measured here"
    N = count_parameters(config.model)
    exchange = (
        2 * (count - 1) / count * 4 * N / (gpu.link_gb_s * 1e9)
        if count > 1 and gpu.link_gb_s
        else 0.0
    )
    step = config.run.batch_tokens / (measured * count) + exchange
    return Plan(
        config,
        gpu,
        count,
        precision,
        memory_of(config, micro, count, precision),
        config.run.batch_tokens / step,
        exchange,
        source,
        price,
    )


def largest_micro_batch(config: Config, gpu: GPU, count: int, precision: str) -> int:
    """The most sequences a pass that fit, of those that divide a GPU's share of the batch; 0 if not even one does."""
    config.micro_batches(count)  # refuses what cannot be shared out
    share = config.batch_sequences // count
    fitting = [
        n
        for n in range(1, min(64, share) + 1)
        if share % n == 0 and _fits(memory_of(config, n, count, precision), gpu)
    ]
    return max(fitting, default=0)


def _fits(memory: Memory, gpu: GPU) -> bool:
    return memory.total <= SHARE * gpu.memory_gb * 1e9


def lines(plan: Plan) -> Iterator[str]:
    """The plan in words, at most 80 columns."""
    c, r, gpu, n = plan.config, plan.config.run, plan.gpu, plan.count
    flops = flops_per_token(c.model, c.data.seq_len)
    tokens = c.total_tokens
    yield f"{c.recipe} on {n} x {gpu.name} in {plan.precision}"
    yield ""
    yield f"model    {count_parameters(c.model):,} parameters, {flops / 1e6:,.0f} MFLOP a token (causal)"
    yield (
        f"work     {r.steps:,} steps x {r.batch_tokens:,} = {tokens / 1e9:.3g}B tokens, {tokens * flops / 1e18:.3g} EFLOP"
    )
    yield f"memory   of {gpu.memory_gb:g} GB on each GPU, in GB (* is the setting):"
    yield "       micro-batch accumulated   state  copies activations  logits     all"
    share = c.batch_sequences // n
    for micro in (m for m in (1, 2, 4, 8, 16, 32, 64) if share % m == 0):
        m = memory_of(c, micro, n, plan.precision)
        mark = "*" if micro == c.micro_batches(n)[0] else " "
        over = "" if _fits(m, gpu) else "  no"
        yield (
            f"      {mark}{micro:>11} {share // micro:>11} {(m.state + m.gradients) / 1e9:>7.2f} {m.copies / 1e9:>7.2f}"
            f" {m.activations / 1e9:>11.2f}"
            f" {m.logits / 1e9:>7.2f} {m.total / 1e9:>7.2f}{over}"
        )
    if not plan.fits:
        best = largest_micro_batch(c, gpu, n, plan.precision)
        fsdp = (
            " --parallel fsdp"
            if c.run.parallel == "ddp" and n > 1
            else " more GPUs with --parallel fsdp"
            if n == 1
            else ""
        )
        yield f"         the setting does not fit: use {f'--micro-batch {best}' if best else 'a GPU with more memory,' + fsdp}"
    yield f"speed    {plan.tokens_per_second:,.0f} tokens/s, {1e3 * plan.step_seconds:,.0f} ms a step"
    yield from textwrap.wrap(
        plan.speed_source, 79, initial_indent=" " * 9, subsequent_indent=" " * 9
    )
    if plan.exchange_seconds:
        yield f"         of which {1e3 * plan.exchange_seconds:.1f} ms to share gradients at {gpu.link_gb_s:g} GB/s"
    yield f"time     {_hours(plan.hours)}" + (
        f", ${plan.dollars:,.2f} at ${plan.price:g} a GPU and hour"
        if plan.dollars is not None
        else ""
    )
    disk = 2 * tokens, checkpoint_bytes(c) * (r.keep or 1)
    yield f"disk     {disk[0] / 1e9:,.1f} GB of tokens if all are kept (--disk-budget limits them)"
    yield f"         {disk[1] / 1e9:,.1f} GB for {r.keep or 'each'} checkpoint{'s' if r.keep != 1 else ''}"
    if n > 1 and n % 2 == 0 and plan.speed_source != "measured here":
        half = make(c, gpu, n // 2, plan.price)
        dollars = f", ${half.dollars:,.2f}" if half.dollars is not None else ""
        accumulated = c.micro_batches(n // 2)[1]
        fits = "" if half.fits else "; the micro-batch no longer fits"
        yield f"half     {n // 2} x {gpu.name}: {accumulated} accumulated, {_hours(half.hours)}{dollars}, the same losses{fits}"


def from_run(run: Path, config: Config) -> Iterator[str]:
    """What a short real run says about `config` on the same device."""
    source = Config.read(run / "config.json")
    rows = [row for row in metrics.read_metrics(run) if "speed/tokens_per_second" in row]
    if len(rows) < 4:
        raise UserError(
            f"{run} has {len(rows)} timed steps; train a few more before planning from it."
        )
    speed = statistics.median(
        row["speed/tokens_per_second"] for row in rows[len(rows) // 2 :]
    )  # compilation is long past
    mine, theirs = (flops_per_token(c.model, c.data.seq_len) for c in (source, config))
    rate = speed * mine / theirs
    tokens = config.total_tokens
    yield f"{run}: {source.recipe}, {speed:,.0f} tokens/s (median of the last {len(rows) - len(rows) // 2} steps)"
    yield f"         x {mine / 1e6:.4g} MFLOP a token = {speed * mine / 1e12:.3g} TFLOP/s"
    yield f"{config.recipe}: {theirs / 1e6:.4g} MFLOP a token, so {rate:,.0f} tokens/s at the same TFLOP/s"
    yield f"         {tokens / 1e9:.3g}B tokens in {_hours(tokens / rate / 3600)}"
    if theirs > 4 * mine:
        yield "         (larger matrices run faster, so it may take less: time a few real steps with --measure)"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    return (
        f"{hours:,.1f} hours"
        if hours < 96
        else f"{hours / 24:,.0f} days"
        if hours < 24 * 800
        else f"{hours / 24 / 365:,.1f} years"
    )
