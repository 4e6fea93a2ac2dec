"""Plans compared with real runs."""

from pathlib import Path
from typing import Any

import pytest

from anew import plan
from anew.checkpoint.folder import newest_valid
from anew.cli.main import main
from anew.training.trainer import train
from tests.faults.common import tiny


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}])
def test_checkpoint_is_as_large_as_planned(settings: dict[str, Any], tmp_path: Path) -> None:
    # Four layers of 64, so that the names of the tensors are a small part of the files.
    config = tiny(tmp_path / "run", n_layer=4, n_embd=64, steps=4, warmup_steps=1, **settings)
    train(config)
    folder, _ = newest_valid(config.folder)
    assert folder is not None
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert on_disk == pytest.approx(plan.checkpoint_bytes(config), rel=0.05)


def test_plan_from_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "run", steps=20)
    train(config)
    main(["plan", "gpt2-124m", "--from", str(config.folder)])
    out = capsys.readouterr().out
    assert "tiny, " in out
    assert "gpt2-124m: 798.1 MFLOP a token" in out
    assert "10B tokens in" in out
