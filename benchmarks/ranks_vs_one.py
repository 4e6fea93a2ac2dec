"""Tokens a second of two ranks with one thread each against one process with two, the same steps in turns: what sharing out costs.

    .venv/bin/python benchmarks/ranks_vs_one.py --rounds 2               # 124M, 8 x 1024 tokens a step
    .venv/bin/python benchmarks/ranks_vs_one.py --ranks 4 --parallel fsdp --recipe gpt2-124m

Both sides are `anew train` as a user would start it; seconds a step are read from metrics.jsonl, the first two steps left out.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def seconds(command: list[str], threads: int, out: Path) -> float:
    """Median seconds of the steps of a run."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [*command, "--out", str(out)], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [row["seconds"] for row in rows if "train/loss" in row]
    return statistics.median(b - a for a, b in itertools.pairwise(steps[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    settings = f"--data stdlib --batch-tokens {a.batch_tokens} --seq-len {a.seq_len} --micro-batch {a.micro_batch} --steps {a.steps}"
    settings += (
        " --warmup-steps 0 --evaluate-every 0 --val-tokens 0 --save-every 1000000 --device cpu"
    )
    train = ["-m", "anew", "train", a.recipe, *settings.split()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(a.ranks)]
    cores = os.cpu_count() or 1
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(a.rounds):
            one = a.batch_tokens / seconds(
                [sys.executable, *train], cores, Path(folder) / f"one-{i}"
            )
            ranks = [sys.executable, *torchrun, *train, "--parallel", a.parallel]
            several = a.batch_tokens / seconds(
                ranks, max(1, cores // a.ranks), Path(folder) / f"ranks-{i}"
            )
            rates.append((several, one))
            print(
                f"round {i + 1}: {a.ranks} ranks {several:,.0f} tokens/s, one process {one:,.0f}, ratio {several / one:.2f}",
                flush=True,
            )
    ratios = sorted(x / y for x, y in rates)
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if a.json:
        print(json.dumps({"rates": rates, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
