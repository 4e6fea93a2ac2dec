"""What is timed is the product's own step, and ratios are of neighbouring turns."""

from pathlib import Path

import pytest
import torch

from anew import Config
from anew.bench import timing
from anew.bench.compare import ratio
from anew.bench.ladder import BOTTOM
from anew.bench.timing import measure, measure_ladder, text_batch, with_batch
from anew.cli.main import main
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils.device import set_up_device
from anew.utils.signals import StopFlag
from tests.faults.common import tiny


@pytest.mark.guarantee("speed")
def test_bottom_and_top_of_the_ladder_have_the_same_losses_in_fp32(tmp_path: Path) -> None:
    """The bottom is plain attention, all logits at once, unpadded rows and unfused AdamW."""
    found = []
    for settings in ({}, BOTTOM):
        config = tiny(
            tmp_path / "run",
            vocab_size=50257,
            tokenizer="gpt2",
            steps=6,
            warmup_steps=1,
            **{"precision": "fp32", **settings},
        )
        found.append(measure(with_batch(config, 4, 16), steps=5).losses)
    assert found[0] == pytest.approx(found[1], rel=2e-6)
    assert found[0][0] - found[0][-1] > 0.01, "it learns"


def test_unfused_optimizer_keeps_weights_at_a_step_that_is_not_finite(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", fused=False)
    state = TrainState(config, set_up_device(config.run), "")
    before = [p.detach().clone() for p in state.parameters]
    batch = text_batch(config, torch.device("cpu"))
    outcome = train_step(
        lambda x, y: state.model(x, y) * float("nan"), state, batch, 1.0, StopFlag()
    )
    assert not outcome.applied
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert train_step(state.model, state, batch, 1.0, StopFlag()).applied


@pytest.mark.guarantee("speed")
def test_ratio_is_of_neighbouring_turns() -> None:
    assert ratio([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bench", "say what to measure"),
        ("bench dreams", "no measurement 'dreams'"),
        ("bench ladder demo --rounds 0", "at least 1"),
        ("bench train gpt2-5m --picture steps.png", "draws no picture"),
        ("bench ladder gpt2-5m --picture steps.doc", "ends in .png"),
        ("bench ladder gpt2-5m --picture /proc/version/steps.png", "cannot be used"),
        ("bench evaluate --file nothing.jsonl", "does not exist"),
    ],
)
def test_invalid_command_says_what_can_be_timed(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_rung_in_bf16_is_left_out_on_a_cpu_without_its_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def note(config: Config, steps: int, matmul: str) -> str:
        timed.append(config.run.precision)
        return "not timed"

    monkeypatch.setattr(timing, "measure_in_new_process", note)
    config = tiny(tmp_path / "run")
    for has_bf16 in (True, False):
        timed.clear()
        monkeypatch.setattr(timing, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        reasons = {rung.name: reason for rung, reason in measure_ladder(config, 3, "cpu")}
        assert ("bf16" in timed) == has_bf16
        is_named = reasons["bf16"] == "this CPU has no bf16 instructions"
        assert is_named != has_bf16
