"""How long a training step takes on this machine: warm-up, repetitions, median and spread.

    measured = measure(config, steps=5)                 # in this process
    measured = measure_in_new_process(config, steps=5)  # with fresh memory and settings
    print(measured.seconds, measured.tokens_per_second)

All times are taken by `seconds_of`, call by call. The first call includes compilation and is
reported on its own; the others give a median, a fastest and a slowest time. What is timed is the
product's own `train_step` on real text, or its attention function alone.
"""

import dataclasses
import multiprocessing
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from anew.bench.ladder import RUNGS, Rung
from anew.config.config import Config
from anew.errors import UserError
from anew.model.attention import attend
from anew.model.flops import flops_per_token
from anew.tokenizer.bpe import Tokenizer
from anew.training.micro_batch import is_out_of_memory
from anew.training.setup import training_loss
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils.device import (
    Runtime,
    cpu_has_bf16,
    peak_memory,
    reset_peak_memory,
    set_up_device,
)
from anew.utils.signals import StopFlag

ATTENTION_SEQUENCES = 4  # batch size of the attention measurement


@dataclass(frozen=True)
class Measured:
    """The times of repeated calls, and what one call processes."""

    call_seconds: tuple[float, ...]  # of every call; the first one includes compilation
    tokens: int  # a call
    flops: float  # a call, with causal attention
    memory_bytes: int  # the peak: on CUDA that of torch, elsewhere that of the process
    losses: tuple[float, ...] = ()  # of the training steps

    @property
    def first_seconds(self) -> float:
        """Seconds of the first call, with compilation."""
        return self.call_seconds[0]

    @property
    def seconds(self) -> float:
        """Median seconds of a call after the first."""
        return statistics.median(self.call_seconds[1:])

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the fastest and the slowest call after the first."""
        return min(self.call_seconds[1:]), max(self.call_seconds[1:])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call of `work`, including its work on a CUDA device.

    On other accelerators `work` itself must wait, for example by copying a value to the CPU.
    """
    begin = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(config: Config, steps: int = 5, matmul: str = "") -> Measured:
    """Time `steps` training steps of `config` on this process's device, after a first one.

    `matmul` is passed to torch.set_float32_matmul_precision unless it is empty.
    """
    runtime = set_up_device(config.run)
    if matmul:
        torch.set_float32_matmul_precision(matmul)
    reset_peak_memory(runtime.device)
    state = TrainState(config, runtime, "")
    stop = StopFlag()
    loss_of = training_loss(state)
    batch = text_batch(config, runtime.device)
    losses = []

    def step() -> None:
        losses.append(train_step(loss_of, state, batch, 1.0, stop).loss)
        state.step += 1

    seconds = tuple(seconds_of(step) for _ in range(steps + 1))
    tokens = config.run.batch_tokens
    flops = tokens * flops_per_token(config.model, config.data.seq_len)
    return Measured(seconds, tokens, flops, peak_memory(runtime.device), tuple(losses))


def measure_ladder(
    config: Config, steps: int, device: str
) -> Iterator[tuple[Rung, Measured | str]]:
    """Yield every rung with its measurement, or with a sentence why there is none."""
    settings: dict[str, Any] = {}
    for rung in RUNGS:
        if device not in rung.devices:
            yield rung, rung.lacking
            continue
        if device == "cpu" and rung.settings.get("precision") == "bf16" and not cpu_has_bf16():
            yield rung, "this CPU has no bf16 instructions"
            continue
        settings |= rung.settings
        yield rung, measure_in_new_process(config.override(**settings), steps, rung.matmul)


def measure_in_new_process(config: Config, steps: int, matmul: str = "") -> Measured | str:
    """Call `measure` in a new process; return a sentence where that fails."""
    found: Measured | str = _call_in_new_process(_send_steps, config, steps, matmul)
    return found


