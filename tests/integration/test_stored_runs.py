"""Runs that an earlier version of anew stored (tests/fixtures/stored_runs) load, resume and open
in transformers.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import anew
from anew.config.config import Config
from anew.errors import UserError
from anew.training import run_log as metrics
from anew.training.trainer import train
from tests.support import ROOT

STORED = ROOT / "tests" / "fixtures" / "stored_runs"
EXPECTED: dict[str, Any] = json.loads((STORED / "expected.json").read_text(encoding="utf-8"))
EXPECTED_ON_INTEL: dict[str, Any] = json.loads(
    (STORED / "expected_intel.json").read_text(encoding="utf-8")
)
RUNS = sorted(EXPECTED["runs"])


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored runs and of their data, as the current folder: the runs name their data
    relative to it.
    """
    copy = tmp_path / "stored_runs"
    shutil.copytree(STORED, copy)
    monkeypatch.chdir(copy)
    return copy


def processor() -> str:
    """Return where losses are computed: other processors and versions of torch round differently.

    Processors of two vendors with the same vector instructions differ as well.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    vendor = re.search(r"^vendor_id\s*: (.*)$", text, re.MULTILINE)
    name = vendor[1] if vendor else "another vendor"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} {capability}, torch {torch.__version__.split('+')[0]}"


@pytest.mark.guarantee("resume")
@pytest.mark.parametrize("name", RUNS)
def test_stored_run_resumes_to_the_losses_of_the_version_that_began_it(
    name: str, stored: Path
) -> None:
    expected = EXPECTED["runs"][name]
    config = Config.read(stored / name / "config.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = train(config)
    finally:
        torch.set_num_threads(threads)
    assert result.step == 24
    losses = [row["train/loss"] for row in metrics.read_metrics(stored / name)]
    assert losses[12:] == pytest.approx(expected["losses"][12:], rel=1e-4)
    assert result.val_loss == pytest.approx(expected["val_loss"], rel=1e-4)
    weights = stored / name / "checkpoints" / "step-00000024" / "model.safetensors"
    for known in (EXPECTED, EXPECTED_ON_INTEL):
        if processor() == known["processor"]:
            assert losses == known["runs"][name]["losses"]
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            assert digest == known["runs"][name]["weights"]


@pytest.mark.parametrize("name", RUNS)
def test_stored_checkpoint_opens_here_and_in_transformers_with_equal_logits(
    name: str, stored: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        stored / name / "checkpoints" / "step-00000012"
    )
    ours = anew.GPT.from_pretrained(str(stored / name))
    ids = torch.arange(16)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_run_from_before_recut_keeps_the_windows_of_its_first_epoch(stored: Path) -> None:
    """The command that began such a run has recut on by default now; the run goes on with the
    order it has.
    """
    assert (
        "recut"
        not in json.loads((stored / "before_recut" / "config.json").read_text(encoding="utf-8"))[
            "data"
        ]
    )
    config = Config.read(stored / "before_recut" / "config.json")
    assert not config.data.recut
    result = train(config.override(recut=True))
    assert result.val_loss == pytest.approx(EXPECTED["runs"]["before_recut"]["val_loss"], rel=1e-4)
    assert not Config.read(stored / "before_recut" / "config.json").data.recut
    with pytest.raises(UserError, match="recut: True -> False"):
        train(
            Config.read(stored / "muon" / "config.json").override(
                recut=False, out="muon", data="text.txt"
            )
        )


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "zero_init", True),
        ("optim", "average", 0.3),
        ("run", "batch_ramp", "0.5:0.5"),
        ("run", "spikes", "rollback"),
    ],
)
def test_stored_run_with_a_removed_setting_is_refused_by_name(
    group: str, name: str, value: Any, stored: Path
) -> None:
    path = stored / "muon" / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw[group][name] = value
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UserError, match=name):
        Config.read(path)


def test_config_of_a_newer_version_is_refused_in_one_sentence(stored: Path) -> None:
    path = stored / "muon" / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"format": 99, **raw}), encoding="utf-8")
    with pytest.raises(
        UserError, match="has format 99, and this version of anew reads formats up to"
    ) as refused:
        Config.read(path)
    assert "\n" not in str(refused.value)
