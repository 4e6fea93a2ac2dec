"""How fast is it here: the product's own training step, timed with one setting more at each rung.

    measured = measure(config, steps=5)          # in a process of its own
    for rung, measured in ladder(config): ...    # fp32 -> TF32 -> bf16 -> compile -> ...

Nothing here computes anything of its own: `measure` calls `train.train_step` on real text, and a rung is a dictionary of settings.
"""

import dataclasses
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from anew.config.schema import Config
from anew.errors import UserError
from anew.model.attention import attend
from anew.model.flops import flops_per_token
from anew.tokenizer.bpe import Tokenizer
from anew.training.micro_batch import is_out_of_memory
from anew.training.setup import training_loss
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils import device as runtime
from anew.utils.signals import StopFlag


@dataclass(frozen=True)
class Measured:
    """What one configuration does here. `losses` are those of its steps, on the same text for every configuration."""

    seconds: float  # median of a step
    spread: tuple[float, float]  # fastest and slowest step
    first_seconds: float  # the first step, with compilation
    tokens: int  # a step
    flops: float  # a step, causal
    memory_bytes: int  # most in use: on CUDA by torch, elsewhere by the process
    losses: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Rung:
    """One setting more than the rung below."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    matmul: str = ""  # torch.set_float32_matmul_precision, where it is not what the precision says
    devices: tuple[str, ...] = ("cuda", "mps", "cpu")
    lacking: str = ""  # why other devices pass it over


BOTTOM: dict[str, Any] = {
    "precision": "fp32", "compile": "off", "attention": "plain", "head": "plain", "pad_vocabulary": False, "fused": False,
}  # fmt: skip
RUNGS = (
    Rung("fp32", BOTTOM),
    Rung(
        "TF32 matrices",
        {"precision": "tf32"},
        devices=("cuda",),
        lacking="only NVIDIA GPUs have TF32",
    ),
    Rung("matrices in bf16", {}, "medium", ("cpu",), 'torch\'s "medium" is for CPUs'),
    Rung(
        "bf16",
        {"precision": "bf16"},
        devices=("cuda", "cpu"),
        lacking="training in bf16 is not reliable there",
    ),
    Rung(
        "compile",
        {"compile": "on"},
        devices=("cuda", "cpu"),
        lacking="torch.compile is not reliable there",
    ),
    Rung("flash attention", {"attention": "flash"}),
    Rung("padded vocabulary", {"pad_vocabulary": True}),
    Rung("fused AdamW", {"fused": True}),
    Rung("loss in chunks", {"head": "chunked"}),  # on CUDA by a kernel of one's own
    Rung(
        "cuDNN's attention", {"attention": "cudnn"}, devices=("cuda",), lacking="cuDNN is NVIDIA's"
    ),
)


def ladder(config: Config, steps: int, device: str) -> Iterator[tuple[Rung, Measured | str]]:
    """Every rung with what was measured, or with the reason why it was not."""
    settings: dict[str, Any] = {}
    for rung in RUNGS:
        if device not in rung.devices:
            yield rung, rung.lacking
            continue
        settings |= rung.settings
        yield rung, apart(config.override(**settings), steps, rung.matmul)


def apart(config: Config, steps: int, matmul: str = "") -> Measured | str:
    """`measure` in a process of its own, with fresh memory and settings; a sentence if that failed."""
    found: Measured | str = _in_a_process(_measure, config, steps, matmul)
    return found


def _in_a_process(work: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = "the process ended without a word, as when the system is out of memory"
    process.join()
    return found


def _measure(wire: Connection, config: Config, steps: int, matmul: str) -> None:
    try:
        wire.send(measure(config, steps, matmul))
    except UserError as error:
        wire.send(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        wire.send("out of memory")


def measure(config: Config, steps: int = 5, matmul: str = "") -> Measured:
    """Time `steps` training steps of `config` on this process's device, after one that is counted apart."""
    rt = runtime.start(config.run)
    if matmul:
        torch.set_float32_matmul_precision(matmul)
    runtime.reset_peak_memory(rt.device)
    state, stop = TrainState(config, rt, ""), StopFlag()
    loss_of = training_loss(state)
    batch = text_batch(config, rt.device)
    times, losses = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        outcome = train_step(loss_of, state, batch, 1.0, stop)  # ends with a wait for the device
        times.append(time.perf_counter() - begin)
        losses.append(outcome.loss)
        state.step += 1
    flops = config.run.batch_tokens * flops_per_token(config.model, config.data.seq_len)
    first, *rest = times
    return Measured(
        statistics.median(rest),
        (min(rest), max(rest)),
        first,
        config.run.batch_tokens,
        flops,
        runtime.peak_memory(rt.device),
        tuple(losses),
    )