def _call_in_new_process(work: Callable[..., None], *arguments: Any) -> Any:
    """Return what `work(connection, *arguments)` sends from a new process, or a sentence."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = "the process ended without an error message; the system may be out of memory"
    process.join()
    return found


def _send_steps(connection: Connection, config: Config, steps: int, matmul: str) -> None:
    try:
        connection.send(measure(config, steps, matmul))
    except UserError as error:
        connection.send(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        connection.send("out of memory")


def text_batch(config: Config, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the micro-batches of one step, from the source code of the standard library."""
    tokenizer = Tokenizer.named("gpt2" if config.model.vocab_size > 50_000 else "bytes")
    seq_len = config.data.seq_len
    needed = config.batch_sequences * seq_len + 1
    ids: list[int] = []
    for path in standard_library_files():
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= needed:
            break
    while len(ids) < needed:
        ids += ids
    flat = torch.tensor(ids[:needed], device=device)
    micro_batch, _ = config.micro_batches(1)
    inputs = flat[:-1].view(-1, seq_len).split(micro_batch)
    targets = flat[1:].view(-1, seq_len).split(micro_batch)
    return list(zip(inputs, targets, strict=True))


def standard_library_files() -> list[Path]:
    """Return the Python files of the standard library: real text that every machine has."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def with_batch(config: Config, micro_batch: int, seq_len: int) -> Config:
    """Return `config` with a step of one micro-batch of this size, which is what is timed."""
    positions = max(seq_len, config.model.n_positions)
    model = dataclasses.replace(config.model, n_positions=positions)
    return dataclasses.replace(config, model=model).override(
        micro_batch=micro_batch,
        seq_len=seq_len,
        batch_tokens=micro_batch * seq_len,
        warmup_steps=0,
        steps=1000,
    )


def measure_attention(
    config: Config, kind: str, lengths: Sequence[int], rounds: int, device: str
) -> list[Measured | str]:
    """Time `attend` forward and backward for 4 sequences of each length, in one new process."""
    config = config.override(device=device)
    found = _call_in_new_process(_send_attention, config, kind, lengths, rounds)
    return found if isinstance(found, list) else [found] * len(lengths)


def _send_attention(
    connection: Connection, config: Config, kind: str, lengths: Sequence[int], rounds: int
) -> None:
    runtime = set_up_device(config.run)
    connection.send([_attention_at(config, kind, length, rounds, runtime) for length in lengths])


def _attention_at(
    config: Config, kind: str, length: int, rounds: int, runtime: Runtime
) -> Measured | str:
    generator = torch.Generator().manual_seed(0)
    compiled = runtime.compile and kind != "plain"
    attention: Any = torch.compile(attend, dynamic=False) if compiled else attend

    def random(*middle: int) -> torch.Tensor:
        shape = (ATTENTION_SEQUENCES, length, *middle, config.model.head_dim)
        return torch.randn(shape, generator=generator).to(runtime.device, runtime.dtype)

    # As in the model, queries, keys and values are views of one product, and the gradient arrives
    # in the order (B, T, heads, head_dim).
    product = random(3, config.model.n_head).requires_grad_()  # (B, T, 3, heads, head_dim)
    d_out = random(config.model.n_head).transpose(1, 2)  # (B, heads, T, head_dim)

    def forward_and_backward() -> None:
        product.grad = None
        q, k, v = product.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        attention(q, k, v, causal=True, kernel=kind).backward(d_out)
        assert product.grad is not None
        product.grad.flatten()[:1].cpu()  # waits for the device

    reset_peak_memory(runtime.device)
    try:
        seconds = tuple(seconds_of(forward_and_backward) for _ in range(rounds + 1))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    tokens = ATTENTION_SEQUENCES * length
    # 12 x width FLOPs for each token and each of the (T + 1) / 2 positions it sees on average.
    flops = 12.0 * tokens * config.model.n_embd * (length + 1) / 2
    return Measured(seconds, tokens, flops, peak_memory(runtime.device))
