"""Faults of a torchrun job with two ranks: killed, stopped and crashed ranks, a killed agent."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anew import Config
from anew.checkpoint.folder import list_checkpoints, newest_valid
from anew.training import run_log
from tests.faults.common import FaultResult, check_same_run, flags, saved_step, tiny, train_run
from tests.faults.faulty_rank import FAULTS
from tests.support.ranks import run_ranks

MARK = "ANEW_FAULT_RUN"  # an environment variable that all processes of one job inherit
TWO_RANKS_DONE = [("ok", "done")] * 2


class Job:
    """A torchrun with two ranks, and all processes that it starts."""

    def __init__(
        self, config: Config, restarts: int = 0, module: str = "anew", **environment: str
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.run = config.folder
        self.log = config.folder.with_suffix(".log")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, "-m", *launcher, f"--max-restarts={restarts}"]
        command += ["-m", module, "train", "shakespeare", *flags(config)]
        variables = {**os.environ, **environment, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.agent = subprocess.Popen(command, env=variables, stdout=log, stderr=log)

    def processes(self) -> list[int]:
        """Return every living process of the job except the agent."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        variable = f"{MARK}={self.mark}".encode()
        marked = [pid for pid in pids if _is_alive(pid) and variable in _environment(pid)]
        return [pid for pid in marked if pid != self.agent.pid]

    def ranks(self) -> list[int]:
        """Return the training processes in the order of their ranks."""
        found = {}
        for pid in self.processes():
            for variable in _environment(pid):
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Wait until the run has recorded `step`, or has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.agent.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError):
                rows = (self.run / "metrics.jsonl").read_text().splitlines()
                if json.loads(rows[-1])["step"] >= step:
                    return
            time.sleep(0.002)

    def kill_all(self) -> None:
        """Send SIGKILL to the agent and to all processes below it."""
        for pid in (self.agent.pid, *self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def end(self, seconds: float = 90) -> int:
        """Return the agent's exit code, or -1 after `seconds`. Kill what is left of the job."""
        try:
            return self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self.kill_all()


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state = status.rpartition(")")[2].split()[0]
    return state not in "ZX"  # zombie or dead


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _seconds_until_gone(pids: list[int], limit: float) -> float:
    """Return the seconds until none of `pids` is alive, or infinity after `limit` seconds."""
    start = time.monotonic()
    while time.monotonic() - start < limit:
        if not any(_is_alive(pid) for pid in pids):
            return time.monotonic() - start
        time.sleep(0.02)
    return math.inf


def _reference(scratch: Path) -> Config:
    """Return the config of a complete run on two ranks, into which no fault was injected."""
    config = tiny(scratch / "reference", steps=120, keep=0)
    found = run_ranks(2, train_run, config, seconds=120)
    assert found == TWO_RANKS_DONE, found
    return config


def _finish(result: FaultResult, config: Config) -> None:
    """Continue an interrupted run to its end, on two ranks without torchrun."""
    found = run_ranks(2, train_run, config, seconds=120)
    result.check(found == TWO_RANKS_DONE, f"the run did not continue: {found}")


def kill_torchrun(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Kill the whole job or one rank at a random step, then continue and compare the runs."""
    result = FaultResult()
    reference = _reference(scratch)
    for i in range(injections):
        config = reference.override(out=str(scratch / f"run-{i}"))
        job = Job(config)
        job.wait_for_step(rng.randint(2, 110))
        saved = [saved_step(checkpoint) for checkpoint in list_checkpoints(config.folder)]
        if i % 2 == 0:
            job.kill_all()
        else:
            ranks = job.ranks()
            if ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
            job.end(60)
            result.check(not job.processes(), "processes are left over")
        checkpoint, skipped = newest_valid(config.folder)
        result.check(not skipped, f"a damaged checkpoint: {skipped}")
        has_lost_none = not saved or saved_step(checkpoint) >= saved[-1]
        result.check(has_lost_none, f"checkpoint {saved[-1:]} is lost")
        _finish(result, config)
        check_same_run(result, config, reference, f"kill {i}")
        result.injections += 1
    return result


@dataclass(frozen=True)
class Case:
    """Which rank a job loses, how and after which step."""

    number: int
    kind: str
    step: int
    rank: int


# The limits of the time until all ranks have ended. A rank that does not answer is noticed after
# the run's timeout of 4 s, and torchrun then waits 30 s for its answer to SIGTERM.
SECONDS_WITHOUT_ANSWER = 4.0 + 30.0 + 10.0
LOST_RANKS = {
    "stopped rank": SECONDS_WITHOUT_ANSWER,
    "killed rank": 6.0,
    "raising rank": 6.0,
    "killed agent": 6.0,
}
CRASHES = {
    "segmentation fault": 6.0,
    "abort": 6.0,
    "asynchronous exception": 6.0,
    "held lock": SECONDS_WITHOUT_ANSWER,
}
# In the output of a job, for the crashes below Python.
STACKS = {
    "segmentation fault": "Fatal Python error: Segmentation fault",
    "abort": "Fatal Python error: Aborted",
}


def lose_rank(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Lose a rank or the agent at a random step: the other ranks end, and the run continues."""
    return _lose_ranks(LOST_RANKS, injections, rng, scratch)


def crash_rank(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Crash a rank at a random step: the other rank ends, and the run continues."""
    return _lose_ranks(CRASHES, injections, rng, scratch)


def _lose_ranks(
    limits: dict[str, float], injections: int, rng: random.Random, scratch: Path
) -> FaultResult:
    result = FaultResult()
    reference = _reference(scratch)
    kinds = list(limits)
    cases = [
        Case(i, kinds[i % len(kinds)], rng.randint(10, 60), rng.randrange(2))
        for i in range(injections)
    ]
    slowest: dict[str, float] = {}
    # Two jobs at a time: a job with a stopped rank does nothing for 30 s.
    with ThreadPoolExecutor(2) as pool:
        times = pool.map(lambda case: _lose(result, reference, case, limits[case.kind]), cases)
        for case, seconds in zip(cases, times, strict=True):
            slowest[case.kind] = max(slowest.get(case.kind, 0.0), seconds)
    measured = [f"{kind} {seconds:.1f} s" for kind, seconds in slowest.items()]
    result.measurements["all ranks ended within"] = ", ".join(measured)
    return result


def _lose(result: FaultResult, reference: Config, case: Case, limit: float) -> float:
    """Inject one loss. Return the seconds until the ranks that were running had ended."""
    scratch = reference.folder.parent
    config = reference.override(out=str(scratch / f"run-{case.number}"), timeout_seconds=4.0)
    is_planned = case.kind in FAULTS
    if is_planned:
        marker = scratch / f"fault-{case.number}"
        plan = f"{case.kind}:{case.rank}:{case.step}:{marker}"
        job = Job(config, restarts=2, module="tests.faults.faulty_rank", ANEW_FAULT=plan)
        job.wait_for_step(case.step - 1)
    else:
        job = Job(config, restarts=0 if case.kind == "killed agent" else 2)
        job.wait_for_step(case.step)
    ranks = job.ranks()
    # A rank with a planned fault may have ended already.
    result.check(len(ranks) == 2 or is_planned, f"{case.kind}: {len(ranks)} ranks were running")
    if case.kind == "killed agent":
        os.kill(job.agent.pid, signal.SIGKILL)
        job.agent.wait()
    elif not is_planned and ranks:
        number = signal.SIGSTOP if case.kind == "stopped rank" else signal.SIGKILL
        os.kill(ranks[case.rank % len(ranks)], number)
    seconds = _seconds_until_gone(ranks, limit)
    result.check(seconds < limit, f"{case.kind}: ranks are still alive after {limit} s")
    if case.kind == "killed agent":
        has_no_orphans = _seconds_until_gone(job.processes(), 5) < 5
        result.check(has_no_orphans, "processes are left over after the agent was killed")
        _finish(result, config)
    else:
        exit_code = job.end(120)
        output = job.log.read_text()[-1500:]
        result.check(exit_code == 0, f"{case.kind}: torchrun did not finish the run: {output}")
        has_stack = STACKS.get(case.kind, "") in job.log.read_text()
        result.check(has_stack, f"{case.kind}: the crash is not described")
    result.check(not job.processes(), f"{case.kind}: processes are left over")
    starts = run_log.read_run_state(config.folder)["starts"]
    result.check(starts >= 2, f"{case.kind}: the run was started {starts} times")
    check_same_run(result, config, reference, case.kind)
    result.injections += 1
    return seconds
