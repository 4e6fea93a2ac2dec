"""Downloads of a dataset that are cut off at a random byte."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from anew import UserError
from anew.data import hub_datasets, prepare, sources
from tests.faults.common import FaultResult
from tests.support.data_folders import SMALL, content
from tests.support.dataset_hub import COMMIT, REPOSITORY, Hub, sample_files

N_FILES = 6
MOST_CUTS = 2  # of one file in one preparation; less than the attempts


def cut_downloads(injections: int, rng: random.Random, scratch: Path) -> FaultResult:
    """Prepare a dataset while its downloads are cut off, and compare what is on the disk."""
    result = FaultResult()
    with dataset_hub() as hub:
        undisturbed = _prepared(scratch / "undisturbed")
        _fetch_directly(result, hub, rng, scratch)
        while result.injections < injections and not result.failures:
            hub.faults = {name: _cuts(rng) for name in hub.files}
            planned = [fault for faults in hub.faults.values() for fault in faults]
            out = scratch / f"data-{result.injections}"
            result.check(_prepared(out) == undisturbed, f"other files after {planned}")
            left = [fault for faults in hub.faults.values() for fault in faults]
            result.check(not left, f"not cut: {left}")
            result.injections += len(planned)
        _end_after_one_attempt(result, hub, scratch / "control")
    return result


@contextlib.contextmanager
def dataset_hub() -> Iterator[Hub]:
    """Run a hub with one dataset in a thread, and let this process use it without pauses."""
    hub = Hub(sample_files(N_FILES))
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with (
            patch.dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}"),
            patch("huggingface_hub.constants.HF_HUB_OFFLINE", False),
            patch("huggingface_hub.constants.HF_HUB_DISABLE_XET", True),
            patch.object(hub_datasets, "PAUSE_SECONDS", 0.0),
        ):
            yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def _cuts(rng: random.Random) -> list[str]:
    """Return a fault for each of the next downloads of a file: where it is cut off, and how."""
    kinds = rng.choices(["cut", "no length"], k=rng.randint(1, MOST_CUTS))
    return [f"{kind}:{0.99 * rng.random():.4f}" for kind in kinds]


def _prepared(out: Path) -> dict[str, bytes]:
    """Prepare the dataset; return the content of every file that is then on the disk."""
    prepare.prepare_data(sources.find("fineweb-edu"), SMALL, out)
    return content(out)


def _fetch_directly(result: FaultResult, hub: Hub, rng: random.Random, scratch: Path) -> None:
    """Cut off downloads that are not made by huggingface_hub, such as tinyshakespeare's."""
    [file, *_] = hub_datasets.listing(REPOSITORY, "sample/10BT/")
    address = f"http://127.0.0.1:{hub.server_port}/datasets/{REPOSITORY}/resolve/{COMMIT}"
    for number in range(4):
        hub.faults = {file.path: _cuts(rng)}
        planned = list(hub.faults[file.path])
        target = scratch / f"file-{number}"
        sources.download(f"{address}/{file.path}", target, file.sha256, pause_seconds=0.0)
        is_whole = target.read_bytes() == hub.files[file.path]
        result.check(is_whole, f"another file after {planned}")
        result.injections += len(planned)


def _end_after_one_attempt(result: FaultResult, hub: Hub, out: Path) -> None:
    """Without further attempts, a download that is cut off ends the preparation with a sentence."""
    name = next(iter(hub.files))
    hub.faults = {name: ["no length:0.5"]}
    problem = ""
    try:
        with patch.object(hub_datasets, "ATTEMPTS", 1):
            _prepared(out)
    except UserError as error:
        problem = str(error)
    result.check("run the same command again" in problem, f"control: {problem or 'no error'}")
    hub.faults = {}
    result.check(not (out / "index.json").exists(), "control: the preparation counts as complete")
