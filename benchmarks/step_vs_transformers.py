"""One training step of GPT-2 124M, ours against `transformers`, timed alternately in one run.

    .venv/bin/python benchmarks/step_vs_transformers.py                 # 4 x 1024 tokens, about 4 minutes on two cores
    .venv/bin/python benchmarks/step_vs_transformers.py --rounds 10 --json

Both sides: bf16, torch.compile, fused AdamW, gradient clipping at 1.0, the same tokens, no dropout. Theirs is GPT2LMHeadModel under
bf16 autocast. Each side lives in a process of its own, since process-wide settings (the allocator, determinism) are part of what is
compared; they take turns, one step each. Prints tokens a second and the median of the ratios of neighbouring steps, with their spread.
"""

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import nn

from anew import Config, GPTConfig, runtime
from anew.model import flops_per_token
from anew.state import State
from anew.train import train_step


def our_step(ids: torch.Tensor) -> Callable[[], None]:
    """The product's own runtime, model and train_step."""
    config = Config().override(device=ids.device.type, precision="bf16", compile="on")
    state, stop = State(config, runtime.start(config.run), ""), threading.Event()
    loss_of = torch.compile(state.model, dynamic=False)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    return lambda: train_step(loss_of, state, batch, 1.0, stop) and None


def their_step(ids: torch.Tensor) -> Callable[[], None]:
    """The same step as a careful user of transformers would write it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa")
    model = GPT2LMHeadModel(config).to(ids.device).train()
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x = ids[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = compiled(input_ids=x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def side(make: Callable[[torch.Tensor], Callable[[], None]], batch: int, device: str, wire: Connection) -> None:
    """One process: for every message, one step and its seconds."""
    ids = torch.randint(50257, (batch, 1025), generator=torch.Generator().manual_seed(0)).to(device)
    step = make(ids)
    while wire.recv():
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        wire.send(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    wires: dict[str, Connection] = {}
    for name, make in (("anew", our_step), ("transformers", their_step)):
        wires[name], theirs = context.Pipe()
        context.Process(target=side, args=(make, a.batch, a.device, theirs), daemon=True).start()

    def seconds(name: str) -> float:
        wires[name].send(True)
        return float(wires[name].recv())

    for name in wires:
        print(f"{name}: first step with compilation {seconds(name):.1f} s", flush=True)
        seconds(name)
    times: dict[str, list[float]] = {name: [] for name in wires}
    for _ in range(a.rounds):
        for name in wires:
            times[name].append(seconds(name))
    for wire in wires.values():
        wire.send(False)
    for name, t in times.items():
        rate = a.batch * 1024 / statistics.median(t)
        tflops = rate * flops_per_token(GPTConfig(), 1024) / 1e12
        print(f"{name:<13} {statistics.median(t):.3f} s a step  {rate:,.0f} tokens/s  {tflops:.2f} TFLOP/s")
    ratios = sorted(slow / fast for fast, slow in zip(times["anew"], times["transformers"], strict=True))
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f} over {a.rounds} rounds)")
    if a.json:
        print(json.dumps({"ratio_to_transformers": statistics.median(ratios), "seconds": times, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
