"""Compare two ranks with one thread each with one process with two threads, in tokens a second.

    .venv/bin/python benchmarks/ranks_vs_one.py --rounds 2        # 124M, 8 x 1024 tokens a step
    .venv/bin/python benchmarks/ranks_vs_one.py --ranks 4 --parallel fsdp --recipe gpt2-124m

The ratio shows what distributing a step over ranks costs. Both sides are `anew train` as a user
starts it, and they take turns. The seconds of a step come from metrics.jsonl, without the first two
steps.
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


def seconds_per_step(command: list[str], threads: int, out: Path) -> float:
    """Train with a number of threads in each process. Return the median seconds of a step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *command, "--out", str(out)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    times: list[float] = [row["seconds"] for row in rows if "train/loss" in row]
    return statistics.median(end - begin for begin, end in itertools.pairwise(times[1:]))


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
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
    return parser.parse_args()


def main() -> None:
    """Time both sides in each round, and print the ratios."""
    arguments = read_arguments()
    ranks = arguments.ranks
    tokens = arguments.batch_tokens
    settings = (
        f"--data stdlib --batch-tokens {tokens} --seq-len {arguments.seq_len} "
        f"--micro-batch {arguments.micro_batch} --steps {arguments.steps} --warmup-steps 0 "
        "--evaluate-every 0 --val-tokens 0 --save-every 1000000 --device cpu"
    )
    train = ["-m", "anew", "train", arguments.recipe, *settings.split()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    train_on_ranks = [*torchrun, *train, "--parallel", arguments.parallel]
    cores = os.cpu_count() or 1
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.rounds):
            one = tokens / seconds_per_step(train, cores, Path(folder, f"one-{i}"))
            threads = max(1, cores // ranks)
            out = Path(folder, f"ranks-{i}")
            several = tokens / seconds_per_step(train_on_ranks, threads, out)
            rates.append((several, one))
            print(
                f"round {i + 1}: {ranks} ranks {several:,.0f} tokens/s, "
                f"one process {one:,.0f}, ratio {several / one:.2f}",
                flush=True,
            )
    ratios = sorted(several / one for several, one in rates)
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if arguments.json:
        print(json.dumps({"rates": rates, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
