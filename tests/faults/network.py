"""Faults of the network between two machines, each with one rank under torchrun."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from anew import Config
from tests.faults.common import FaultResult, check_same_run, flags, tiny, train_run
from tests.support.network import DEVICE, Link, address, machines, why_impossible
from tests.support.ranks import run_ranks

PORT = 29500
START_SECONDS = 120.0
RUN_SECONDS = 240.0
STEPS = 60


@dataclass(frozen=True)
class NetworkFault:
    """What happens to the frames, and the run's timeout."""

    timeout_seconds: float
    delay_seconds: float = 0.0
    loss: float = 0.0
    cut_seconds: float = 0.0  # after a random step

    @property
    def loses_ranks(self) -> bool:
        """Return whether the cut lasts longer than the timeout, so that the ranks must restart."""
        return self.cut_seconds > self.timeout_seconds


FAULTS = {
    "long cut": NetworkFault(timeout_seconds=4.0, cut_seconds=10.0),
    "loss and delay": NetworkFault(timeout_seconds=30.0, delay_seconds=0.005, loss=0.03),
    "short cut": NetworkFault(timeout_seconds=30.0, cut_seconds=3.0),
}


def disturb_network(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Train on two machines with a bad network, and compare with a run without one."""
    result = FaultResult()
    result.skip_reason = why_impossible()
    if result.skip_reason:
        return result
    reference = tiny(scratch / "reference", steps=STEPS, keep=0)
    run_ranks(2, train_run, reference)
    n_frames = 0
    n_lost = 0
    for i in range(injections):
        kind = list(FAULTS)[i % len(FAULTS)]
        fault = FAULTS[kind]
        settings = {"out": str(scratch / f"run-{i}"), "timeout_seconds": fault.timeout_seconds}
        config = reference.override(**settings)
        link = Link(random.Random(rng.random()))
        logs = [scratch / f"{i}-{machine}.log" for machine in range(2)]
        commands = [_command(config, machine) for machine in range(2)]
        with (
            patch.dict(os.environ, GLOO_SOCKET_IFNAME=DEVICE, OMP_NUM_THREADS="1"),
            machines(commands, logs, link) as processes,
        ):
            _inject(link, fault, config, rng)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(RUN_SECONDS)
            codes = [process.returncode for process in processes]
        output = "\n".join(log.read_text() for log in logs)
        result.check(link.n_lost > 0, f"{kind}: no frame was lost")
        result.check(codes == [0, 0], f"{kind}: exit codes {codes}: {output[-3000:]}")
        was_lost = "lost another rank" in output
        result.check(was_lost == fault.loses_ranks, f"{kind}: ranks lost: {was_lost}")
        if codes == [0, 0]:
            check_same_run(result, config, reference, kind)
        n_frames += link.n_frames
        n_lost += link.n_lost
        result.injections += 1
    result.measurements["frames"] = f"{n_frames:,}, of which {n_lost:,} were lost"
    return result


def _command(config: Config, machine: int) -> list[str]:
    """Return the command for one of two machines that launch/README.md describes."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address(0)}:{PORT}", "--rdzv-id=anew"]
    # Namespaces have the name of the machine, which torchrun would compare with the endpoint.
    launcher += [f"--local-addr={address(machine)}", "--max-restarts=3"]
    launcher += ["--rdzv-conf=is_host=1"] if machine == 0 else []
    return [sys.executable, *launcher, "-m", "anew", "train", "shakespeare", *flags(config)]


def _inject(link: Link, fault: NetworkFault, config: Config, rng: random.Random) -> None:
    """Disturb the link: from the beginning, or for some seconds after a random step."""
    link.delay_seconds = fault.delay_seconds
    link.loss = fault.loss
    if fault.cut_seconds:
        _wait_for_step(config.folder, rng.randint(3, STEPS // 2))
        link.is_cut = True
        time.sleep(fault.cut_seconds)
        link.is_cut = False


def _wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while max(_steps(run), default=0) < step and time.monotonic() < deadline:
        time.sleep(0.01)


def _steps(run: Path) -> Iterator[int]:
    """Yield the steps that a run has recorded."""
    with contextlib.suppress(OSError, ValueError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            yield json.loads(line)["step"]
