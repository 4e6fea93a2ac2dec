"""Train and serve for an hour, and compare what the processes use in the two halves of that time.

    python -m tests.faults.soak --minutes 60

A run trains with checkpoints, validations and samples, and a server answers with one of its
checkpoints: to clients that stream texts, to clients that leave in the middle of one, and to a
browser that loads the page. Memory, file descriptors, threads and the disk that checkpoints take
are read every second from /proc. A leak shows as a second half that uses more than the first.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from anew.training.run_log import read_metrics
from tests.support import ROOT
from tests.support.serving import request, served
from tests.support.usage import server_process, usage_of

MOST_GROWTH = 0.02  # of the second half over the first
SECONDS_BETWEEN_READINGS = 1.0
START_UP = 0.1  # share of the time that is left out at the beginning: caches fill
PAUSE_OF_CLIENTS = 1.0  # seconds
GROWING_FILES = {"metrics.jsonl", "samples.jsonl", "log.txt"}  # and TensorBoard's: by design
STEPS_BETWEEN_SAVES = 20
COUNTS = ("descriptors", "threads")
STOPPED = 75  # the exit code of a run that was asked to stop


@dataclass(frozen=True)
class Halves:
    """A quantity in the two halves of the time."""

    name: str
    first: float
    second: float

    @property
    def growth(self) -> float:
        """Return the growth from the first half to the second, as a share."""
        return self.second / self.first - 1

    @property
    def is_constant(self) -> bool:
        """Return whether the second half uses at most a little more than the first."""
        return self.growth < MOST_GROWTH


def disk_mb(run: Path) -> float:
    """Return the size of a run folder without the files that grow with each step."""
    total = 0
    for folder, _, names in os.walk(run):
        for name in names:
            if name not in GROWING_FILES and not name.startswith("events.out"):
                with contextlib.suppress(OSError):  # pruned in the meantime
                    total += (Path(folder) / name).stat().st_size
    return total / 1e6


def train_command(run: Path) -> list[str]:
    """Return the command of a run that saves, validates and samples all the time."""
    settings = {
        "out": str(run),
        "steps": 10_000_000,
        "save-every": STEPS_BETWEEN_SAVES,
        "evaluate-every": STEPS_BETWEEN_SAVES,
        "sample-every": STEPS_BETWEEN_SAVES,
        "check-every": 100,
        "val-tokens": 4096,
        "keep": 2,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "anew", "train", "demo", *flags]


class Clients:
    """Threads that use a server until they are told to stop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stop = threading.Event()
        self.answers: dict[str, int] = {}  # by kind of client and status
        self.problems: list[str] = []
        kinds: list[Callable[[], str]] = [self.stream, self.stream, self.leave, self.load_page]
        self.threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in kinds]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _repeat(self, use: Callable[[], str]) -> None:
        while not self.stop.wait(PAUSE_OF_CLIENTS):
            try:
                status = use()
            except OSError as error:
                status = type(error).__name__
                self.problems.append(f"{use.__name__}: {error!r}")
            key = f"{use.__name__} {status}"
            self.answers[key] = self.answers.get(key, 0) + 1

    def stream(self) -> str:
        """Read a whole text as it is written."""
        body = json.dumps({"prompt": "def ", "max_tokens": 60, "stream": True}).encode()
        answer = request(self.address, "POST", "/v1/completions", body)
        if not answer.body.rstrip().endswith(b"data: [DONE]"):
            self.problems.append(f"stream: {answer.body[-200:]!r}")
        return str(answer.status)

    def leave(self) -> str:
        """Begin to read a text, and close the connection."""
        host = self.address.removeprefix("http://")
        body = json.dumps({"prompt": "class ", "n_tokens": 100}).encode()
        with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            connection.request("POST", "/api/write", body, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read(200)
            return str(response.status)

    def load_page(self) -> str:
        """Load the page and its files, as a browser does."""
        for path in ("/", "/page.css", "/page.js", "/api/models"):
            answer = request(self.address, "GET", path)
        return str(answer.status)


@contextlib.contextmanager
def training(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Train until the block ends; then stop the run as a user does."""
    with (
        run.with_suffix(".out").open("wb") as output,
        subprocess.Popen(train_command(run), cwd=ROOT, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for_checkpoint(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run has saved its first checkpoint."""
    while not (run / "checkpoints" / f"step-{STEPS_BETWEEN_SAVES:08d}").is_dir():
        if process.poll() is not None:
            sys.exit(run.with_suffix(".out").read_text()[-2000:])
        time.sleep(0.5)


def halves(name: str, values: list[float]) -> Halves:
    """Return the mean of each half, without the start; of a count, the least value.

    The connections of clients come and go. Descriptors or threads that are never released raise
    the least value.
    """
    steady = values[int(START_UP * len(values)) :]
    middle = len(steady) // 2
    is_count = name.endswith(COUNTS)
    summary: Callable[[list[float]], float] = min if is_count else statistics.fmean
    return Halves(name, summary(steady[:middle]), summary(steady[middle:]))


def soak(minutes: float, scratch: Path) -> tuple[list[Halves], list[str]]:
    """Train and serve for some minutes; return what was used in both halves, and the problems.

    Raises OSError if the training or the server ends before the time is over.
    """
    run = scratch / "run"
    columns: dict[str, list[float]] = {}
    end = time.monotonic() + 60 * minutes
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(training(run))
        wait_for_checkpoint(run, process)
        model = scratch / "model"
        command = [sys.executable, "-m", "anew", "export", str(run), "--out", str(model)]
        subprocess.run([*command, "--to", "hf"], cwd=ROOT, check=True)
        clients = stack.enter_context(Clients(stack.enter_context(served(str(model)))))
        server = server_process()
        while time.monotonic() < end:
            for who, pid in (("training", process.pid), ("server", server)):
                for what, value in asdict(usage_of(pid)).items():
                    columns.setdefault(f"{who}: {what}", []).append(value)
            columns.setdefault("run folder: mb", []).append(disk_mb(run))
            time.sleep(SECONDS_BETWEEN_READINGS)
    steps = read_metrics(run)[-1]["step"]
    saves = steps // STEPS_BETWEEN_SAVES
    print(f"{minutes:g} minutes: {steps:,} steps, {saves:,} checkpoints, as many validations")
    print("and samples")
    print("answers:", ", ".join(f"{n:,} x {kind}" for kind, n in sorted(clients.answers.items())))
    problems = list(clients.problems)
    if process.returncode != STOPPED:
        problems.append(f"training ended with exit code {process.returncode}")
    return [halves(name, values) for name, values in columns.items()], problems


def main() -> None:
    """Run from the command line; exit code 1 if a quantity grows or an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        found, problems = soak(arguments.minutes, Path(scratch))
    print(f"\n{'':24} {'first half':>11} {'second half':>11} {'growth':>8}")
    for quantity in found:
        print(
            f"{quantity.name:24} {quantity.first:>11.2f} {quantity.second:>11.2f} "
            f"{quantity.growth:>+8.2%}{'' if quantity.is_constant else '  GROWS'}"
        )
    for problem in problems[:10]:
        print("problem:", problem)
    is_constant = all(quantity.is_constant for quantity in found)
    sys.exit(0 if is_constant and not problems else 1)


if __name__ == "__main__":
    main()