def text_batch(config: Config, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one step, from the standard library's source."""
    tokenizer, T = (
        Tokenizer.named("gpt2" if config.model.vocab_size > 50_000 else "bytes"),
        config.data.seq_len,
    )
    needed = config.batch_sequences * T + 1
    ids: list[int] = []
    for path in stdlib():
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= needed:
            break
    while len(ids) < needed:
        ids += ids
    flat = torch.tensor(ids[:needed], device=device)
    micro, _ = config.micro_batches(1)
    inputs, targets = flat[:-1].view(-1, T), flat[1:].view(-1, T)
    return list(zip(inputs.split(micro), targets.split(micro), strict=True))


def stdlib() -> list[Path]:
    """Real text that is on every machine."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def at(config: Config, micro_batch: int, seq_len: int) -> Config:
    """`config` with a step of one micro-batch of this size: what is timed."""
    model = dataclasses.replace(config.model, n_positions=max(seq_len, config.model.n_positions))
    sized = dataclasses.replace(config, model=model)
    return sized.override(
        micro_batch=micro_batch,
        seq_len=seq_len,
        batch_tokens=micro_batch * seq_len,
        warmup_steps=0,
        steps=1000,
    )


def machine_memory() -> int:
    """Bytes of this machine's memory; 0 where that cannot be known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def attention_apart(
    config: Config, kind: str, lengths: Sequence[int], rounds: int, device: str
) -> list[Measured | str]:
    """Time `attend` forward and backward for 4 sequences of each length, in one process of its own."""
    found = _in_a_process(_attention, config, kind, lengths, rounds, device)
    return found if isinstance(found, list) else [found] * len(lengths)


def _attention(
    wire: Connection, config: Config, kind: str, lengths: Sequence[int], rounds: int, device: str
) -> None:
    rt = runtime.start(config.override(device=device).run)
    wire.send([_attention_at(config, kind, T, rounds, rt) for T in lengths])


def _attention_at(
    config: Config, kind: str, T: int, rounds: int, rt: runtime.Runtime
) -> Measured | str:
    heads, head_dim = config.model.n_head, config.model.head_dim
    generator = torch.Generator().manual_seed(0)
    # As in the model: queries, keys and values are views of one product, and the gradient comes in the order (B, T, heads, head_dim).
    product = (
        torch.randn(4, T, 3, heads, head_dim, generator=generator)
        .to(rt.device, rt.dtype)
        .requires_grad_()
    )
    d_out = (
        torch.randn(4, T, heads, head_dim, generator=generator)
        .to(rt.device, rt.dtype)
        .transpose(1, 2)
    )
    f: Any = torch.compile(attend, dynamic=False) if rt.compile and kind != "plain" else attend
    runtime.reset_peak_memory(rt.device)
    times = []
    try:
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            q, k, v = product.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
            f(q, k, v, causal=True, kernel=kind).backward(d_out)
            assert product.grad is not None
            product.grad.flatten()[:1].cpu()  # waits for the device
            times.append(time.perf_counter() - begin)
            product.grad = None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    first, *rest = times
    flops = 12.0 * 4 * T * config.model.n_embd * (T + 1) / 2
    return Measured(
        statistics.median(rest),
        (min(rest), max(rest)),
        first,
        4 * T,
        flops,
        runtime.peak_memory(rt.device),
        (),
    )
