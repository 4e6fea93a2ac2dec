"""Sides of a comparison that end: real processes, real signals, real errors."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import anew
from anew.bench import competitors
from anew.bench.compare import WARM_UP_TURNS, Turn, alternate
from anew.bench.memory import USABLE_SHARE, fitting_micro_batches, step_bytes, step_memory
from anew.bench.timing import with_batch
from anew.cli import comparisons
from tests.support.commands import run

KILLED = "ended by signal 9 (killed), probably because memory ran out"
CRASHED = "ended by signal 11 (segmentation fault)"


def busy(*_: Any) -> Turn:
    """A side that finishes."""
    return lambda: sum(range(10_000))


def busier(*_: Any) -> Turn:
    """A side that does a hundred times the work of `busy`."""
    return lambda: sum(range(1_000_000))


def raises_at_start(*_: Any) -> Turn:
    raise ModuleNotFoundError("No module named\n'llama'")


def raises_in_turn(*_: Any) -> Turn:
    def turn() -> None:
        raise EOFError

    return turn


def killed_at_start(*_: Any) -> Turn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _dies_in_timed_turn(number: int, die: Callable[[], Any]) -> Turn:
    turns = itertools.count(1)

    def turn() -> None:
        if next(turns) == WARM_UP_TURNS + number:
            die()

    return turn


def crashes_in_third_turn(*_: Any) -> Turn:
    return _dies_in_timed_turn(3, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def leaves_in_second_turn(*_: Any) -> Turn:
    """A side that ends without a word, and whose forked process holds the connection open."""

    def leave() -> None:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os._exit(3)

    return _dies_in_timed_turn(2, leave)


@pytest.mark.guarantee("speed")
def test_sides_that_end_are_left_out_with_the_reason_and_the_others_finish() -> None:
    sides = {
        "busy": busy,
        "raises": raises_at_start,
        "killed": killed_at_start,
        "crashes late": crashes_in_third_turn,
        "ends in a turn": raises_in_turn,
        "busier": busier,
    }
    shown: list[tuple[float, str]] = []
    found = alternate(sides, (), 4, lambda share, text: shown.append((share, text)))
    assert found.left_out == {
        "raises": "ModuleNotFoundError: No module named 'llama'",
        "killed": KILLED,
        "crashes late": CRASHED,
        "ends in a turn": "EOFError",
    }
    assert {name: len(turns) for name, turns in found.seconds.items()} == {"busy": 4, "busier": 4}

    shares = [share for share, _ in shown]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] < 1
    texts = [text for _, text in shown]
    assert texts[:2] == ["busy: warming up, 1 of 2", "busy: warming up, 2 of 2"]
    assert "crashes late: turn 3 of 4" in texts
    assert "crashes late: turn 4 of 4" not in texts
    assert texts[-1] == "busier: turn 4 of 4"


def compare_in_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **sides: object
) -> tuple[int, dict[str, Any], str, str]:
    """Run `anew bench train` with these sides; return its exit code, JSON, output and errors."""
    for name, side in sides.items():
        monkeypatch.setattr(competitors, f"{name}_training", side)
    settings = ["--device", "cpu", "--precision", "bf16"]
    code, out, errors = run(
        capsys, "bench", "train", "gpt2-5m", *settings, "--rounds", "2", "--json"
    )
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    return code, json.loads(lines[-1]), out, errors


def test_command_prints_ratios_of_the_sides_that_are_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts, out, _ = compare_in_command(
        monkeypatch, capsys, anew=busy, transformers=killed_at_start, eager_fp32=busier
    )
    assert code == 0
    assert facts["precision"] == "bf16"
    assert facts["left_out"] == {"transformers": KILLED}
    assert "ratio_to_transformers" not in facts
    [ours, theirs] = facts["seconds"]["anew"], facts["seconds"]["fp32, eager"]
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    assert facts["ratio_to_fp32"] == pytest.approx(sum(ratios) / 2)
    assert f"fp32, eager takes {facts['ratio_to_fp32']:.2f} times as long" in out
    assert "transformers is left out: ended by signal 9" in out


def test_command_fails_after_the_other_figures_if_its_own_side_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts, out, errors = compare_in_command(
        monkeypatch,
        capsys,
        anew=leaves_in_second_turn,
        transformers=busy,
        eager_fp32=busier,
    )
    assert code == 2
    assert facts["left_out"] == {"anew": "ended with exit code 3"}
    assert {name: len(turns) for name, turns in facts["seconds"].items()} == {
        "transformers": 2,
        "fp32, eager": 2,
    }
    assert [key for key in facts if key.startswith("ratio")] == []
    assert "transformers  0." in out
    last_error = errors.splitlines()[-1]
    assert last_error == "anew: the side of anew has no result: ended with exit code 3."


@pytest.mark.guarantee("speed")
@pytest.mark.parametrize(
    ("name", "make_turn", "precision", "tolerance"),
    [
        ("fp32, eager", competitors.eager_fp32_training, "bf16", 1e-5),
        ("transformers", competitors.transformers_training, "bf16", 1e-2),
        ("transformers", competitors.transformers_training, "fp32", 1e-5),
    ],
)
def test_side_with_little_memory_computes_the_gradients_of_the_whole_step(
    name: str,
    make_turn: Callable[..., Turn],
    precision: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 32, "compile": "off", "precision": precision}
    config = with_batch(anew.recipe("gpt2-5m", device="cpu", **settings), 8, 64)
    need = step_memory(name, compiled=False, precision=precision)
    enough_for_two = step_bytes(need, config, 2) / USABLE_SHARE + 1
    [size] = fitting_micro_batches(config, {name: need}, enough_for_two).values()
    assert size == 2

    # Clipping would hide a wrong scale.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(1.0))
    gradients: list[torch.Tensor] = []

    def keep_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    with register_optimizer_step_pre_hook(keep_gradients):
        torch.manual_seed(0)
        whole = make_turn(config, "cpu")()
        torch.manual_seed(0)
        split = make_turn(config.override(micro_batch=size), "cpu")()
    [expected, found] = gradients
    assert (found - expected).norm() < tolerance * expected.norm()
    if name != "transformers":
        assert split.loss == pytest.approx(whole.loss, rel=1e-6)


def test_command_says_which_sides_have_smaller_micro_batches_or_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparisons, "available_memory", lambda: int(1.9e9))
    code, facts, out, _ = compare_in_command(
        monkeypatch, capsys, anew=busy, transformers=busier, eager_fp32=busy
    )
    assert code == 0
    assert facts["micro_batches"] == {"anew": 4, "transformers": 4}
    assert list(facts["left_out"]) == ["fp32, eager"]
    assert "one sequence needs about 0.5 GB" in facts["left_out"]["fp32, eager"]
    assert "fp32, eager is left out" in out
    monkeypatch.setattr(comparisons, "available_memory", lambda: int(1e8))
    finished = run(capsys, "bench", "train", "gpt2-5m", "--device", "cpu")
    assert finished.code == 2
    assert "a step does not fit" in finished.stderr
