"""Faults of running processes: kills, signals, hangs, changes of size, bad numbers."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anew import Config
from anew.checkpoint import folder as checkpoint
from anew.errors import Preempted
from anew.training import run_log as metrics
from anew.training.trainer import train
from tests.faults.common import SIGNALS, Tally, final, flags, losses, tiny
from tests.integration.test_parallel import trained, trained_until
from tests.support.ranks import run_ranks, start

MARK = "ANEW_FAULT_RUN"


def plain(config: Config) -> str:
    """A whole run, or the rest of one."""
    train(config)
    return "done"


# --- torchrun --------------------------------------------------------------------------------------------------------------------------


class Job:
    """A real torchrun with two ranks, and every process that it leads to, known by a mark in its environment."""

    def __init__(
        self, config: Config, restarts: int = 0, module: str = "anew", **environment: str
    ) -> None:
        self.mark, self.run = uuid.uuid4().hex, config.folder
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            f"--max-restarts={restarts}",
        ]
        self.log = (config.folder.parent / f"{config.folder.name}.log").open("w")
        self.agent = subprocess.Popen(
            [*launcher, "-m", module, "train", "shakespeare", *flags(config)],
            env={**os.environ, **environment, MARK: self.mark, "OMP_NUM_THREADS": "1"}, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def processes(self) -> list[int]:
        """Every living process of the job but the agent."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.agent.pid:
                with contextlib.suppress(OSError):
                    dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                    if (
                        not dead
                        and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                    ):
                        found.append(int(entry.name))
        return found

    def ranks(self) -> list[int]:
        """The training processes, by rank."""
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if part.startswith(b"RANK=") and os.getpgid(pid):
                        found[int(part[5:])] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        """Until `step` has been written down."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.agent.poll() is None:
            with contextlib.suppress(OSError, ValueError, IndexError):
                rows = (self.run / "metrics.jsonl").read_text().splitlines()
                if json.loads(rows[-1])["step"] >= step:
                    return
            time.sleep(0.002)

    def kill_all(self) -> None:
        """SIGKILL for the agent and everything below it, at once."""
        for pid in (self.agent.pid, *self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def end(self, seconds: float = 90) -> int:
        """The agent's exit status; what is left of the job is killed."""
        try:
            return self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self.kill_all()
            self.log.close()


