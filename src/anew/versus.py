"""Side by side with other packages: each side in a process of its own, taking turns, ratios of neighbouring turns.

    times = alternate({"anew": our_step, "transformers": their_step}, arguments, rounds=7)

Both sides of a training step: bf16, torch.compile, fused AdamW, clipping at 1.0, the same tokens, no dropout; theirs as a careful user
would write it. Process-wide settings (the allocator, determinism) are part of what is compared, so no process serves two sides.
"""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

Step = Callable[[], Any]
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")


def our_step(config: Any, device: str) -> Step:
    """The product's own runtime, model and train_step."""
    import threading

    from anew import bench, runtime
    from anew.state import State
    from anew.train import train_step

    config = config.override(device=device)
    rt = runtime.start(config.run)
    state, stop = State(config, rt, ""), threading.Event()
    loss_of: Any = torch.compile(state.model, dynamic=False) if rt.compile else state.model
    batch = bench.text_batch(config, rt.device)
    return lambda: train_step(loss_of, state, batch, 1.0, stop)


def their_step(config: Any, device: str) -> Step:
    """The same step with GPT2LMHeadModel under autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from anew import bench, runtime

    shape: Any = {name: getattr(config.model, name) for name in SHAPE}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False, "attn_implementation": "sdpa"}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape)).train()
    model.to(device)
    compiled, _ = runtime.pick_compile(config.run.compile, torch.device(device))
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = bench.text_batch(config, torch.device(device))

    def step() -> None:
        for x, _ in batch:
            with torch.autocast(device, torch.bfloat16):
                loss = forward(input_ids=x, labels=x).loss / len(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(config: Any, device: str) -> Step:
    """The same model and data in fp32, eager, with torch's default AdamW: a step as the oldest scripts take it on a CPU."""
    from anew import bench

    return our_step(config.override(**bench.BOTTOM), device)


def our_writing(config: Any, device: str, rows: int, prompt: int, tokens: int, int8: bool = False) -> Step:
    """The product's own cached decoding, greedy."""
    from anew import GPT, generate

    model = GPT(config.model, torch.bfloat16, seed=0).to(device).eval()
    prompts = torch.randint(50257, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    return lambda: generate(model, prompts, tokens, temperature=0.0, int8=int8)


def our_writing_int8(config: Any, device: str, rows: int, prompt: int, tokens: int) -> Step:
    """The same with weights in 8 bits."""
    return our_writing(config, device, rows, prompt, tokens, int8=True)


def their_writing(config: Any, device: str, rows: int, prompt: int, tokens: int) -> Step:
    """`generate` of transformers in bf16, greedy."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {name: getattr(config.model, name) for name in SHAPE}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.to(device, torch.bfloat16)
    ids = torch.randint(50257, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 50256}

    def step() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)

    return step


def is_installed(package: str) -> bool:
    """Can the other side be had?"""
    return importlib.util.find_spec(package) is not None


def alternate(sides: dict[str, Callable[..., Step]], arguments: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's turns, after two that warm up."""
    context = multiprocessing.get_context("spawn")
    wires: dict[str, Connection] = {}
    processes = []
    for name, make in sides.items():
        wires[name], theirs = context.Pipe()
        processes.append(context.Process(target=_side, args=(make, arguments, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        _turn(wires[name])  # one after the other: two that compile at once are slower than both in turn
        _turn(wires[name])
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, wire in wires.items():
            times[name].append(_turn(wire))
    for wire in wires.values():
        wire.send(False)
    for process in processes:
        process.join()
    return times


def _turn(wire: Connection) -> float:
    wire.send(True)
    return float(wire.recv())


def _side(make: Callable[..., Step], arguments: tuple[Any, ...], wire: Connection) -> None:
    """One process: for every message, one turn and its seconds."""
    step = make(*arguments)
    while wire.recv():
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wire.send(time.perf_counter() - begin)


def ratio(mine: list[float], other: list[float]) -> tuple[float, float, float]:
    """How many times as long the other takes: median of neighbouring turns, smallest, largest."""
    ratios = sorted(slow / fast for fast, slow in zip(mine, other, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]
