"""How much of the exchange of gradients does the backward pass hide?

    sudo .venv/bin/python benchmarks/overlap.py --ranks 2 --rate 1gbit      # two hosts in network namespaces
    .venv/bin/python benchmarks/overlap.py --ranks 2                        # ranks on this host, without a limit

Each rank is a host of its own: a network namespace with a link of limited rate to a common bridge, so
that an exchange takes time without taking the processor. The ranks take the same training step by
turns in three ways: without any exchange, with the exchange after the backward pass, and with buckets
that start during it. The share that is hidden is (after - during) / (after - without).
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
WAYS = ("without", "after", "during")


def sh(*words: str) -> None:
    subprocess.run(words, check=True)


@contextlib.contextmanager
def hosts(count: int, rate: str) -> Iterator[list[str]]:
    """Names of `count` network namespaces whose links to a bridge have this rate."""
    names = [f"anew-overlap-{i}" for i in range(count)]
    bridge = "anew-bridge"
    try:
        sh("ip", "netns", "add", bridge)
        sh("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", bridge, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            sh("ip", "netns", "add", name)
            sh(
                "ip",
                "link",
                "add",
                f"anew{i}",
                "netns",
                bridge,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            sh("ip", "-n", bridge, "link", "set", f"anew{i}", "master", "br0", "up")
            sh("ip", "-n", name, "addr", "add", f"{NETWORK}.{i + 1}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            for namespace, device in ((bridge, f"anew{i}"), (name, "eth0")):
                shaping = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
                sh("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, *shaping)
        yield names
    finally:
        for name in [*names, bridge]:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def rank(arguments: argparse.Namespace) -> None:
    """One rank: prints the seconds of each step as JSON, if it is the first."""
    import torch

    from anew import recipe
    from anew.bench.timing import text_batch
    from anew.config.schema import RunConfig
    from anew.distributed.rendezvous import joined
    from anew.training.setup import training_loss
    from anew.training.train_state import TrainState
    from anew.utils.device import start

    torch.set_num_threads(1)
    tokens = arguments.micro_batch * arguments.seq_len
    config = recipe(
        arguments.recipe, seq_len=arguments.seq_len, micro_batch=arguments.micro_batch, batch_tokens=tokens, steps=1000,
        warmup_steps=0, device="cpu", precision="fp32", compile="blocks" if arguments.compile else "off",
    )  # fmt: skip
    with joined("cpu", 120) as world:
        rt = start(RunConfig(device="cpu", precision="fp32", compile=config.run.compile))
        state = TrainState(config, rt, "", world)
        loss_of, batch = training_loss(state), text_batch(config, rt.device)
        assert state.buckets is not None
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(arguments.rounds + 1):
            for way in WAYS:
                world.gather(None)  # all begin together
                begin = time.perf_counter()
                state.buckets.start_step()
                if way == "during":
                    state.buckets.start_when_ready()
                for ids, targets in batch:
                    loss_of(ids, targets).backward()
                if way != "without":
                    state.buckets.all_reduce()
                if turn:
                    seconds[way].append(time.perf_counter() - begin)
        if world.rank == 0:
            print(
                json.dumps(
                    {"seconds": seconds, "bytes": sum(4 * p.numel() for p in state.parameters)}
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="gpt2-5m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rate", default="", help="of each link, as `tc` writes it: 1gbit, 200mbit; needs root"
    )
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments)
        return
    with (
        hosts(arguments.ranks, arguments.rate)
        if arguments.rate
        else contextlib.nullcontext([""] * arguments.ranks) as names
    ):
        address = f"{NETWORK}.1" if arguments.rate else "127.0.0.1"
        started = []
        for i, name in enumerate(names):
            inside = ["ip", "netns", "exec", name] if name else []
            environment = os.environ | {
                "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(arguments.ranks), "MASTER_ADDR": address,
                "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1", **({"GLOO_SOCKET_IFNAME": "eth0"} if name else {}),
            }  # fmt: skip
            command = [*inside, sys.executable, __file__, *sys.argv[1:], "--rank", str(i)]
            started.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            )
        outputs = [process.communicate()[0] for process in started]
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    middle = {way: statistics.median(found["seconds"][way]) for way in WAYS}
    for way in WAYS:
        times = found["seconds"][way]
        print(
            f"{way:<8} {1e3 * middle[way]:>8.0f} ms  ({1e3 * min(times):.0f} to {1e3 * max(times):.0f})"
        )
    rows = list(zip(*(found["seconds"][way] for way in WAYS), strict=True))
    shares = sorted(
        (after - during) / (after - without) for without, after, during in rows if after > without
    )
    share = statistics.median(shares)
    print(
        f"gradients: {found['bytes'] / 1e6:.1f} MB; hidden: {100 * share:.0f}% ({100 * shares[0]:.0f} to {100 * shares[-1]:.0f})"
    )
    print(json.dumps({**found, "hidden": share}))


if __name__ == "__main__":
    main()