def _gone(pids: list[int], seconds: float) -> float:
    """Seconds until none of `pids` is alive; infinity if some still are."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        alive = []
        for pid in pids:
            with contextlib.suppress(OSError):
                alive += (
                    [pid]
                    if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    not in "ZX"
                    else []
                )
        if not alive:
            return time.monotonic() - began
        time.sleep(0.02)
    return math.inf


def _reference(place: Path, **settings: Any) -> Config:
    """The run that nothing happened to, on two ranks."""
    config = tiny(place / "reference", **{"steps": 120, "keep": 0, **settings})
    found = run_ranks(2, plain, config, seconds=120)
    assert found == [("ok", "done")] * 2, found
    return config


def _same(tally: Tally, config: Config, reference: Config, what: str) -> None:
    tally.check(
        losses(config.folder) == losses(reference.folder), f"{what}: replayed losses differ"
    )
    tally.check(
        final(config.folder) == final(reference.folder), f"{what}: the final weights differ"
    )


def kill_torchrun(n: int, rng: random.Random, place: Path) -> Tally:
    """SIGKILL of the tree or one rank, 2-process torchrun"""
    tally, reference = Tally(), _reference(place)
    for i in range(n):
        config = reference.override(out=str(place / f"run-{i}"))
        job = Job(config)
        job.wait_for_step(rng.randint(2, 110))
        saved = [int(p.name[5:]) for p in checkpoint.steps(config.folder)]
        if i % 2:
            ranks = job.ranks()
            if ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
            job.end(60)
            tally.check(not job.processes(), "processes were left over")
        else:
            job.kill_all()
        newest, skipped = checkpoint.newest(config.folder)
        tally.check(not skipped, f"a damaged checkpoint: {skipped}")
        tally.check(
            not saved or (newest is not None and int(newest.name[5:]) >= saved[-1]),
            f"checkpoint {saved[-1:]} was lost",
        )
        found = run_ranks(2, plain, config, seconds=120)
        tally.check(found == [("ok", "done")] * 2, f"did not go on: {found}")
        _same(tally, config, reference, f"kill {i}")
        tally.runs += 1
    return tally


def lose_a_rank(n: int, rng: random.Random, place: Path) -> Tally:
    """Rank killed, raising, stopped; agent killed"""
    tally, reference = Tally(), _reference(place)
    noticed: dict[str, float] = {}
    kinds = ("stopped", "killed", "raising", "agent")
    cases = [(i, kinds[i % 4], rng.randint(10, 60), rng.randrange(2)) for i in range(n)]
    with ThreadPoolExecutor(
        2
    ) as pool:  # torchrun gives a stopped rank 30 s, in which nothing else happens
        for kind, took in pool.map(lambda case: _lose(tally, reference, *case), cases):
            noticed[kind] = max(noticed.get(kind, 0.0), took)
    tally.facts = {
        f"{kind}: all ranks ended within": f"{seconds:.1f} s" for kind, seconds in noticed.items()
    }
    return tally


def _lose(
    tally: Tally, reference: Config, i: int, kind: str, at: int, rank: int
) -> tuple[str, float]:
    """One run that loses a rank or its agent; what happened, and after how long no rank of before was left."""
    place = reference.folder.parent
    config = reference.override(out=str(place / f"run-{i}"), timeout_seconds=4.0)
    if kind == "raising":
        job = Job(
            config, 2, "tests.faults.wrapped", ANEW_FAULT=f"raise:1:{at}:{place / f'raised-{i}'}"
        )
    else:
        job = Job(config, 0 if kind == "agent" else 2)
    job.wait_for_step(at - 1 if kind == "raising" else at)
    before = job.ranks()
    if kind == "agent":
        os.kill(job.agent.pid, signal.SIGKILL)
        job.agent.wait()
    elif kind != "raising" and before:
        os.kill(before[rank % len(before)], signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
    limit = (
        4 + 30 + 10 if kind == "stopped" else 6.0
    )  # the timeout, then torchrun's own grace for what does not answer SIGTERM
    took = _gone(before, limit)
    tally.check(took < limit, f"{kind}: ranks were still there after {limit} s")
    if kind == "agent":
        tally.check(_gone(job.processes(), 5) < 5, "orphans after the agent's death")
        found = run_ranks(2, plain, config, seconds=120)
        tally.check(found == [("ok", "done")] * 2, f"did not go on: {found}")
        job.log.close()
    else:
        status = job.end(120)
        said = Path(job.log.name).read_text()[-1500:]
        tally.check(status == 0, f"{kind}: torchrun did not finish the run: {said}")
    tally.check(not job.processes(), f"{kind}: orphans")
    _same(tally, config, reference, kind)
    tally.runs += 1
    return kind, took


def change_world(n: int, rng: random.Random, place: Path) -> Tally:
    """World size 2 -> 1 -> 4 -> 2"""
    tally = Tally()
    config = tiny(place / "alone", steps=41, save_every=10, keep=0)
    [(_, alone)] = run_ranks(1, trained, config)
    for i in range(n):
        changing = config.override(out=str(place / f"run-{i}"), parallel=("ddp", "fsdp")[i % 2])
        for ranks, until in ((2, 10), (1, 20), (4, 30), (2, 40)):
            found = run_ranks(ranks, trained_until, changing, until)
            if any(status != "ok" for status, _ in found):
                tally.check(False, f"{ranks} ranks: {found}")
                break
            first = found[0][1]["first"]
            for k in range(len(found[0][1]["rows"])):
                rows = [row for _, part in found for row in part["rows"][k]]
                tally.check(
                    rows == alone["rows"][first + k],
                    f"other tokens at step {first + k} on {ranks} ranks",
                )
        whole = {r[0]: r[1] for r in losses(config.folder)}
        worst = max(abs(loss / whole[step] - 1) for step, loss, _, _ in losses(changing.folder))
        tally.check(worst <= 1e-6, f"losses differ by {worst:.1e}")
        tally.facts["largest difference of a loss"] = (
            f"{max(worst, tally.facts.get('worst', 0)):.1e}"
        )
        tally.runs += 1
    return tally


# --- one process -----------------------------------------------------------------------------------------------------------------------


def chain(n: int, rng: random.Random, place: Path) -> Tally:
    """Chained resumes incl. shard end, epoch end, mid-accumulation, during evaluation, finished run"""
    tally = Tally()
    kinds: list[dict[str, Any]] = [
        {
            "batch_tokens": 4096,
            "micro_batch": 16,
        },  # 4 steps an epoch: ends of shards and epochs between the stops
        {"micro_batch": 2},
        {"evaluate_every": 3},
        {"dropout": 0.1},
        {"optimizer": "muon", "decay_share": 0.5},
    ]
    for i in range(n):
        settings = {"steps": 16, **kinds[i % len(kinds)]}
        whole = tiny(place / f"whole-{i}", **settings)
        train(whole)
        parts = whole.override(out=str(place / f"parts-{i}"))
        for stop in sorted(rng.sample(range(1, 16), 3)):
            with (
                contextlib.suppress(Preempted),
                _signal_at(stop, ("loss", "evaluation", "progress")[rng.randrange(3)], settings),
            ):
                train(parts)
        train(parts)
        _same(tally, parts, whole, f"chain {i} {settings}")
        before = final(parts.folder), len(losses(parts.folder))
        train(parts)  # a finished run stays as it is
        tally.check(
            (final(parts.folder), len(losses(parts.folder))) == before, "a finished run changed"
        )
        tally.runs += 1
    return tally


@contextlib.contextmanager
def _signal_at(step: int, where: str, settings: dict[str, Any]) -> Iterator[None]:
    """SIGTERM in the second micro-batch of `step`, in the next evaluation, or behind the step."""
    module, during = (
        importlib.import_module("anew.training.trainer"),
        importlib.import_module("anew.training.validation"),
    )
    step_before, loss_before = module.train_step, during.mean_loss
    sent = False

    def send() -> None:
        nonlocal sent
        if not sent:
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def watched(loss_of: Any, state: Any, micro_batches: Any, *rest: Any) -> Any:
        calls = 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == min(2, len(micro_batches)):
                send()
            return loss_of(*arguments)

        outcome = step_before(
            counted if state.step >= step and where == "loss" else loss_of,
            state,
            micro_batches,
            *rest,
        )
        if state.step >= step and (where == "progress" or not settings.get("evaluate_every")):
            send()
        return outcome

    def evaluated(model: Any, *rest: Any) -> Any:
        if where == "evaluation":
            send()
        return loss_before(model, *rest)

    module.train_step, during.mean_loss = watched, evaluated
    try:
        yield
    finally:
        module.train_step, during.mean_loss = step_before, loss_before


PHASES = ("start-up", "compile", "step", "evaluation", "save", "loader wait")


def in_phase(argv: list[str], phase: str, marker: str) -> None:
    """The command line, which touches `marker` when the phase begins, and lingers there for a signal to arrive."""
    from anew.cli.main import main

    sys.stderr = sys.stdout = Path(f"{marker}.log").open("w")  # noqa: SIM115

    def announced(function: Callable[..., Any], at: int, linger: float = 0.4) -> Callable[..., Any]:
        calls = 0

        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                Path(marker).touch()
                time.sleep(linger)
            return function(*arguments, **named)

        return wrapper

    name, attribute, at, linger = {
        "start-up": ("anew.training.setup", "open_data", 1, 3.0),
        "compile": ("anew.training.trainer", "train_step", 1, 0.0),
        "step": ("anew.training.trainer", "train_step", 8, 0.4),
        "evaluation": ("anew.training.validation", "mean_loss", 2, 0.4),
        "save": ("anew.checkpoint.folder", "publish", 2, 0.4),
        "loader wait": ("anew.data.dataloader", "evaluation_windows", 1, 0.0),
    }[phase]
    module = importlib.import_module(name)
    if phase == "loader wait":
        module.Batches.rows = announced(module.Batches.rows, 12)  # the slow disk of an EC2 volume
    else:
        setattr(module, attribute, announced(getattr(module, attribute), at, linger))
    main(argv)


def signals(n: int, rng: random.Random, place: Path) -> Tally:
    """TERM / USR1 / double TERM at each phase"""
    tally = Tally()
    reference = tiny(place / "reference", evaluate_every=4, keep=0)
    run_ranks(1, plain, reference)  # in a process like those below: with one thread
    slowest = 0.0
    for i in range(n):
        phase = PHASES[i % len(PHASES)]
        kind = ("TERM", "USR1", "double TERM", "INT")[(i // len(PHASES) + i) % 4]
        if phase == "compile" and i >= len(PHASES):
            phase = "step"  # compiling takes ten seconds each time
        config = reference.override(
            out=str(place / f"run-{i}"), compile="on" if phase == "compile" else "off"
        )
        marker = place / f"marker-{i}"
        process, connection = start(
            in_phase, ["train", "shakespeare", *flags(config)], phase, str(marker)
        )
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline and process.is_alive():
            time.sleep(0.005)
        if phase == "compile":
            time.sleep(1.5 * rng.random())
        began = time.monotonic()
        os.kill(process.pid or 0, SIGNALS[kind.split()[-1]])
        if kind == "double TERM":
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGTERM)
        found = connection.recv() if connection.poll(60) else ("Timeout", "")
        took = time.monotonic() - began
        slowest = max(slowest, took)
        what = f"{kind} in {phase}"
        tally.check(found[0] == "SystemExit" and found[1].startswith("75"), f"{what}: {found}")
        tally.check(took < 20, f"{what}: took {took:.1f} s")
        process.join(10)
        rows = losses(config.folder) if (config.folder / "metrics.jsonl").exists() else []
        newest, skipped = checkpoint.newest(config.folder)
        tally.check(
            not skipped and (int(newest.name[5:]) if newest else 0) == (rows[-1][0] if rows else 0),
            f"{what}: not the last step",
        )
        if phase != "compile":
            run_ranks(1, plain, config)
            _same(tally, config, reference, what)
        tally.runs += 1
    tally.facts = {"slowest exit": f"{slowest:.1f} s"}
    return tally


# --- bad numbers -----------------------------------------------------------------------------------------------------------------------


def poisoned(config: Config, kind: str, at: int) -> list[Any]:
    """One rank's run in which rank 1's loss is not what it should be at step `at`: what it saw of every step."""
    module = importlib.import_module("anew.training.trainer")
    original = module.train_step
    factor = {"nan": math.nan, "inf": math.inf}.get(kind, 10.0)
    seen: list[Any] = []

    def step(loss_of: Any, state: Any, *rest: Any) -> Any:
        now = state.step == at
        bad = now and os.environ["RANK"] == "1"
        before = _digest(state) if now else ""
        outcome = original((lambda i, t: loss_of(i, t) * factor) if bad else loss_of, state, *rest)
        seen.append((state.step, repr(outcome), _digest(state) == before if now else None))
        return outcome

    module.train_step = step
    train(config)
    return seen


def _digest(state: Any) -> str:
    digest = hashlib.sha256()
    for tensor in (
        *state.parameters,
        *(v for o in state.optimizers for e in o.state.values() for v in e.values()),
    ):
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def bad_numbers(n: int, rng: random.Random, place: Path) -> Tally:
    """NaN or Inf on one rank; 10x spike"""
    tally = Tally()
    for i in range(n):
        kind = ("nan", "inf", "spike, skip")[i % 3]
        at = rng.randint(60, 75)
        settings = {"spikes": "skip" if kind == "spike, skip" else "keep"}
        config = tiny(place / f"run-{i}", steps=80, **settings)
        found = run_ranks(2, poisoned, config, kind, at, seconds=120)
        if [status for status, _ in found] != ["ok", "ok"]:
            tally.check(False, f"{kind}: {found}")
            continue
        a, b = (seen for _, seen in found)
        tally.check(a == b, f"{kind}: the ranks saw different things")
        tally.check(
            [unchanged for _, _, unchanged in a if unchanged is not None] == [True],
            f"{kind}: the step changed weights",
        )
        [bad] = [outcome for _, outcome, unchanged in a if unchanged is not None]
        tally.check("applied=False" in bad, f"{kind}: {bad}")
        text = (config.folder / "log.txt").read_text()
        tally.check("the step was skipped (sequences" in text, f"{kind}: not said")
        tally.check(
            metrics.read_metrics(config.folder)[-1]["step"] == 80, f"{kind}: the run did not end"
        )
        tally.runs += 1
    return tally
