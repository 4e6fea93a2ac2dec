"""Measure how much of the gradient exchange is hidden behind the backward pass.

    sudo .venv/bin/python benchmarks/overlap.py --ranks 2 --rate 1gbit   # in network namespaces
    .venv/bin/python benchmarks/overlap.py --ranks 2                     # without a limited rate

With --rate, each rank runs in a network namespace with a link of limited rate to a common bridge,
so an exchange takes time without using the processor, as between two hosts. The ranks repeat the
same training step in three ways: without an exchange, with the exchange after the backward pass,
and with buckets that start during the backward pass. The hidden share is
(after - during) / (after - without).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

NETWORK = "10.77.0"
BRIDGE = "anew-bridge"
WAYS = ("without", "after", "during")


def run(command: str) -> None:
    """Run a command whose words contain no spaces."""
    subprocess.run(command.split(), check=True)


@contextlib.contextmanager
def network_namespaces(count: int, rate: str) -> Iterator[list[str]]:
    """Create network namespaces that are linked to a bridge at this rate. Yield their names."""
    names = [f"anew-overlap-{i}" for i in range(count)]
    try:
        run(f"ip netns add {BRIDGE}")
        run(f"ip -n {BRIDGE} link add br0 type bridge")
        run(f"ip -n {BRIDGE} link set br0 up")
        for i, name in enumerate(names):
            run(f"ip netns add {name}")
            run(f"ip link add anew{i} netns {BRIDGE} type veth peer name eth0 netns {name}")
            run(f"ip -n {BRIDGE} link set anew{i} master br0 up")
            run(f"ip -n {name} addr add {NETWORK}.{i + 1}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} link set lo up")
            shaping = f"root tbf rate {rate} burst 256kb latency 50ms"
            run(f"ip netns exec {BRIDGE} tc qdisc add dev anew{i} {shaping}")
            run(f"ip netns exec {name} tc qdisc add dev eth0 {shaping}")
        yield names
    finally:
        for name in [*names, BRIDGE]:
            command = ["ip", "netns", "delete", name]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def run_rank(arguments: argparse.Namespace) -> None:
    """Time the steps of one rank. Rank 0 prints the seconds of each step as JSON."""
    import torch

    from anew import recipe
    from anew.bench.timing import text_batch
    from anew.distributed.rendezvous import joined
    from anew.training.setup import training_loss
    from anew.training.train_state import TrainState
    from anew.utils.device import set_up_device

    torch.set_num_threads(1)
    config = recipe(
        arguments.recipe,
        seq_len=arguments.seq_len,
        micro_batch=arguments.micro_batch,
        batch_tokens=arguments.micro_batch * arguments.seq_len,
        steps=1000,
        warmup_steps=0,
        device="cpu",
        precision="fp32",
        compile="blocks" if arguments.compile else "off",
    )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with joined("cpu", 120) as world:
        runtime = set_up_device(config.run)
        state = TrainState(config, runtime, "", world)
        loss_of = training_loss(state)
        micro_batches = text_batch(config, runtime.device)
        buckets = state.buckets
        assert buckets is not None
        for round_number in range(arguments.rounds + 1):
            for way in WAYS:
                world.gather(None)  # all ranks begin together
                begin = time.perf_counter()
                buckets.start_step()
                if way == "during":
                    buckets.start_when_ready()
                for ids, targets in micro_batches:
                    loss_of(ids, targets).backward()
                if way != "without":
                    buckets.all_reduce()
                if round_number > 0:  # the first round compiles and warms up
                    seconds[way].append(time.perf_counter() - begin)
        if world.rank == 0:
            gradient_bytes = sum(4 * parameter.numel() for parameter in state.parameters)
            print(json.dumps({"seconds": seconds, "bytes": gradient_bytes}))


def run_ranks(count: int, namespaces: list[str]) -> dict[str, Any]:
    """Start this script as `count` ranks, in these namespaces if any. Return rank 0's result."""
    processes = []
    for i in range(count):
        environment = os.environ | {
            "RANK": str(i),
            "LOCAL_RANK": str(i),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": f"{NETWORK}.1" if namespaces else "127.0.0.1",
            "MASTER_PORT": "29577",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(i)]
        if namespaces:
            environment["GLOO_SOCKET_IFNAME"] = "eth0"
            command = ["ip", "netns", "exec", namespaces[i], *command]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    result: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print the median times and the hidden share, and everything as JSON on the last line."""
    for way in WAYS:
        times = result["seconds"][way]
        median = 1e3 * statistics.median(times)
        print(f"{way:<8} {median:>8.0f} ms  ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})")
    rounds = zip(*(result["seconds"][way] for way in WAYS), strict=True)
    shares = sorted(
        (after - during) / (after - without) for without, after, during in rounds if after > without
    )
    share = statistics.median(shares)
    print(
        f"gradients: {result['bytes'] / 1e6:.1f} MB; "
        f"hidden: {100 * share:.0f}% ({100 * shares[0]:.0f} to {100 * shares[-1]:.0f})"
    )
    print(json.dumps({**result, "hidden": share}))


def main() -> None:
    """Start the ranks, or become one of them with --rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="gpt2-5m")
    parser.add_argument("--ranks", type=int, default=2)
    rate_help = "rate of each link in the notation of `tc`: 1gbit, 200mbit; needs root"
    parser.add_argument("--rate", default="", help=rate_help)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
    elif arguments.rate:
        with network_namespaces(arguments.ranks, arguments.rate) as namespaces:
            result = run_ranks(arguments.ranks, namespaces)
        print_result(result)
    else:
        print_result(run_ranks(arguments.ranks, []))


if __name__ == "__main__":
    main()
