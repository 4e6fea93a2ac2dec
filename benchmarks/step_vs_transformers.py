"""One training step of GPT-2 124M, ours against `transformers`, timed alternately in one run.

    .venv/bin/python benchmarks/step_vs_transformers.py                 # 4 x 1024 tokens, about 4 minutes on two cores
    .venv/bin/python benchmarks/step_vs_transformers.py --rounds 10 --json

Both sides: bf16, torch.compile, fused AdamW, gradient clipping at 1.0, the same tokens, no dropout. Theirs is GPT2LMHeadModel under
bf16 autocast. Prints the tokens a second of each and the median of the ratios of neighbouring steps, with their spread.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from anew import GPT, GPTConfig, optim
from anew.config import OptimConfig
from anew.model import flops_per_token
from anew.train import train_step


def our_step(ids: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """The product's own train_step on its own model."""
    model = GPT(GPTConfig(), torch.bfloat16).to(device)
    loss_of, optimizers = torch.compile(model, dynamic=False), optim.build(model, OptimConfig())
    params, scaler, stop = list(model.parameters()), torch.amp.GradScaler(device.type, enabled=False), threading.Event()
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    return lambda: train_step(loss_of, params, optimizers, batch, scaler, [0], 1.0, 1.0, stop) and None


def their_step(ids: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """The same step as a careful user of transformers would write it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa")
    model = GPT2LMHeadModel(config).to(device).train()
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x = ids[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(input_ids=x, labels=x).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    device = torch.device(a.device)
    ids = torch.randint(50257, (a.batch, 1025), generator=torch.Generator().manual_seed(0)).to(device)
    steps = {"anew": our_step(ids, device), "transformers": their_step(ids, device)}
    for name, step in steps.items():
        print(f"{name}: first step with compilation {seconds(step, device):.1f} s", flush=True)
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(a.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    tokens = a.batch * 1024
    for name, t in times.items():
        rate = tokens / statistics.median(t)
        print(
            f"{name:<13} {statistics.median(t):.3f} s a step  {rate:,.0f} tokens/s  {rate * flops_per_token(GPTConfig(), 1024) / 1e12:.2f} TFLOP/s"
        )
    ratios = sorted(theirs / ours for ours, theirs in zip(times["anew"], times["transformers"], strict=True))
    print(f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f} over {a.rounds} rounds)")
    if a.json:
        print(json.dumps({"ratio_to_transformers": statistics.median(ratios), "seconds": times, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
